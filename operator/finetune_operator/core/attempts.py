"""Bookkeeping of attempts: which ended how, how far each came, and how long to wait before the next."""

from datetime import datetime, timedelta

from pydantic import ValidationError

from finetune_api.reasons import Reason, Recovery
from finetune_api.status import MAX_ATTEMPTS_KEPT, MESSAGE_LIMIT, AttemptStatus, CheckpointStatus, FineTuneJobStatus
from finetune_operator.core.failures import Cause, parse_report
from finetune_operator.core.observe import Observed, ObservedJob
from finetune_operator.core.settings import PlanConfig


def current(status: FineTuneJobStatus) -> AttemptStatus | None:
    """The newest attempt, running or ended."""
    return status.attempts[-1] if status.attempts else None


def next_number(status: FineTuneJobStatus) -> int:
    """The number of the attempt that is started next."""
    return status.attempts[-1].number + 1 if status.attempts else 1


def replace_last(status: FineTuneJobStatus, **changes: object) -> FineTuneJobStatus:
    """A copy in which the newest attempt has changed."""
    last = status.attempts[-1].model_copy(update=changes)
    return status.model_copy(update={"attempts": [*status.attempts[:-1], last]})


def opened(status: FineTuneJobStatus, number: int, world_size: int, now: datetime) -> FineTuneJobStatus:
    """A copy in which attempt `number` has begun, with the restart counters that follow from how the last one ended."""
    last = current(status)
    restarts, counted = status.restarts or 0, status.counted_restarts or 0
    if last is not None and last.reason != Reason.SUSPENDED:
        restarts += 1
        counted += 1 if last.counted else 0
    new = AttemptStatus(number=number, world_size=world_size, start_time=now)
    attempts = [*status.attempts, new][-MAX_ATTEMPTS_KEPT:]
    return status.model_copy(update={"attempts": attempts, "restarts": restarts, "counted_restarts": counted})


def closed(status: FineTuneJobStatus, cause: Cause, now: datetime) -> FineTuneJobStatus:
    """A copy in which the newest attempt has ended with `cause`."""
    last = status.attempts[-1]
    saved = status.last_checkpoint.step if status.last_checkpoint else last.from_step
    lost = max(0, last.to_step - saved) if last.to_step is not None and saved is not None else None
    return replace_last(
        status,
        reason=cause.reason.value,
        message=cause.message[:MESSAGE_LIMIT],
        pod=cause.pod,
        traceback=cause.traceback or None,
        exit_code=cause.exit_code,
        counted=cause.recovery is Recovery.RESTART,
        end_time=now,
        lost_steps=lost,
    )


def previous_end(job: ObservedJob, last: AttemptStatus) -> AttemptStatus:
    """How attempt `last` ended, as the Job that replaced it tells; nothing is guessed from pods that may be gone."""
    if job.previous_end is not None:
        try:
            end = AttemptStatus.model_validate_json(job.previous_end)
        except ValidationError:
            end = None
        if end is not None and end.number == last.number:
            return end
    cause = Cause(Reason.POD_DELETED, "It was replaced; why is not known.")
    return last.model_copy(
        update={"reason": cause.reason.value, "message": cause.message, "counted": False, "end_time": job.created_at}
    )


def absorb_reports(status: FineTuneJobStatus, observed: Observed) -> FineTuneJobStatus:
    """Takes over how far each attempt came from what its pods' last messages say; what is known is never lowered."""
    for number in sorted({pod.attempt for pod in observed.pods}):
        reports = [report for pod in observed.gang(number) if (report := parse_report(pod)) is not None]
        for report in reports:
            status = absorb(
                status,
                number,
                step=report.step,
                resumed_from=report.resumed_from_step,
                checkpoint=report.last_checkpoint_step,
                checkpoint_time=None,
                model_revision=report.model_revision,
            )
    return status


def absorb(
    status: FineTuneJobStatus,
    number: int,
    *,
    step: int | None,
    resumed_from: int | None,
    checkpoint: int | None,
    checkpoint_time: datetime | None,
    model_revision: str | None,
) -> FineTuneJobStatus:
    """Takes over one report about attempt `number`: steps only rise, the model's revision is kept from the first on."""
    attempts = list(status.attempts)
    updates: dict[str, object] = {}
    for i, attempt in enumerate(attempts):
        if attempt.number == number:
            changes: dict[str, object] = {}
            if resumed_from is not None and attempt.from_step is None:
                changes["from_step"] = resumed_from
            if step is not None and step > (attempt.to_step if attempt.to_step is not None else -1):
                changes["to_step"] = step
            if changes:
                attempts[i] = attempt.model_copy(update=changes)
                updates["attempts"] = attempts
        elif attempt.number == number - 1 and resumed_from is not None and attempt.to_step is not None:
            lost = max(0, attempt.to_step - resumed_from)
            if lost != attempt.lost_steps:
                attempts[i] = attempt.model_copy(update={"lost_steps": lost})
                updates["attempts"] = attempts
    last = status.last_checkpoint
    if checkpoint is not None and (last is None or checkpoint > last.step):
        updates["last_checkpoint"] = CheckpointStatus(step=checkpoint, time=checkpoint_time)
    if model_revision and status.plan is not None and status.plan.model_revision is None:
        updates["plan"] = status.plan.model_copy(update={"model_revision": model_revision})
    return status.model_copy(update=updates) if updates else status


def restart_delay(status: FineTuneJobStatus, config: PlanConfig) -> timedelta:
    """How long after the end of the newest attempt the next may start.

    Nothing the first time; then base, doubled for each further attempt in a row that made no progress, up to the cap. A hub
    that does not answer is waited for from the first time on.
    """
    fruitless = 0
    for attempt in reversed(status.attempts):
        progressed = attempt.to_step is not None and attempt.to_step > (attempt.from_step or 0)
        if attempt.reason in (None, Reason.SUSPENDED) or progressed:
            break
        fruitless += 1
    if status.attempts and status.attempts[-1].reason == Reason.HUB_UNAVAILABLE:
        fruitless += 1
    if fruitless < 2:
        return timedelta(0)
    # The exponent is bounded, since nothing else bounds the integer.
    seconds = config.backoff_base_seconds * 2 ** min(fruitless - 2, 16)
    return timedelta(seconds=min(seconds, config.backoff_cap_seconds))
