"""An attempt ended without success: the job fails, or the next attempt follows."""

from finetune_api.reasons import FAILURES, Reason, Recovery
from finetune_api.status import ConditionType
from finetune_operator.core.attempts import closed
from finetune_operator.core.failures import Cause, first_cause
from finetune_operator.core.lifecycle import finish
from finetune_operator.core.policies.start import delete_attempt, start, waiting
from finetune_operator.core.progress import take_all
from finetune_operator.core.refused import REASON as REFUSED
from finetune_operator.core.situation import Event, Plan, Situation
from finetune_operator.core.view import sentence


def failed(s: Situation) -> Plan | None:
    """Decides by the first cause. Nothing is waited for: the new gang starts while the old one goes."""
    attempt = s.attempt
    if attempt is None:
        return None
    cause = first_cause(s.gang, s.child)
    if cause is None:
        return None
    status = closed(take_all(s.status, s.observed, s.now), cause, s.now)
    s = s.with_status(status)
    counted, limit = status.counted_restarts or 0, s.job.spec.recovery.backoff_limit
    if cause.recovery is Recovery.FAIL:
        return _fail(s, cause.reason, f"{sentence(cause.message)} {cause.hint}")
    if cause.recovery is Recovery.RESTART and counted >= limit:
        return _fail(s, Reason.BACKOFF_LIMIT_EXCEEDED, _out_of_restarts(cause, counted, limit))
    place = f" at step {status.attempts[-1].to_step}" if status.attempts[-1].to_step is not None else ""
    ended = f"Attempt {attempt.number} ended{place}: {cause.message}"
    events = (Event("Warning", cause.reason, ended),)
    if s.job.status.reason == REFUSED:
        # A quota of objects may be what is in the next attempt's way: this one's go first, once its end is written down.
        return Plan(waiting(s, status.attempts[-1], 0), tuple(delete_attempt(s, attempt.number)), events, 0.0)
    return start(s, events)


def _fail(s: Situation, reason: Reason, message: str) -> Plan:
    status = finish(s, ConditionType.FAILED, reason, message)
    ttl = s.job.spec.ttl_seconds_after_finished
    waits = [s.config.leftover_seconds] if ttl is None else [s.config.leftover_seconds, ttl]
    return Plan(status, events=(Event("Warning", reason, message),), requeue_after=float(min(waits)))


def _out_of_restarts(cause: Cause, counted: int, limit: int) -> str:
    failures = "1 failure" if counted == 0 else f"{counted + 1} failures"
    text = f"{failures}, recovery.backoffLimit is {limit}. The last one, {cause.reason}: {sentence(cause.message)}"
    return f"{text} {cause.hint} {FAILURES[Reason.BACKOFF_LIMIT_EXCEEDED].hint}"
