"""kubectl against one cluster and namespace."""

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.commands import CommandError, run


@dataclass(frozen=True)
class Kubectl:
    """Runs kubectl; what it prints to standard error goes to `log`."""

    binary: str
    kubeconfig: str
    namespace: str
    log: Path

    @property
    def command(self) -> list[str]:
        return [self.binary, "--kubeconfig", self.kubeconfig, "--namespace", self.namespace]

    def __call__(self, *arguments: str, stdin: str | None = None, timeout: float = 300) -> str:
        """Runs `kubectl ARGUMENTS` and returns its standard output.

        Raises:
            CommandError: it failed.
        """
        return run([*self.command, *arguments], self.log, stdin=stdin, timeout=timeout)

    def apply(self, *manifests: dict[str, Any]) -> None:
        """Applies objects."""
        self("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)}))

    def find(self, kind: str, name: str) -> dict[str, Any] | None:
        """One object; None where there is none."""
        text = self("get", kind, name, "-o", "json", "--ignore-not-found")
        found: dict[str, Any] | None = json.loads(text) if text.strip() else None
        return found

    def shell(self, pod: str, script: str) -> str:
        """Runs a shell script in a pod and returns its standard output."""
        return self("exec", pod, "--", "sh", "-ec", script, timeout=900)

    def send(self, sources: dict[str, Path], pod: str, target: str) -> None:
        """Copies files and folders into a pod's folder, as `{name there: path here}`, readable by everyone."""
        script = f"mkdir -p {target} && tar -xf - -C {target} --no-same-owner"
        packing = ["tar", "--create", "--dereference", "--mode=a+rX", "--owner=0", "--group=0"]
        for name, path in sources.items():
            transform = f"--transform=s,^{path.name},{name},"
            unpacking = subprocess.Popen(
                [*self.command, "exec", "-i", pod, "--", "sh", "-ec", script],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            subprocess.run([*packing, transform, "-C", path.parent, path.name], stdout=unpacking.stdin, check=True)
            _, error = unpacking.communicate(timeout=600)
            if unpacking.returncode:
                raise CommandError(f"copying {path.name} into pod {pod} failed: {error.decode()[-500:]}")

    def fetch(self, pod: str, source: str, target: Path) -> None:
        """Copies a pod's folder to a folder here, which appears only when it is complete."""
        new = target.with_name(f".{target.name}.new")
        new.mkdir(parents=True, exist_ok=True)
        packing = subprocess.Popen(
            [*self.command, "exec", pod, "--", "tar", "-cf", "-", "-C", source, "."], stdout=subprocess.PIPE
        )
        subprocess.run(["tar", "-xf", "-", "--no-same-owner", "-C", new], stdin=packing.stdout, check=True)
        if packing.wait(60):
            raise CommandError(f"copying {source} out of pod {pod} failed")
        new.rename(target)


def wait_for(what: str, probe: Callable[[], bool], timeout: float, why_not: Callable[[], str]) -> None:
    """Asks `probe` until it is true.

    Raises:
        CommandError: the time is over; the message ends with what `why_not` tells.
    """
    end = time.monotonic() + timeout
    while not probe():
        if time.monotonic() > end:
            raise CommandError(f"waited {timeout:.0f} s for {what}: {why_not()}")
        time.sleep(1)
