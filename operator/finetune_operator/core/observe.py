"""What is seen of a job's children, as small frozen values. The one place that knows the layout of Jobs and pods."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from finetune_api.job import LABEL_ATTEMPT, LABEL_JOB_NAME, LABEL_JOB_UID
from finetune_api.reports import ProgressReport
from finetune_operator.core.names import CONTAINER, attempt_name

ANNOTATION_PREVIOUS_END = "finetune.dev/previous-end"
"""On a child Job: how the attempt before it ended (JSON of AttemptStatus), for an operator that died before it wrote status."""
ANNOTATION_TRAINER = "finetune.dev/trainer"
"""On a child Job: which `spec.trainer` it was made from (`resolve.trainer_digest`)."""
_INDEX = "batch.kubernetes.io/job-completion-index"


@dataclass(frozen=True, slots=True)
class Owner:
    """The FineTuneJob that a child belongs to, as its labels say."""

    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Terminated:
    """A container that has ended."""

    exit_code: int
    reason: str
    message: str
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class Waiting:
    """A container that waits, for instance for its image."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class ObservedPod:
    """A pod of a gang."""

    name: str
    uid: str
    version: int
    attempt: int
    index: int
    phase: str = "Pending"
    reason: str = ""
    """`status.reason`: set where kubelet refused or evicted the pod."""
    message: str = ""
    node: str = ""
    ip: str = ""
    scheduled: bool = False
    running: bool = False
    """The trainer's container runs."""
    unschedulable: str | None = None
    """The scheduler's message."""
    disruption: str | None = None
    """Reason of the DisruptionTarget condition."""
    delete_time: datetime | None = None
    """When its deletion was asked for (the deletion timestamp less the grace period)."""
    waiting: Waiting | None = None
    terminated: Terminated | None = None

    @property
    def deleting(self) -> bool:
        return self.delete_time is not None

    @property
    def ended(self) -> bool:
        return self.terminated is not None or self.phase in ("Succeeded", "Failed")

    @property
    def succeeded(self) -> bool:
        return self.phase == "Succeeded" or (self.terminated is not None and self.terminated.exit_code == 0)


@dataclass(frozen=True, slots=True)
class ObservedJob:
    """The Indexed Job of one attempt."""

    name: str
    uid: str
    version: int
    attempt: int
    created_at: datetime
    num_nodes: int
    """The pods of its gang."""
    complete: bool = False
    failed: bool = False
    message: str = ""
    """Of the condition that says that it failed."""
    deleting: bool = False
    previous_end: str | None = None
    trainer: str | None = None
    """The digest of the `spec.trainer` that it was made from; None: an older operator made it."""

    @property
    def ended(self) -> bool:
        return self.complete or self.failed


@dataclass(frozen=True, slots=True)
class Observed:
    """All that is known of a job besides the FineTuneJob itself."""

    jobs: tuple[ObservedJob, ...] = ()
    pods: tuple[ObservedPod, ...] = ()
    progress: ProgressReport | None = None
    """The newest answer of rank 0."""

    def job(self, attempt: int) -> ObservedJob | None:
        return next((job for job in self.jobs if job.attempt == attempt), None)

    def gang(self, attempt: int) -> tuple[ObservedPod, ...]:
        """The pods of one attempt, by index."""
        return tuple(sorted((p for p in self.pods if p.attempt == attempt), key=lambda p: (p.index, p.name)))


def parse_time(text: str | None) -> datetime | None:
    """Reads a Kubernetes timestamp."""
    return datetime.fromisoformat(text) if text else None


def parse_owner(body: dict[str, Any]) -> Owner | None:
    """The FineTuneJob that a child's labels name; None for an object that is not a child.

    Labels alone make none: a copy of a pod has them too. A Job belongs to the FineTuneJob, and a pod to such a Job.
    """
    meta = body["metadata"]
    labels = meta.get("labels") or {}
    uid, name, attempt = labels.get(LABEL_JOB_UID), labels.get(LABEL_JOB_NAME, ""), str(labels.get(LABEL_ATTEMPT, ""))
    if not uid or not name or not attempt.isdecimal():
        return None
    controller: dict[str, Any] = next(
        (owner for owner in meta.get("ownerReferences") or [] if owner.get("controller")), {}
    )
    of_job = controller.get("kind") == "Job" and controller["name"] == attempt_name(name, int(attempt))
    return Owner(meta["namespace"], name, uid) if of_job or controller.get("uid") == uid else None


def _condition(body: dict[str, Any], *types: str) -> dict[str, Any] | None:
    conditions = (body.get("status") or {}).get("conditions") or []
    return next((c for c in conditions if c["type"] in types and c["status"] == "True"), None)


def parse_job(body: dict[str, Any]) -> ObservedJob:
    """Reads a child Job."""
    meta = body["metadata"]
    created_at = parse_time(meta["creationTimestamp"])
    assert created_at is not None
    failed = _condition(body, "Failed", "FailureTarget")
    annotations = meta.get("annotations") or {}
    return ObservedJob(
        name=meta["name"],
        uid=meta["uid"],
        version=int(meta["resourceVersion"]),
        attempt=int(meta["labels"][LABEL_ATTEMPT]),
        created_at=created_at,
        num_nodes=body["spec"]["completions"],
        complete=_condition(body, "Complete", "SuccessCriteriaMet") is not None,
        failed=failed is not None,
        message=(failed or {}).get("message") or "",
        deleting=bool(meta.get("deletionTimestamp")),
        previous_end=annotations.get(ANNOTATION_PREVIOUS_END),
        trainer=annotations.get(ANNOTATION_TRAINER),
    )


def parse_pod(body: dict[str, Any]) -> ObservedPod:
    """Reads a pod of a gang."""
    meta, spec, status = body["metadata"], body.get("spec") or {}, body.get("status") or {}
    containers = status.get("containerStatuses") or []
    # By name: others may have been injected beside it.
    own: dict[str, Any] = next((c for c in containers if c.get("name") == CONTAINER), {})
    state: dict[str, Any] = own.get("state") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or []}
    scheduled = conditions.get("PodScheduled") or {}
    disruption = conditions.get("DisruptionTarget") or {}
    labels = meta["labels"]
    deletion = parse_time(meta.get("deletionTimestamp"))
    grace = timedelta(seconds=meta.get("deletionGracePeriodSeconds") or 0)
    return ObservedPod(
        name=meta["name"],
        uid=meta["uid"],
        version=int(meta["resourceVersion"]),
        attempt=int(labels[LABEL_ATTEMPT]),
        index=int(labels.get(_INDEX) or (meta.get("annotations") or {}).get(_INDEX) or 0),
        phase=status.get("phase") or "Pending",
        reason=status.get("reason") or "",
        message=status.get("message") or "",
        node=spec.get("nodeName") or "",
        ip=status.get("podIP") or "",
        scheduled=scheduled.get("status") == "True" or bool(spec.get("nodeName")),
        running="running" in state and status.get("phase") == "Running",
        unschedulable=scheduled.get("message", "") if scheduled.get("reason") == "Unschedulable" else None,
        disruption=disruption.get("reason") if disruption.get("status") == "True" else None,
        delete_time=deletion - grace if deletion else None,
        waiting=_waiting(state.get("waiting")),
        terminated=_terminated(state.get("terminated")),
    )


def _waiting(state: dict[str, Any] | None) -> Waiting | None:
    return Waiting(state.get("reason") or "", state.get("message") or "") if state else None


def _terminated(state: dict[str, Any] | None) -> Terminated | None:
    if not state:
        return None
    return Terminated(
        exit_code=state.get("exitCode", 0),
        reason=state.get("reason") or "",
        message=state.get("message") or "",
        finished_at=parse_time(state.get("finishedAt")),
    )
