"""Suspension: the attempt's Job is deleted, its pods save a checkpoint and leave."""

from finetune_api.reasons import Reason
from finetune_api.status import ConditionType, State
from finetune_operator.core.attempts import absorb_reports, closed
from finetune_operator.core.conditions import is_true, put
from finetune_operator.core.failures import Cause
from finetune_operator.core.lifecycle import observed_generation
from finetune_operator.core.progress import halted, take_all
from finetune_operator.core.situation import Action, Delete, Event, Kind, Plan, Situation

REASON = "Suspended"


def suspended(s: Situation) -> Plan | None:
    """No attempt runs while `spec.suspend` is set. Active time stands still: `startTime` is cleared, as for a batch Job."""
    if not s.job.spec.suspend:
        return None
    status = s.status
    if s.attempt is not None:
        cause = Cause(Reason.SUSPENDED, "spec.suspend was set.")
        status = closed(take_all(status, s.observed, s.now), cause, s.now)
    status = halted(absorb_reports(status, s.observed))  # pods tell how far they came after they were told to leave
    actions: list[Action] = [Delete(Kind.JOB, c.name, c.uid) for c in s.observed.jobs if not c.deleting]
    message = _message(s.with_status(status))
    events: tuple[Event, ...] = ()
    if not is_true(status, ConditionType.SUSPENDED):
        events = (Event("Normal", REASON, "The job is suspended; its pods save a checkpoint and leave."),)
    for other in (ConditionType.RUNNING, ConditionType.RESTARTING):
        if is_true(status, other):
            status = put(status, s.job, s.now, other, False, REASON, "spec.suspend was set.")
    status = put(status, s.job, s.now, ConditionType.SUSPENDED, True, REASON, "spec.suspend was set.")
    status = status.model_copy(
        update={"state": State.SUSPENDED, "reason": REASON, "message": message, "start_time": None}
    )
    return Plan(observed_generation(status, s.job), tuple(actions), events)


def _message(s: Situation) -> str:
    go_on = "Set spec.suspend: false to go on"
    if not s.status.attempts:
        return f"Not started. {go_on}."
    if any(not pod.ended for pod in s.observed.pods):
        return "The pods are saving a checkpoint and leaving."
    checkpoint = s.status.last_checkpoint
    return f"{go_on} from step {checkpoint.step}." if checkpoint else f"{go_on}."
