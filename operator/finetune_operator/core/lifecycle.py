"""The turning points of a job: an attempt begins (or is found to have begun) or is interrupted, a job ends."""

from datetime import datetime

from finetune_api.job import FineTuneJob
from finetune_api.reasons import Reason
from finetune_api.status import MESSAGE_LIMIT, ConditionType, FineTuneJobStatus, State
from finetune_operator.core.attempts import closed, current, opened, previous_end, replace_last
from finetune_operator.core.conditions import is_true, put
from finetune_operator.core.failures import Cause
from finetune_operator.core.progress import take_all
from finetune_operator.core.resolve import choose, made_from_another
from finetune_operator.core.situation import Situation


def begin(s: Situation, number: int, time: datetime) -> FineTuneJobStatus:
    """The status in which attempt `number` has begun; the newest attempt, if any, has ended."""
    last, plan = current(s.status), choose(s.current_job, s.config)
    status = opened(s.status, number, plan.world_size, time)
    status = status.model_copy(
        update={
            "start_time": time if status.start_time is None else status.start_time,
            "plan": plan,
        }
    )
    status = resumed(status, s.job, time)
    if last is not None and last.reason is not None and last.reason != Reason.SUSPENDED:
        message = f"Attempt {last.number} ended: {last.message}"
        status = put(status, s.job, time, ConditionType.RESTARTING, True, last.reason, message)
    return status


def resumed(status: FineTuneJobStatus, job: FineTuneJob, time: datetime) -> FineTuneJobStatus:
    """The status of a job that is not suspended any more; of one that never was, as it is."""
    return put(status, job, time, ConditionType.SUSPENDED, False, "Resumed", "The job was resumed.")


def adopt(s: Situation) -> Situation:
    """Takes over attempts whose Jobs are there but not in status: an operator died in between."""
    for child in sorted(s.observed.jobs, key=lambda j: j.attempt):
        last = current(s.status)
        if child.attempt <= (last.number if last else 0):
            continue
        if last is not None and last.end_time is None:
            ended = [*s.status.attempts[:-1], previous_end(child, last)]
            s = s.with_status(s.status.model_copy(update={"attempts": ended}))
        status = begin(s, child.attempt, child.created_at)
        if made_from_another(child, s.job.spec.trainer):
            status = replace_last(status, world_size=None)  # the spec that it was made from is gone
        s = s.with_status(status)
    return s


def interrupt(s: Situation, why: str) -> FineTuneJobStatus:
    """The status in which no attempt runs, because a user wants it so."""
    status = s.status
    if s.attempt is not None:
        status = closed(take_all(status, s.observed, s.now), Cause(Reason.SUSPENDED, why), s.now)
    for kind in (ConditionType.RUNNING, ConditionType.RESTARTING):
        if is_true(status, kind):
            status = put(status, s.job, s.now, kind, False, Reason.SUSPENDED, why)
    return status


def finish(s: Situation, kind: ConditionType, reason: str, message: str) -> FineTuneJobStatus:
    """The status of a job that is Complete or Failed from now on."""
    job, now, status = s.job, s.now, s.status
    for other in (ConditionType.RUNNING, ConditionType.RESTARTING, ConditionType.SUSPENDED):
        if is_true(status, other):
            status = put(status, job, now, other, False, reason, "The job has finished.")
    status = put(status, job, now, kind, True, reason, message)
    status = status.model_copy(
        update={
            "state": State.COMPLETE if kind is ConditionType.COMPLETE else State.FAILED,
            "reason": reason,
            "message": message[:MESSAGE_LIMIT],
            "completion_time": now,
        }
    )
    return observed_generation(status, job)


def observed_generation(status: FineTuneJobStatus, job: FineTuneJob) -> FineTuneJobStatus:
    """The status with the generation of the spec that it answers to; `kubectl wait` wants it in each condition too."""
    generation = job.metadata.generation
    if status.observed_generation == generation:
        return status
    conditions = [c.model_copy(update={"observed_generation": generation}) for c in status.conditions]
    return status.model_copy(update={"conditions": conditions, "observed_generation": generation})
