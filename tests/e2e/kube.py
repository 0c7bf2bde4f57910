"""kubectl as a person uses it, and waiting on conditions instead of sleeping."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.25


class KubectlError(AssertionError):
    """kubectl failed; the message is what it printed."""


@dataclass(frozen=True)
class Kubectl:
    """Runs kubectl against one cluster and namespace."""

    binary: str
    kubeconfig: str
    namespace: str

    def __call__(self, *arguments: str, stdin: str | None = None, timeout: float = 300) -> str:
        """Runs `kubectl ARGUMENTS` and returns what it printed.

        Raises:
            KubectlError: it ended with another status than 0.
        """
        command = [self.binary, "--kubeconfig", self.kubeconfig, "--namespace", self.namespace, *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
        if done.returncode:
            raise KubectlError(f"kubectl {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def within(self, namespace: str) -> "Kubectl":
        """The same cluster, another namespace."""
        return Kubectl(self.binary, self.kubeconfig, namespace)

    def apply(self, *manifests: dict[str, Any], dry_run: bool = False) -> str:
        """`kubectl apply`, with the API server's strict field validation."""
        # Not as a List: kubectl validates what is in one by itself, and says less than the API server.
        documents = "\n---\n".join(json.dumps(manifest) for manifest in manifests)
        return self("apply", "-f", "-", *(["--dry-run=server"] if dry_run else []), stdin=documents)

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """One object."""
        found: dict[str, Any] = json.loads(self("get", kind, name, "-o", "json"))
        return found

    def list(self, kind: str, selector: str = "") -> list[dict[str, Any]]:
        """All objects of a kind that match a label selector."""
        found = json.loads(self("get", kind, "-o", "json", *(["-l", selector] if selector else [])))
        items: list[dict[str, Any]] = found["items"]
        return items

    @contextmanager
    def proxy(self) -> Iterator[str]:
        """The API server's address for plain HTTP while the block runs."""
        command = [self.binary, "--kubeconfig", self.kubeconfig, "proxy", "--port=0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                yield f"http://{process.stdout.readline().split()[-1]}"  # Starting to serve on 127.0.0.1:PORT
            finally:
                process.terminate()

    def exec(self, pod: str, *command: str, container: str | None = None) -> str:
        """Runs a command in a pod."""
        return self("exec", pod, *(["-c", container] if container else []), "--", *command)


def wait_for(what: str, probe: Callable[[], T | None], timeout: float, state: Callable[[], object] | None = None) -> T:
    """Asks `probe` until it gives something true.

    Args:
        what: for the message, completes "waited for".
        probe: returns what was waited for, or something false.
        timeout: seconds.
        state: what to print with the failure.

    Raises:
        AssertionError: the time is over.
    """
    end = time.monotonic() + timeout
    while True:
        found = probe()
        if found:
            return found
        if time.monotonic() > end:
            raise AssertionError(f"waited {timeout:.0f} s for {what}; state: {state() if state else 'unknown'}")
        time.sleep(POLL_SECONDS)
