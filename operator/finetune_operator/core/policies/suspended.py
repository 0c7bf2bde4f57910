"""Suspension: the attempt's Job is deleted, its pods save a checkpoint and leave."""

from finetune_api.status import ConditionType, State
from finetune_operator.core.attempts import absorb_reports, next_number
from finetune_operator.core.conditions import is_true, put
from finetune_operator.core.lifecycle import interrupt, observed_generation
from finetune_operator.core.names import attempt_name
from finetune_operator.core.progress import halted
from finetune_operator.core.refused import REASON as REFUSED
from finetune_operator.core.situation import Action, Delete, Event, Kind, Plan, Situation

REASON = "Suspended"
_WHY = "spec.suspend was set."


def suspended(s: Situation) -> Plan | None:
    """No attempt runs while `spec.suspend` is set. Active time stands still: `startTime` is cleared, as for a batch Job."""
    if not s.job.spec.suspend:
        return None
    # Pods tell how far they came after they were told to leave.
    status = halted(absorb_reports(interrupt(s, _WHY), s.observed))
    actions: list[Action] = [Delete(Kind.JOB, c.name, c.uid) for c in s.observed.jobs if not c.deleting]
    if status.reason == REFUSED:
        # Of an attempt that could not be started, the ConfigMap may be there. It is immutable, and the spec may change now.
        actions.append(Delete(Kind.CONFIG_MAP, attempt_name(s.job.metadata.name, next_number(status))))
    message = _message(s.with_status(status))
    events: tuple[Event, ...] = ()
    if not is_true(status, ConditionType.SUSPENDED):
        events = (Event("Normal", REASON, "The job is suspended; its pods save a checkpoint and leave."),)
    status = put(status, s.job, s.now, ConditionType.SUSPENDED, True, REASON, _WHY)
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
