"""`status` of a FineTuneJob: what the operator writes and people read. Bounded, and free of floats."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import ApiModel
from finetune_api.reports import TRACEBACK_LIMIT, Activity

MAX_ATTEMPTS_KEPT = 20
MAX_METRICS = 24
MESSAGE_LIMIT = 2048
"""Characters of a message."""
Message = Annotated[str, Field(max_length=MESSAGE_LIMIT)]
Number = Annotated[str, Field(max_length=32)]
"""A decimal number as text."""


class State(StrEnum):
    """One word for people, derived from the conditions and the pods; no program should branch on it."""

    PENDING = "Pending"
    STARTING = "Starting"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"


class ConditionType(StrEnum):
    RUNNING = "Running"
    """The gang's pods are running."""
    RESTARTING = "Restarting"
    """An attempt ended and the next is on its way."""
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"


class Condition(ApiModel):
    """Kubernetes' `metav1.Condition`."""

    type: Annotated[str, Field(max_length=64)]
    status: Literal["True", "False", "Unknown"]
    reason: Annotated[str, Field(max_length=128)]
    message: Message = ""
    last_transition_time: datetime
    observed_generation: int | None = None


class AttemptStatus(ApiModel):
    number: int
    """From 1."""
    reason: Annotated[str, Field(max_length=64)] | None = None
    """Why it ended; absent while it runs and after success."""
    message: Message | None = None
    pod: Annotated[str, Field(max_length=253)] | None = None
    """The pod that told the reason."""
    traceback: Annotated[str, Field(max_length=TRACEBACK_LIMIT)] | None = None
    """Where the rank was that failed, or that the others waited for. The pod and its log go when the next attempt starts."""
    world_size: int | None = None
    """Its ranks."""
    exit_code: int | None = None
    counted: bool | None = None
    """Whether the end counted against `recovery.backoffLimit`."""
    start_time: datetime
    end_time: datetime | None = None
    from_step: int | None = None
    """The step it started from."""
    to_step: int | None = None
    """The last step it is known to have done."""
    lost_steps: int | None = None
    """Steps done after its last checkpoint, which the next attempt repeats."""


class MetricStatus(ApiModel):
    name: Annotated[str, Field(max_length=64)]
    """For example `TokenAccuracy` or `HumanEvalPassAt1`."""
    value: Number
    """The newest."""
    base_value: Number
    """Before the first step."""
    step: int
    """The step of `value`."""


class ProgressStatus(ApiModel):
    summary: Annotated[str, Field(max_length=64)]
    """For example `120/400 (30%)`."""
    activity: Activity | None = None
    step: int = 0
    total_steps: int | None = None
    epoch: Number | None = None
    loss: Number | None = None
    eval_loss: Number | None = None
    """Newest held-out loss."""
    base_eval_loss: Number | None = None
    """Held-out loss before the first step."""
    tokens_per_second: Number | None = None
    eta_seconds: int | None = None
    update_time: datetime | None = None
    metrics: Annotated[list[MetricStatus], Field(max_length=MAX_METRICS)] = []
    """What was measured beside the loss: token accuracy, and pass@k of benchmarks."""


class CheckpointStatus(ApiModel):
    step: int
    time: datetime | None = None


class PlanStatus(ApiModel):
    """What was chosen where the spec leaves a choice, and what follows from it."""

    image: Annotated[str, Field(max_length=512)]
    world_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    learning_rate: Number
    checkpoint_uri: Annotated[str, Field(max_length=2048)]
    """This job's own folder of checkpoints."""
    output_uri: Annotated[str, Field(max_length=2048)]
    model_revision: Annotated[str, Field(max_length=253)] | None = None
    """The commit that an `hf://` model was resolved to at the first start; every later attempt uses it."""


class FineTuneJobStatus(ApiModel):
    conditions: Annotated[list[Condition], Field(max_length=16)] = []
    state: State | None = None
    reason: Annotated[str, Field(max_length=64)] | None = None
    """Why it is in this state."""
    message: Message | None = None
    """What is going on and what to do."""
    observed_generation: int | None = None
    start_time: datetime | None = None
    """When the job was first acted on; after a suspension, when it was resumed (as for a Kubernetes Job)."""
    completion_time: datetime | None = None
    plan: PlanStatus | None = None
    restarts: int | None = None
    """Attempts after the first, counted or not; a resume after a suspension is none."""
    counted_restarts: int | None = None
    """Restarts that count against `recovery.backoffLimit`."""
    attempts: Annotated[list[AttemptStatus], Field(max_length=MAX_ATTEMPTS_KEPT)] = []
    """The newest attempts, oldest first."""
    progress: ProgressStatus | None = None
    last_checkpoint: CheckpointStatus | None = None
