"""Jobs, pods and a small model of a cluster, for the tests of the operator."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api.job import MANAGED_BY, FineTuneJob
from finetune_api.reports import Activity, ProgressReport
from finetune_api.spec import TrainerSpec
from finetune_operator.core.observe import Observed, ObservedJob, ObservedPod, Terminated, parse_job
from finetune_operator.core.plan import plan
from finetune_operator.core.settings import PlanConfig
from finetune_operator.core.situation import Apply, Delete, Kind, Plan

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
CONFIG = PlanConfig(trainer_image="registry/trainer:1")
UID = "0123abcd-0000-4000-8000-000000000001"


def seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


def job_body(name: str = "tune", status: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    """A FineTuneJob as the API server would give it."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {
            "name": name,
            "namespace": "team",
            "uid": UID,
            "generation": 1,
            "creationTimestamp": "2026-11-24T12:00:00Z",
            "resourceVersion": "10",
        },
        "spec": {
            "model": {"uri": "pvc://data/models/smollm2"},
            "datasets": {"train": [{"uri": "pvc://data/train.jsonl"}]},
            "output": {"uri": "pvc://data/out/tune"},
            "managedBy": MANAGED_BY,
            **spec,
        },
        "status": status or {},
    }


def make_job(**spec: Any) -> FineTuneJob:
    return FineTuneJob.from_object(job_body(**spec))


def pod(attempt: int = 1, index: int = 0, **fields: Any) -> ObservedPod:
    """A healthy running pod, unless told otherwise."""
    values: dict[str, Any] = {
        "name": f"tune-{attempt}-{index}-abcde",
        "uid": f"pod-{attempt}-{index}",
        "version": 1,
        "attempt": attempt,
        "index": index,
        "phase": "Running",
        "node": f"node-{index}",
        "ip": f"10.0.0.{index + 1}",
        "scheduled": True,
        "running": True,
    }
    return ObservedPod(**{**values, **fields})


def ended(
    attempt: int = 1, index: int = 0, code: int = 0, message: str = "", at: float = 0, **fields: Any
) -> ObservedPod:
    """A pod whose container has ended."""
    end = Terminated(code, fields.pop("why", "Completed" if code == 0 else "Error"), message, NOW + seconds(at))
    phase = "Succeeded" if code == 0 else "Failed"
    return pod(attempt, index, phase=phase, running=False, terminated=end, **fields)


def child(attempt: int = 1, **fields: Any) -> ObservedJob:
    values: dict[str, Any] = {
        "name": f"tune-{attempt}",
        "uid": f"job-{attempt}",
        "version": 1,
        "attempt": attempt,
        "created_at": NOW,
        "num_nodes": 1,
    }
    return ObservedJob(**{**values, **fields})


def progress(attempt: int = 1, step: int = 40, **fields: Any) -> ProgressReport:
    values: dict[str, Any] = {
        "attempt": attempt,
        "activity": Activity.TRAINING,
        "step": step,
        "total_steps": 400,
        "loss": 1.25,
        "heartbeat_time": NOW,
    }
    return ProgressReport(**{**values, **fields})


@dataclass
class World:
    """A cluster as far as one job sees it: plans are applied at once and completely."""

    job: FineTuneJob
    jobs: dict[str, ObservedJob] = field(default_factory=dict)
    pods: list[ObservedPod] = field(default_factory=list)
    progress: ProgressReport | None = None
    now: datetime = NOW
    objects: set[tuple[Kind, str]] = field(default_factory=set)
    deleted: bool = False

    def observed(self) -> Observed:
        return Observed(jobs=tuple(self.jobs.values()), pods=tuple(self.pods), progress=self.progress)

    def plan(self) -> Plan:
        return plan(self.job, self.observed(), self.now, CONFIG)

    def step(self, after: float = 0) -> Plan:
        """Plans and applies the plan."""
        self.now += seconds(after)
        decision = self.plan()
        self.apply(decision)
        return decision

    def apply(self, decision: Plan) -> None:
        for action in decision.actions:
            if isinstance(action, Apply):
                self.objects.add((action.kind, action.name))
                if action.kind is Kind.JOB and action.name not in self.jobs:
                    number = action.manifest["metadata"]["labels"]["finetune.dev/attempt"]
                    given = {
                        "uid": f"job-{number}",
                        "resourceVersion": "1",
                        "creationTimestamp": self.now.isoformat(),
                    }
                    metadata = {**action.manifest["metadata"], **given}
                    self.jobs[action.name] = parse_job({**action.manifest, "metadata": metadata})
            elif isinstance(action, Delete):
                self._delete(action)
        self.job = self.job.model_copy(update={"status": decision.status})

    def _delete(self, action: Delete) -> None:
        self.objects.discard((action.kind, action.name))
        if action.kind is Kind.FINE_TUNE_JOB:
            self.deleted = True
        if action.kind is Kind.JOB:
            gone = self.jobs.pop(action.name, None)
            if gone is not None:
                self.pods = [
                    replace(p, delete_time=p.delete_time or self.now) if p.attempt == gone.attempt else p
                    for p in self.pods
                ]

    def run_gang(self, attempt: int, num_nodes: int = 1, **fields: Any) -> None:
        """The attempt's pods come up."""
        self.pods += [pod(attempt, index, **fields) for index in range(num_nodes)]

    def set_pod(self, new: ObservedPod) -> None:
        self.pods = [p for p in self.pods if p.name != new.name] + [new]

    def change_spec(self, **changes: Any) -> None:
        """A user edits the spec."""
        if "trainer" in changes:
            changes["trainer"] = TrainerSpec.model_validate(changes["trainer"])
        generation = self.job.metadata.generation + 1
        self.job = self.job.model_copy(
            update={
                "spec": self.job.spec.model_copy(update=changes),
                "metadata": self.job.metadata.model_copy(update={"generation": generation}),
            }
        )
