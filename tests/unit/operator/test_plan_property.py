"""Planning again on what a plan has made changes nothing; what is finished stays finished; a job gone is left alone."""

from dataclasses import replace
from datetime import timedelta

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_api.reasons import FAILURES, Reason
from finetune_api.reports import Activity, ProgressReport, TerminationReport
from finetune_api.status import State
from finetune_operator.core.conditions import is_finished
from finetune_operator.core.lifecycle import observed_generation
from finetune_operator.core.observe import ObservedPod, Terminated, Waiting
from finetune_operator.core.resolve import trainer_digest
from finetune_operator.core.situation import Apply
from finetune_operator.shell.patch import merge_patch
from tests.unit.operator.samples import NOW, World, child, make_job, pod, seconds

TRAINER_REASONS = [reason for reason, row in FAILURES.items() if row.exit_code is not None]


@st.composite
def reports(draw: st.DrawFn) -> str:
    kind = draw(st.sampled_from(["none", "log", "report"]))
    if kind != "report":
        return "" if kind == "none" else "Traceback (most recent call last):\nValueError: no"
    return TerminationReport(
        reason=draw(st.sampled_from([None, *TRAINER_REASONS])),
        message=draw(st.sampled_from(["", "it broke"])),
        step=draw(st.integers(0, 50)),
        total_steps=draw(st.sampled_from([None, 50])),
        resumed_from_step=draw(st.sampled_from([None, 0, 10])),
        last_checkpoint_step=draw(st.sampled_from([None, 10, 20])),
        base_eval_loss=draw(st.sampled_from([None, 1.5])),
        eval_loss=draw(st.sampled_from([None, 1.25])),
        model_revision=draw(st.sampled_from([None, "abc123"])),
    ).to_json()


@st.composite
def pods(draw: st.DrawFn, attempt: int, index: int) -> ObservedPod:
    shape = draw(st.sampled_from(["pending", "unschedulable", "pull", "starting", "running", "ended", "lost"]))
    scheduled = shape not in ("pending", "unschedulable")
    made = pod(attempt, index, phase="Pending", running=False, scheduled=scheduled, node="node-0" if scheduled else "")
    if shape == "unschedulable":
        made = replace(made, unschedulable="0/2 nodes are available: 2 Insufficient cpu. preemption: none.")
    elif shape == "pull":
        reason = draw(st.sampled_from(["ErrImagePull", "ImagePullBackOff", "CreateContainerConfigError"]))
        made = replace(made, waiting=Waiting(reason, "not found"))
    elif shape == "running":
        made = replace(made, phase="Running", running=True)
    elif shape == "ended":
        code = draw(st.sampled_from([0, 1, 81, 87, 90, 137, 143]))
        why = draw(st.sampled_from(["Error", "OOMKilled"])) if code else "Completed"
        end = Terminated(code, why, draw(reports()), NOW + seconds(draw(st.integers(0, 5))))
        made = replace(
            made, phase=draw(st.sampled_from(["Running", "Succeeded" if code == 0 else "Failed"])), terminated=end
        )
    elif shape == "lost":
        made = replace(made, phase="Failed", reason=draw(st.sampled_from(["Evicted", "NodeLost", "OutOfcpu"])))
    if draw(st.booleans()) and draw(st.booleans()):
        made = replace(made, delete_time=NOW)
        if draw(st.booleans()):
            reason = draw(st.sampled_from(["EvictionByEvictionAPI", "DeletionByTaintManager", "PreemptionByScheduler"]))
            made = replace(made, disruption=reason)
    return made


@st.composite
def progresses(draw: st.DrawFn, attempt: int) -> ProgressReport:
    return ProgressReport(
        attempt=attempt,
        activity=draw(st.sampled_from(list(Activity))),
        step=draw(st.integers(0, 60)),
        total_steps=draw(st.sampled_from([None, 60])),
        loss=draw(st.sampled_from([None, 1.0, float("nan")])),
        eta_seconds=draw(st.sampled_from([None, 12.5, 4000.0])),
        resumed_from_step=draw(st.sampled_from([None, 0, 10])),
        last_checkpoint_step=draw(st.sampled_from([None, 10, 30])),
        model_revision=draw(st.sampled_from([None, "abc123"])),
        heartbeat_time=NOW,
    )


@st.composite
def disturb(draw: st.DrawFn, world: World) -> None:
    """Something happens in the cluster."""
    attempts = sorted({job.attempt for job in world.jobs.values()} | {p.attempt for p in world.pods})
    newest = max(attempts, default=0)
    what = draw(st.sampled_from(["pods", "pods", "pods", "job", "progress", "spec", "time", "vanish", "crash"]))
    if what == "pods" and newest:
        for index in range(next((job.num_nodes for job in world.jobs.values() if job.attempt == newest), 2)):
            if draw(st.booleans()):
                world.set_pod(draw(pods(newest, index)))
    elif what == "job" and world.jobs:
        name = draw(st.sampled_from(sorted(world.jobs)))
        if draw(st.booleans()):
            del world.jobs[name]
        else:
            flag = draw(st.sampled_from(["complete", "failed", "deleting"]))
            world.jobs[name] = replace(world.jobs[name], **{flag: True})
    elif what == "progress" and newest:
        world.progress = draw(progresses(max(1, newest - draw(st.integers(0, 1)))))
    elif what == "spec":
        # Suspended, changed and perhaps resumed before anybody looks.
        changes = {"trainer": draw(TRAINERS)} if draw(st.booleans()) else {}
        world.change_spec(suspend=draw(st.booleans()), **changes)
    elif what == "time":
        world.now += seconds(draw(st.sampled_from([1, 11, 40, 400, 4000])))
    elif what == "vanish" and world.pods:
        world.pods.remove(draw(st.sampled_from(world.pods)))
    elif what == "crash" and newest:
        # An operator made the next Job and died before it wrote status.
        trainer = world.job.spec.trainer
        made = {"num_nodes": trainer.num_nodes, "trainer": trainer_digest(trainer)}
        world.jobs[f"tune-{newest + 1}"] = child(newest + 1, created_at=world.now, **made)


TRAINERS = st.sampled_from([{}, {"numNodes": 2}, {"numNodes": 2, "numProcPerNode": 2}])
JOBS = st.builds(
    make_job,
    trainer=TRAINERS,
    recovery=st.sampled_from([{}, {"backoffLimit": 0}, {"backoffLimit": 1}]),
    suspend=st.booleans(),
    activeDeadlineSeconds=st.sampled_from([None, 300]),
    ttlSecondsAfterFinished=st.sampled_from([None, 100]),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(job=JOBS, data=st.data())
def test_plan_is_idempotent(job: object, data: st.DataObject) -> None:
    world = World(job)  # type: ignore[arg-type]
    for _ in range(data.draw(st.integers(1, 8))):
        before = world.job.status
        decision = world.step()
        if is_finished(before):
            assert decision.status in (before, observed_generation(before, world.job))
            assert not any(isinstance(action, Apply) for action in decision.actions)
        again = world.plan()
        if not world.deleted:
            assert again.actions == ()
        assert again.events == ()
        assert merge_patch(world.job.status.to_wire(), again.status.to_wire()) == {}
        assert type(world.job.status).model_validate(world.job.status.to_wire()) == world.job.status
        if not is_finished(world.job.status):
            kept = [job for job in world.jobs.values() if not job.deleting]
            assert len(kept) <= 1
            if (attempt := world.job.status.attempts[-1:]) and attempt[0].end_time is None:
                assert {job.trainer for job in kept} <= {trainer_digest(world.job.spec.trainer)}
        data.draw(disturb(world))


@settings(max_examples=50, deadline=None)
@given(job=JOBS, data=st.data())
def test_a_job_that_is_being_deleted_is_left_alone(job: object, data: st.DataObject) -> None:
    world = World(job)  # type: ignore[arg-type]
    world.step()
    data.draw(disturb(world))
    metadata = world.job.metadata.model_copy(update={"deletion_timestamp": "2026-11-24T12:00:00Z"})
    world.job = world.job.model_copy(update={"metadata": metadata})
    decision = world.plan()
    assert (decision.actions, decision.events, decision.status) == ((), (), world.job.status)


def test_another_controllers_job_is_left_alone() -> None:
    world = World(make_job(managedBy="kueue.x-k8s.io/multikueue"))
    decision = world.plan()
    assert (decision.actions, decision.events, decision.status.state) == ((), (), None)


def test_every_reason_of_the_table_ends_or_continues_a_job() -> None:
    for reason in TRAINER_REASONS:
        world = World(make_job())
        world.step()
        end = Terminated(FAILURES[reason].exit_code or 1, "Error", "", NOW + timedelta(seconds=1))
        world.set_pod(pod(phase="Failed", running=False, terminated=end))
        world.step()
        expected = reason in (Reason.DATA_ERROR, Reason.CONFIG_ERROR, Reason.CODE_ERROR)
        assert (world.job.status.state is State.FAILED) == expected, reason
