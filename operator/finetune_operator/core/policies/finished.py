"""Finished jobs: never started again, deleted after their TTL, and left without running pods."""

from datetime import timedelta

from finetune_operator.core.conditions import is_finished
from finetune_operator.core.lifecycle import observed_generation
from finetune_operator.core.situation import Action, Delete, Kind, Plan, Situation


def finished(s: Situation) -> Plan | None:
    """The status stays as it is, but for the generation that it has seen, whatever happens to children or spec."""
    if not is_finished(s.job.status):
        return None
    ended = s.job.status.completion_time or s.now
    actions: list[Action] = []
    waits: list[float] = []
    ttl = s.job.spec.ttl_seconds_after_finished
    if ttl is not None:
        left = s.seconds_until(ended + timedelta(seconds=ttl))
        if left <= 0:
            return Plan(s.job.status, (Delete(Kind.FINE_TUNE_JOB, s.job.metadata.name, s.job.metadata.uid),))
        waits.append(left)
    for child in s.observed.jobs:
        # A Job with a failed pod ends its other pods by itself, and keeps those that ended for `kubectl logs`.
        alive = any(not pod.ended and not pod.deleting for pod in s.observed.gang(child.attempt))
        if alive and not child.ended and not child.deleting:
            left = s.seconds_until(ended + timedelta(seconds=s.config.leftover_seconds))
            if left <= 0:
                actions.append(Delete(Kind.JOB, child.name, child.uid))
            else:
                waits.append(left)
    return Plan(observed_generation(s.job.status, s.job), tuple(actions), requeue_after=min(waits, default=None))
