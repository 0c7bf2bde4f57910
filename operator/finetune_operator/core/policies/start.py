"""Starts an attempt: the first, one after a failure (perhaps after a wait), or one after a suspension."""

from datetime import timedelta

from finetune_api.reasons import Reason
from finetune_api.status import MESSAGE_LIMIT, AttemptStatus, ConditionType, FineTuneJobStatus, State
from finetune_api.words import say_ranks
from finetune_operator.core.attempts import absorb_reports, current, next_number, restart_delay
from finetune_operator.core.build import build_attempt
from finetune_operator.core.conditions import put
from finetune_operator.core.lifecycle import begin, observed_generation, resumed
from finetune_operator.core.names import attempt_name
from finetune_operator.core.policies.deadline import deadline_time
from finetune_operator.core.policies.running import describe
from finetune_operator.core.resolve import choose, resolve
from finetune_operator.core.situation import Action, Apply, Delete, Event, Kind, Plan, Situation
from finetune_operator.core.view import duration, sentence


def start(s: Situation, events: tuple[Event, ...] = ()) -> Plan | None:
    """Starts the next attempt, or says what it waits for."""
    if s.attempt is not None:
        return None
    s = s.with_status(absorb_reports(s.status, s.observed))  # old pods tell how far they came until they left
    last = current(s.status)
    if last is not None and last.reason == Reason.SUSPENDED:
        left = seconds_to_wait_for_old_pods(s, last)
        if left > 0:
            return _wait_for_old_pods(s, last, left)
        events = (*events, _resumed(s))
    elif last is not None and last.end_time is not None:
        delay = restart_delay(s.status, s.config)
        left = s.seconds_until(last.end_time + delay)
        if left > 0:
            status = waiting(s, last, round(delay.total_seconds()))
            end = deadline_time(s)
            return Plan(status, events=events, requeue_after=min(left, s.seconds_until(end)) if end else left)
    return _start(s, last, events)


def _start(s: Situation, last: AttemptStatus | None, events: tuple[Event, ...]) -> Plan:
    number = next_number(s.status)
    job = s.current_job
    resolved = resolve(job, number, s.config)
    objects = build_attempt(job, resolved, s.config, last.to_json() if last else None)
    name = attempt_name(job.metadata.name, number)
    actions: list[Action] = [
        Apply(Kind.CONFIG_MAP, name, objects.configmap),
        Apply(Kind.SERVICE, name, objects.service),
        Apply(Kind.JOB, name, objects.job),
    ]
    if last is not None:
        actions += delete_attempt(s, last.number)
    status = begin(s, number, s.now)
    described = describe(s.with_status(status), gang=())
    return Plan(described.status, tuple(actions), events, described.requeue_after)


def _resumed(s: Situation) -> Event:
    """Tells a change of `spec.trainer` as the number of ranks, which is what the training sees of it."""
    before, after = s.status.plan, choose(s.current_job, s.config)
    text = f"Attempt {next_number(s.status)} goes on from the last checkpoint"
    if before is not None and before.world_size != after.world_size:
        text += f", on {say_ranks(after.world_size)} instead of {before.world_size}"
    return Event("Normal", "Resumed", f"{text}.")


def delete_attempt(s: Situation, number: int) -> list[Action]:
    """Removes the objects of an attempt that is over."""
    name, child = attempt_name(s.job.metadata.name, number), s.observed.job(number)
    job = [Delete(Kind.JOB, child.name, child.uid)] if child is not None else []
    return [*job, Delete(Kind.SERVICE, name), Delete(Kind.CONFIG_MAP, name)]


def waiting(s: Situation, last: AttemptStatus, delay_seconds: int) -> FineTuneJobStatus:
    """Between two attempts."""
    reason = last.reason or ""
    counted, limit = (s.status.counted_restarts or 0) + 1, s.job.spec.recovery.backoff_limit
    count = f"restart {counted} of at most {limit}" if last.counted else "the next attempt"
    message = f"{sentence(last.message or '')} Waiting {duration(delay_seconds)} before {count}."[:MESSAGE_LIMIT]
    status = put(s.status, s.job, s.now, ConditionType.RUNNING, False, reason, message)
    status = resumed(status, s.job, s.now)
    status = put(status, s.job, s.now, ConditionType.RESTARTING, True, reason, message)
    status = status.model_copy(update={"state": State.RESTARTING, "reason": reason, "message": message})
    return observed_generation(status, s.job)


def seconds_to_wait_for_old_pods(s: Situation, last: AttemptStatus) -> float:
    """0 once the pods of a suspended attempt have left, or could have: those on a lost node never do."""
    gone = all(pod.ended for pod in s.observed.gang(last.number))
    if gone or last.end_time is None:
        return 0.0
    limit = timedelta(seconds=s.config.termination_grace_seconds + s.config.leftover_seconds)
    return s.seconds_until(last.end_time + limit)


def _wait_for_old_pods(s: Situation, last: AttemptStatus, left: float) -> Plan:
    """After a suspension the old pods may still be saving: what they save is what the new ones go on from."""
    message = f"The pods of attempt {last.number} are still saving a checkpoint and leaving; then the job goes on."
    status = resumed(s.status, s.job, s.now)
    status = status.model_copy(update={"state": State.PENDING, "reason": "Resuming", "message": message})
    child = s.observed.job(last.number)
    deletes = (Delete(Kind.JOB, child.name, child.uid),) if child is not None and not child.deleting else ()
    return Plan(observed_generation(status, s.job), deletes, requeue_after=left)
