"""Success: every pod of the gang succeeded."""

from finetune_api.status import ConditionType, ProgressStatus
from finetune_operator.core.attempts import absorb_reports, replace_last
from finetune_operator.core.failures import parse_report
from finetune_operator.core.lifecycle import finish
from finetune_operator.core.progress import take_result
from finetune_operator.core.situation import Event, Plan, Situation

REASON = "Complete"


def complete(s: Situation) -> Plan | None:
    """The job is Complete, with the result that rank 0 left in its termination message."""
    if s.attempt is None or not _succeeded(s):
        return None
    status = absorb_reports(s.status, s.observed)
    report = next((parse_report(pod) for pod in s.gang if pod.index == 0 and pod.ended), None)
    if report is not None:
        status = take_result(status, report, s.now)
    status = replace_last(status, end_time=s.now, lost_steps=0)
    message = _message(s.with_status(status), report.message if report is not None else "")
    status = finish(s.with_status(status), ConditionType.COMPLETE, REASON, message)
    return Plan(status, events=(Event("Normal", REASON, message),), requeue_after=_ttl(s))


def _succeeded(s: Situation) -> bool:
    done = {pod.index for pod in s.gang if pod.succeeded}
    if len(done) == s.num_nodes:
        return True
    # The Job may be seen to be complete before its pods are: rank 0's last message is waited for.
    waits = any(not pod.ended for pod in s.gang)
    return s.child is not None and s.child.complete and not waits


def _message(s: Situation, note: str) -> str:
    """The result, what the trainer has to say about it, and where it is."""
    result = _result(s.status.progress) if s.status.progress is not None else ""
    return " ".join(filter(None, [result, note, f"Output: {s.job.spec.output.uri}"]))


def _result(progress: ProgressStatus) -> str:
    steps = f"{progress.step} steps"
    if progress.base_eval_loss is not None and progress.eval_loss is not None:
        return f"Held-out loss {progress.base_eval_loss} before, {progress.eval_loss} after {steps}."
    return f"Trained {steps}." if progress.loss is None else f"Training loss {progress.loss} after {steps}."


def _ttl(s: Situation) -> float | None:
    ttl = s.job.spec.ttl_seconds_after_finished
    return float(ttl) if ttl is not None else None
