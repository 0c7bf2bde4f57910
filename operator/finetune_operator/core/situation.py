"""The values that policies take and give: `Situation` in, `Plan` out."""

from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from finetune_api.job import FineTuneJob
from finetune_api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.core.observe import Observed, ObservedJob, ObservedPod
from finetune_operator.core.settings import PlanConfig


class Kind(StrEnum):
    """Kinds of objects that actions touch, in the order in which they are applied."""

    CONFIG_MAP = "ConfigMap"
    SERVICE = "Service"
    JOB = "Job"
    FINE_TUNE_JOB = "FineTuneJob"


@dataclass(frozen=True, slots=True)
class Apply:
    """Server-side apply of an object."""

    kind: Kind
    name: str
    manifest: dict[str, Any] = field(hash=False, repr=False)


@dataclass(frozen=True, slots=True)
class Delete:
    """Deletion of an object, with propagation Background; an object that is gone is fine."""

    kind: Kind
    name: str
    uid: str | None = None
    """Only the object with this uid."""


Action = Apply | Delete


@dataclass(frozen=True, slots=True)
class Event:
    """A Kubernetes event about the job."""

    type: str
    """Normal or Warning."""
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do: actions first, then the status, then the events."""

    status: FineTuneJobStatus
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    requeue_after: float | None = None
    """Look again after so many seconds, whatever happens."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What policies see. `status` is the one being worked on; `job.status` is what the API server has."""

    job: FineTuneJob
    observed: Observed
    now: datetime
    config: PlanConfig
    status: FineTuneJobStatus

    def with_status(self, status: FineTuneJobStatus) -> "Situation":
        return replace(self, status=status)

    @property
    def current_job(self) -> FineTuneJob:
        """The job with the status that is being worked on."""
        return self.job.model_copy(update={"status": self.status})

    @property
    def num_nodes(self) -> int:
        """The pods of the newest attempt's gang. `spec.trainer` may have changed since its Job was made."""
        return self.child.num_nodes if self.child is not None else self.job.spec.trainer.num_nodes

    @property
    def attempt(self) -> AttemptStatus | None:
        """The attempt that runs; None if none does."""
        last = self.status.attempts[-1] if self.status.attempts else None
        return last if last is not None and last.end_time is None else None

    @property
    def child(self) -> ObservedJob | None:
        """The Job of the newest attempt."""
        return self.observed.job(self.status.attempts[-1].number) if self.status.attempts else None

    @property
    def gang(self) -> tuple[ObservedPod, ...]:
        """The pods of the newest attempt."""
        return self.observed.gang(self.status.attempts[-1].number) if self.status.attempts else ()

    def seconds_until(self, time: datetime) -> float:
        return (time - self.now).total_seconds()
