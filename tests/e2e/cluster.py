"""The cluster under test: the installed operator, the volume, and ways to disturb them."""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.ours import RELEASE
from tests.e2e.jobs import CLAIM, Job
from tests.e2e.kube import Kubectl, KubectlError, wait_for
from tests.e2e.results import Result
from tests.e2e.volume import TOOLBOX

ROOT = Path(__file__).resolve().parents[2]


def cluster_command(*arguments: str, timeout: float = 900) -> str:
    """Runs `python3 -m cluster ARGUMENTS` and returns its standard output."""
    command = [sys.executable, "-m", "cluster", *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=timeout, check=True).stdout


def provider() -> str:
    """Where the cluster comes from."""
    name: str = json.loads(cluster_command("info"))["provider"]
    return name


def kill_rank(kubectl: Kubectl, pod: str, number: int = signal.SIGKILL) -> float:
    """A signal to the last rank of a pod, SIGKILL as the kernel's OOM killer would; returns when, on the monotonic clock."""
    script = (
        "import os, pathlib, time\n"
        "ranks = [int(p.parent.name) for p in pathlib.Path('/proc').glob('[0-9]*/environ')\n"
        "         if b'LOCAL_RANK=' in p.read_bytes() and int(p.parent.name) != os.getpid()]\n"
        "print(time.monotonic())\n"
        f"os.kill(max(ranks), {int(number)})\n"
    )
    return float(kubectl.exec(pod, "python", "-c", script))


@dataclass(frozen=True)
class Cluster:
    """Handles to everything that a test touches."""

    kubectl: Kubectl
    """In the namespace of jobs and operator."""
    helm: str
    images: dict[str, str]

    @property
    def toolbox_node(self) -> str:
        """The node that the volume's pod stands on; the tests need it."""
        node: str = self.kubectl.get("pod", TOOLBOX)["spec"]["nodeName"]
        return node

    @property
    def other_node(self) -> str:
        """A node that the tests can do without."""
        nodes: list[str] = [node["metadata"]["name"] for node in self.kubectl.list("nodes")]
        return next(node for node in nodes if node != self.toolbox_node)

    def result(self, job: Job) -> Result:
        """What the job exported, read from the volume."""
        folder = f"/mnt/{job.object['spec']['output']['uri'].removeprefix('pvc://' + CLAIM + '/')}"
        weights = self.kubectl.exec(TOOLBOX, "sh", "-c", f"cat {folder}/*.safetensors | sha256sum").split()[0]
        report = json.loads(self.kubectl.exec(TOOLBOX, "cat", f"{folder}/train_result.json"))
        return Result(weights, *(repr(report[key]) for key in ("loss", "eval_loss", "base_eval_loss")))

    def evict(self, pod: str) -> None:
        """Evicts a pod through the API, as `kubectl drain` does."""
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": pod, "namespace": self.kubectl.namespace},
        }
        path = f"/api/v1/namespaces/{self.kubectl.namespace}/pods/{pod}/eviction"
        self.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(body))

    def lose_node(self, how: str, node: str) -> None:
        """`stop`: its kubelet ends for good. `kill`: all on it ends, as in a loss of power."""
        cluster_command("node", how, node)

    def start_node(self, node: str) -> None:
        cluster_command("node", "start", node)
        wait_for(f"{node} to be ready", lambda: _ready(self.kubectl.get("node", node)), 60)

    def operator_pods(self) -> list[dict[str, Any]]:
        return self.kubectl.list("pods", f"app.kubernetes.io/name={RELEASE}")

    def kill_operator(self) -> None:
        """Takes every operator pod away at once, without a grace period."""
        names = [pod["metadata"]["name"] for pod in self.operator_pods()]
        self.kubectl("delete", "pod", *names, "--grace-period=0", "--force", "--wait=true")

    def move_operator(self, node: str) -> None:
        """Brings the operator to a node: no other takes pods until it stands there."""
        if {pod["spec"]["nodeName"] for pod in self.operator_pods()} == {node}:
            return
        others = [body["metadata"]["name"] for body in self.kubectl.list("nodes") if body["metadata"]["name"] != node]
        self.kubectl("cordon", *others)
        try:
            self.kill_operator()
            self.wait_operator()
        finally:
            self.kubectl("uncordon", *others)

    def scale_operator(self, replicas: int) -> None:
        self.kubectl("scale", "deployment", RELEASE, f"--replicas={replicas}")
        wait_for(
            f"{replicas} operator pods",
            lambda: len(self._ready_operators()) == replicas == len(self.operator_pods()),
            60,
        )

    def wait_operator(self) -> None:
        wait_for("a ready operator", self._ready_operators, 60, lambda: self.operator_pods())

    def _ready_operators(self) -> list[dict[str, Any]]:
        return [pod for pod in self.operator_pods() if _ready(pod) and "deletionTimestamp" not in pod["metadata"]]

    def gone(self, kind: str, selector: str = "") -> bool:
        try:
            return not self.kubectl.list(kind, selector)
        except KubectlError:
            return False


def _ready(body: dict[str, Any]) -> bool:
    conditions = body.get("status", {}).get("conditions", [])
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)
