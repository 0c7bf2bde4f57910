"""`spec.activeDeadlineSeconds`: the job is Failed when it has been active so long, counted anew after a suspension."""

from datetime import datetime, timedelta

from finetune_api.reasons import FAILURES, Reason
from finetune_api.status import ConditionType
from finetune_operator.core.attempts import closed
from finetune_operator.core.failures import Cause
from finetune_operator.core.lifecycle import finish
from finetune_operator.core.progress import take_all
from finetune_operator.core.situation import Delete, Event, Kind, Plan, Situation


def deadline_time(s: Situation) -> datetime | None:
    """When the job's active time is over; None without a limit or before it was started."""
    limit, start = s.job.spec.active_deadline_seconds, s.status.start_time
    return start + timedelta(seconds=limit) if limit is not None and start is not None else None


def deadline(s: Situation) -> Plan | None:
    """All pods go; the checkpoints stay."""
    end = deadline_time(s)
    if end is None or s.seconds_until(end) > 0:
        return None
    reason = Reason.DEADLINE_EXCEEDED
    text = f"The job was active for {s.job.spec.active_deadline_seconds} s, its limit."
    status = s.status
    if s.attempt is not None:
        status = closed(take_all(status, s.observed, s.now), Cause(reason, text), s.now)
    message = f"{text} {FAILURES[reason].hint}"
    status = finish(s.with_status(status), ConditionType.FAILED, reason, message)
    deletes = tuple(Delete(Kind.JOB, c.name, c.uid) for c in s.observed.jobs if not c.deleting)
    return Plan(status, deletes, (Event("Warning", reason, message),), s.job.spec.ttl_seconds_after_finished)
