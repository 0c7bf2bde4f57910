"""An instance of the cluster for the tests, beside whatever else runs on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster import oci, packages, settings, tools

REPOSITORY = Path(__file__).resolve().parents[2]
BUSYBOX = Path("/bin/busybox")
# Node-lost takes 50 s by default; kubelet renews its lease every 10 s, so it cannot be much shorter than this.
FAST_NODE_LOSS = "--node-monitor-grace-period=15s --node-monitor-period=1s"


@dataclass(frozen=True)
class Instance:
    """A cluster of the tests' own."""

    env: dict[str, str]
    settings: settings.Settings
    kubectl_path: Path

    def run(self, *words: str, timeout_seconds: float = 120) -> str:
        """Runs a cluster command; returns its stdout."""
        done = self.start(*words)
        out, err = done.communicate(timeout=timeout_seconds)
        assert done.returncode == 0, err
        return out

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        """Starts a cluster command without waiting for it."""
        return subprocess.Popen(
            [sys.executable, "-m", "cluster", *words],
            cwd=REPOSITORY,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def kubectl(self, *words: str, stdin: str | None = None, check: bool = True) -> str:
        """Runs kubectl as the administrator; returns stdout, or stderr where it may fail."""
        command = [str(self.kubectl_path), f"--kubeconfig={self.settings.kubeconfig}", *words]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)
        if check:
            assert done.returncode == 0, done.stderr
        return done.stdout if done.returncode == 0 else done.stderr

    def parts(self) -> dict[str, tuple[str, int | None]]:
        """State and pid by part, from `status`."""
        rows = [line.split() for line in self.run("status").splitlines()[1:]]
        return {row[0]: (row[1], int(row[2]) if row[2] != "-" else None) for row in rows}

    def ready_nodes(self) -> set[str]:
        """Names of the nodes that are Ready now."""
        items = json.loads(self.kubectl("get", "nodes", "-o", "json"))["items"]
        return {
            item["metadata"]["name"]
            for item in items
            for condition in item["status"]["conditions"]
            if condition["type"] == "Ready" and condition["status"] == "True"
        }


def eventually(condition: Callable[[], object], what: str, timeout_seconds: float = 60) -> None:
    """Waits until a condition holds; an error while asking counts as not yet."""
    deadline = time.monotonic() + timeout_seconds
    last: object = None
    while time.monotonic() < deadline:
        try:
            last = condition()
        except (AssertionError, OSError, KeyError, ValueError) as error:
            last = error
        else:
            if last:
                return
        time.sleep(0.3)
    pytest.fail(f"{what}: not after {timeout_seconds:.0f} s, last: {last}")


@pytest.fixture(scope="session")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """The instance, not started; removed at the end whatever a test left."""
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("the built cluster needs root on Linux")
    env = {key: value for key, value in os.environ.items() if not key.startswith(("FINETUNE_", "KUBECONFIG"))}
    env |= {
        "FINETUNE_CLUSTER_PROVIDER": "built",
        "FINETUNE_CLUSTER_NAME": "fttest",
        "FINETUNE_CLUSTER_CIDR": "10.231.0.0/16",
        "FINETUNE_CLUSTER_ARGS_KUBE_CONTROLLER_MANAGER": FAST_NODE_LOSS,
    }
    own = settings.load(env)
    packages.ensure(own, {"busybox-static": str(BUSYBOX)})
    created = Instance(env, own, tools.kubectl(own))
    created.run("down")
    yield created
    created.run("down")
    shutil.rmtree(own.instance_cache, ignore_errors=True)


@pytest.fixture(scope="session")
def running(instance: Instance) -> Instance:
    """The instance, started."""
    instance.run("up", timeout_seconds=1500)
    return instance


@pytest.fixture(scope="session")
def busybox(running: Instance, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The reference of a tiny image in the instance's registry."""
    archive = tmp_path_factory.mktemp("image") / "busybox.tar"
    content = BUSYBOX.read_bytes()
    files = {"bin/busybox": content, "bin/sh": content}
    oci.write_archive(archive, files=files, entrypoint=["/bin/sh"], reference="busybox:1")
    reference = f"{running.settings.registry}/test/busybox:1"
    push = ["skopeo", "copy", "--dest-tls-verify=false", f"oci-archive:{archive}", f"docker://{reference}"]
    subprocess.run(push, check=True, capture_output=True)
    return reference
