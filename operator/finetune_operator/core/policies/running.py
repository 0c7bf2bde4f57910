"""An attempt runs: status says how it is, and what is left of older attempts is removed."""

from finetune_api.status import MESSAGE_LIMIT, ConditionType
from finetune_operator.core.attempts import absorb_reports
from finetune_operator.core.conditions import is_true, put
from finetune_operator.core.lifecycle import observed_generation
from finetune_operator.core.observe import ObservedPod
from finetune_operator.core.policies.deadline import deadline_time
from finetune_operator.core.progress import is_due, take_report
from finetune_operator.core.situation import Delete, Kind, Plan, Situation
from finetune_operator.core.view import pods_are_late, seconds_until_late, view_gang


def running(s: Situation) -> Plan | None:
    """The last policy: always answers."""
    attempt, report, status = s.attempt, s.observed.progress, absorb_reports(s.status, s.observed)
    assert attempt is not None
    if report is not None and report.attempt == attempt.number and is_due(status, report, s.now, s.config):
        status = take_report(status, report, s.now)
    described = describe(s.with_status(status), s.gang)
    old = tuple(
        Delete(Kind.JOB, c.name, c.uid) for c in s.observed.jobs if c.attempt < attempt.number and not c.deleting
    )
    return Plan(described.status, old, requeue_after=described.requeue_after)


def describe(s: Situation, gang: tuple[ObservedPod, ...]) -> Plan:
    """The status of a job whose attempt runs with these pods."""
    view, status = view_gang(s, gang), s.status
    if view.gang_runs:
        if is_true(status, ConditionType.RESTARTING):
            status = put(status, s.job, s.now, ConditionType.RESTARTING, False, "GangRunning", "The new gang runs.")
        pods = "The pod runs." if s.num_nodes == 1 else f"All {s.num_nodes} pods run."
        status = put(status, s.job, s.now, ConditionType.RUNNING, True, "GangRunning", pods)
    else:
        status = put(status, s.job, s.now, ConditionType.RUNNING, False, view.reason, view.message, always=True)
    status = status.model_copy(
        update={"state": view.state, "reason": view.reason, "message": view.message[:MESSAGE_LIMIT]}
    )
    end = deadline_time(s)
    waits = [s.seconds_until(end)] if end else []
    if len({pod.index for pod in gang}) < s.num_nodes and not pods_are_late(s, gang):
        waits.append(seconds_until_late(s))
    return Plan(observed_generation(status, s.job), requeue_after=min(waits, default=None))
