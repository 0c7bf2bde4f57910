"""FineTuneJobs for the tests, and what can be asked of one that runs."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_api.job import API_VERSION, KIND, LABEL_ATTEMPT, LABEL_JOB_NAME
from tests.e2e.kube import Kubectl, wait_for

CLAIM = "finetune"
TRAIN = f"pvc://{CLAIM}/datasets/humaneval/train.jsonl"
HELD_OUT = f"pvc://{CLAIM}/datasets/humaneval/heldout.jsonl"
PROBLEMS = f"pvc://{CLAIM}/datasets/humaneval/heldout-problems.jsonl"
"""HumanEval's own records of what is held out."""
SMOLLM2 = f"pvc://{CLAIM}/models/SmolLM2-135M-Instruct"
SMALL = f"pvc://{CLAIM}/models/SmolLM2-first-2-layers"
"""The real weights, cut after the second layer: a step takes a fraction of a second."""
SEEING = f"pvc://{CLAIM}/models/random-llava"
"""A small model of LLaVA's architecture with random weights."""
PICTURES = f"pvc://{CLAIM}/datasets/easy-vqa"
"""`train.jsonl`, `heldout.jsonl` and their images."""


def manifest(name: str, spec: dict[str, Any] | None = None) -> dict[str, Any]:
    """A small LoRA job; `spec` is laid over it, block by block."""
    base: dict[str, Any] = {
        "model": {"uri": SMALL},
        "datasets": {
            "train": [{"uri": TRAIN, "format": "Messages", "maxSamples": 64}],
            "evaluation": [{"uri": HELD_OUT, "format": "Messages", "maxSamples": 8}],
        },
        "method": "LoRA",
        "adapter": {"rank": 8, "dropout": "0.1"},
        "training": {
            "maxLength": 128,
            "globalBatchSize": 4,
            "microBatchSize": 1,
            "maxSteps": 20,
            "learningRate": "1e-3",
            "precision": "FP32",
        },
        "trainer": {"resourcesPerNode": {"requests": {"cpu": "500m"}, "limits": {"cpu": "1", "memory": "4Gi"}}},
        "checkpoint": {"everySteps": 5},
        "output": {"uri": f"pvc://{CLAIM}/outputs/{name}"},
    }
    for block, value in (spec or {}).items():
        base[block] = {**base.get(block, {}), **value} if isinstance(value, dict) else value
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": base}


@dataclass(frozen=True)
class Job:
    """One FineTuneJob in the cluster."""

    kubectl: Kubectl
    name: str

    @property
    def object(self) -> dict[str, Any]:
        return self.kubectl.get("finetunejob", self.name)

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.object.get("status", {})
        return status

    @property
    def progress(self) -> dict[str, Any]:
        """What rank 0 of the newest attempt says of itself, asked of its pod; empty while it does not answer."""
        pods = [pod for pod in self.pods() if _index(pod) == 0]
        if not pods:
            return {}
        try:
            pod = pods[-1]["metadata"]["name"]
            path = f"/api/v1/namespaces/{self.kubectl.namespace}/pods/{pod}:8080/proxy/progress"
            report: dict[str, Any] = json.loads(self.kubectl("get", "--raw", path))
        except (AssertionError, ValueError):
            return {}
        return report

    @property
    def step(self) -> int:
        """The step that rank 0 is known to have done."""
        return int(self.progress.get("step", 0))

    def pods(self, attempt: int | None = None) -> list[dict[str, Any]]:
        """The pods of one attempt (default: the newest), by index."""
        selector = f"{LABEL_JOB_NAME}={self.name}"
        pods = self.kubectl.list("pods", selector)
        numbers = {int(pod["metadata"]["labels"][LABEL_ATTEMPT]) for pod in pods}
        wanted = attempt if attempt is not None else max(numbers, default=0)
        return sorted((pod for pod in pods if int(pod["metadata"]["labels"][LABEL_ATTEMPT]) == wanted), key=_index)

    def wait(self, what: str, probe: Callable[[dict[str, Any]], Any], timeout: float = 240) -> dict[str, Any]:
        """Waits until `probe(status)` is true and returns that status."""

        def look() -> dict[str, Any] | None:
            status = self.status
            return status if probe(status) else None

        return wait_for(f"{self.name}: {what}", look, timeout, lambda: json.dumps(self.status, indent=1)[-3000:])

    def wait_state(self, *states: str, timeout: float = 240) -> dict[str, Any]:
        """Waits until the job is in one of the states; a job that fails unasked ends the wait at once."""
        status = self.wait(
            f"state {' or '.join(states)}",
            lambda status: status.get("state") in (*states, "Failed", "Complete"),
            timeout,
        )
        assert status["state"] in states, (
            f"{self.name} is {status['state']} ({status.get('reason')}): {status.get('message')}"
        )
        return status

    def wait_step(self, step: int, timeout: float = 180) -> int:
        """Waits until rank 0 has done so many steps and returns how many."""
        return wait_for(
            f"{self.name}: step {step}", lambda: (done := self.step) >= step and done, timeout, lambda: self.status
        )

    def complete(self, timeout: float = 300) -> dict[str, Any]:
        """Waits for Complete and returns the status."""
        return self.wait_state("Complete", timeout=timeout)

    def change(self, **spec: Any) -> None:
        """Patches fields of the spec, all at once."""
        self.kubectl("patch", "finetunejob", self.name, "--type=merge", "-p", json.dumps({"spec": spec}))

    def conditions(self) -> dict[str, dict[str, Any]]:
        return {condition["type"]: condition for condition in self.status.get("conditions", [])}


def start(kubectl: Kubectl, name: str, spec: dict[str, Any] | None = None) -> Job:
    """Applies a job and returns its handle."""
    kubectl.apply(manifest(name, spec))
    return Job(kubectl, name)


def _index(pod: dict[str, Any]) -> int:
    return int(pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"])


def now() -> float:
    """Wall-clock seconds, comparable to the timestamps in status."""
    return time.time()
