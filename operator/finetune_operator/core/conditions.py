"""Conditions of a FineTuneJob: changed only where they differ, so that `lastTransitionTime` tells the truth."""

from datetime import datetime

from finetune_api.job import FineTuneJob
from finetune_api.status import MESSAGE_LIMIT, Condition, ConditionType, FineTuneJobStatus


def find(status: FineTuneJobStatus, kind: ConditionType) -> Condition | None:
    return next((c for c in status.conditions if c.type == kind.value), None)


def is_true(status: FineTuneJobStatus, kind: ConditionType) -> bool:
    condition = find(status, kind)
    return condition is not None and condition.status == "True"


def is_finished(status: FineTuneJobStatus) -> bool:
    """Complete or Failed: nothing starts again."""
    return is_true(status, ConditionType.COMPLETE) or is_true(status, ConditionType.FAILED)


def put(
    status: FineTuneJobStatus,
    job: FineTuneJob,
    now: datetime,
    kind: ConditionType,
    value: bool,
    reason: str,
    message: str,
    *,
    always: bool = False,
) -> FineTuneJobStatus:
    """A copy with the condition set. One that was never true is written as false only with `always`."""
    old = find(status, kind)
    if old is None and not value and not always:
        return status
    text = "True" if value else "False"
    message = message[:MESSAGE_LIMIT]
    if old is not None and (old.status, old.reason, old.message) == (text, reason, message):
        return status
    new = Condition(
        type=kind.value,
        status="True" if value else "False",
        reason=reason,
        message=message,
        last_transition_time=old.last_transition_time if old is not None and old.status == text else now,
        observed_generation=job.metadata.generation,
    )
    conditions = [new if c.type == kind.value else c for c in status.conditions]
    return status.model_copy(update={"conditions": conditions if old is not None else [*conditions, new]})
