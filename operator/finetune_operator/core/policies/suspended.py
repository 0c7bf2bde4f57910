"""Suspension: the attempt's Job is deleted, its pods save a checkpoint and leave."""

from finetune_api.status import ConditionType, State
from finetune_operator.core.attempts import absorb_reports, current
from finetune_operator.core.conditions import is_true, put
from finetune_operator.core.lifecycle import interrupt, observed_generation
from finetune_operator.core.policies.start import seconds_to_wait_for_old_pods
from finetune_operator.core.progress import halted
from finetune_operator.core.situation import Delete, Event, Kind, Plan, Situation

REASON = "Suspended"
_WHY = "spec.suspend was set."


def suspended(s: Situation) -> Plan | None:
    """No attempt runs while `spec.suspend` is set. `startTime` is cleared, as for a batch Job: active time begins anew."""
    if not s.job.spec.suspend:
        return None
    # Pods tell how far they came after they were told to leave.
    status = halted(absorb_reports(interrupt(s, _WHY), s.observed))
    deletes = tuple(Delete(Kind.JOB, c.name, c.uid) for c in s.observed.jobs if not c.deleting)
    last = current(status)
    leaving = seconds_to_wait_for_old_pods(s, last) if last is not None else 0.0
    message = _message(s.with_status(status), leaving > 0)
    events: tuple[Event, ...] = ()
    if not is_true(status, ConditionType.SUSPENDED):
        events = (Event("Normal", REASON, "The job is suspended; its pods save a checkpoint and leave."),)
    status = put(status, s.job, s.now, ConditionType.SUSPENDED, True, REASON, _WHY)
    status = status.model_copy(
        update={"state": State.SUSPENDED, "reason": REASON, "message": message, "start_time": None}
    )
    return Plan(observed_generation(status, s.job), deletes, events, leaving if leaving > 0 else None)


def _message(s: Situation, leaving: bool) -> str:
    go_on = "Set spec.suspend: false to go on"
    if not s.status.attempts:
        return f"Not started. {go_on}."
    if leaving:
        return "The pods are saving a checkpoint and leaving."
    checkpoint = s.status.last_checkpoint
    return f"{go_on} from step {checkpoint.step}." if checkpoint else f"{go_on}."
