"""An attempt ended without success: the job fails, or the next attempt follows."""

from finetune_api.reasons import FAILURES, Reason, Recovery
from finetune_api.status import ConditionType
from finetune_operator.core.attempts import closed
from finetune_operator.core.failures import Cause, first_cause
from finetune_operator.core.lifecycle import finish
from finetune_operator.core.policies.start import start
from finetune_operator.core.progress import take_all
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
    return start(s, (Event("Warning", cause.reason, ended),))


def _fail(s: Situation, reason: Reason, message: str) -> Plan:
    status = finish(s, ConditionType.FAILED, reason, message)
    return Plan(status, events=(Event("Warning", reason, message),), requeue_after=float(s.config.leftover_seconds))


def _out_of_restarts(cause: Cause, counted: int, limit: int) -> str:
    failures = "1 failure" if counted == 0 else f"{counted + 1} failures"
    text = f"{failures}, recovery.backoffLimit is {limit}. The last one, {cause.reason}: {sentence(cause.message)}"
    return f"{text} {cause.hint} {FAILURES[Reason.BACKOFF_LIMIT_EXCEEDED].hint}"
