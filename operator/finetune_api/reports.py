"""What a running trainer tells the operator: progress over HTTP, and one last message when it ends."""

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from finetune_api.base import ApiModel
from finetune_api.reasons import Reason

TERMINATION_MESSAGE_LIMIT_BYTES = 4096
"""Kubernetes' limit for one container (kubelet, `terminationMessagePath`)."""
TRACEBACK_LIMIT = 1500


class Activity(StrEnum):
    """What rank 0 is doing now."""

    LOADING = "Loading"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    CHECKPOINTING = "Checkpointing"
    EXPORTING = "Exporting"
    DONE = "Done"


class MetricReport(ApiModel):
    """One metric's newest value."""

    name: str
    """For example `TokenAccuracy` or `HumanEvalPassAt1`."""
    value: float
    base_value: float
    """Before the first step."""
    step: int
    """Of `value`."""


class ProgressReport(ApiModel):
    """Rank 0's answer at `GET /progress`."""

    attempt: int
    activity: Activity
    step: int = 0
    """Optimizer steps done since step 0 of the job (not of this attempt)."""
    total_steps: int | None = None
    """None until the data is read."""
    epoch: float = 0.0
    loss: float | None = None
    """Mean loss for each target token of the last step, over all ranks."""
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    samples_per_second: float | None = None
    eta_seconds: float | None = None
    peak_memory_bytes: int | None = None
    base_eval_loss: float | None = None
    """Held-out loss before the first step; None without evaluation data."""
    eval_loss: float | None = None
    """Newest held-out loss."""
    resumed_from_step: int | None = None
    """The checkpoint that this attempt started from; 0 for a fresh start, None until known."""
    last_checkpoint_step: int | None = None
    last_checkpoint_time: datetime | None = None
    model_revision: str | None = None
    """The commit that an `hf://` model was resolved to."""
    heartbeat_time: datetime
    metrics: list[MetricReport] = []


class TerminationReport(ApiModel):
    """The container's termination message: JSON, at most 4 KiB."""

    reason: Reason | None = None
    """None after success."""
    message: str = Field(default="", max_length=1500)
    rank: int | None = None
    traceback: str = Field(default="", max_length=TRACEBACK_LIMIT)
    step: int = 0
    total_steps: int | None = None
    resumed_from_step: int | None = None
    last_checkpoint_step: int | None = None
    loss: float | None = None
    base_eval_loss: float | None = None
    eval_loss: float | None = None
    model_revision: str | None = None
    metrics: list[MetricReport] = []
