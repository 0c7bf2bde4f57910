"""Whole courses of jobs, step by step, in the model of a cluster."""

from dataclasses import replace
from typing import Any

import pytest

from finetune_api.launch import LaunchSpec
from finetune_api.reasons import Reason
from finetune_api.reports import Activity, MetricReport, TerminationReport
from finetune_api.status import ConditionType, FineTuneJobStatus, State
from finetune_operator.core.conditions import find, is_true
from finetune_operator.core.observe import Waiting
from finetune_operator.core.refused import refused
from finetune_operator.core.situation import Apply, Delete, Kind, Plan
from tests.unit.operator.samples import CONFIG, NOW, World, child, ended, make_job, pod, progress, seconds


def report(reason: Reason | None, message: str = "it broke", **fields: Any) -> str:
    return TerminationReport(
        reason=reason, message=message, **{"step": 40, "last_checkpoint_step": 30, **fields}
    ).to_json()


def started(num_nodes: int = 1, **spec: Any) -> World:
    """A job whose first gang runs and trains."""
    world = World(make_job(trainer={"numNodes": num_nodes}, **spec))
    world.step()
    world.run_gang(1, num_nodes)
    world.progress = progress(resumed_from_step=0, last_checkpoint_step=30)
    world.step(1)
    return world


def words(world: World) -> tuple[State | None, str | None]:
    return world.job.status.state, world.job.status.reason


def test_start_applies_three_objects_and_no_event() -> None:
    world = World(make_job())
    decision = world.step()
    assert [(type(a), a.kind) for a in decision.actions] == [
        (Apply, Kind.CONFIG_MAP),
        (Apply, Kind.SERVICE),
        (Apply, Kind.JOB),
    ]
    assert decision.events == ()
    assert words(world) == (State.PENDING, "Scheduling")
    assert world.job.status.plan is not None


@pytest.mark.parametrize(
    ("fields", "state", "reason", "says"),
    [
        ({"unschedulable": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu. preemption: no", "scheduled": False},
         State.PENDING, "Unschedulable",
         "0/2 nodes are available: 2 Insufficient nvidia.com/gpu. Lower trainer.resourcesPerNode"),
        ({"unschedulable": 'persistentvolumeclaim "dta" not found', "scheduled": False},
         State.PENDING, "Unschedulable", '"dta" not found. Create the claim, or correct the pvc:// URI'),
        ({"waiting": Waiting("ErrImagePull", "rpc error: code = NotFound desc = registry/x:1: not found")},
         State.PENDING, "ImagePullFailed", "tune-1-0-abcde: registry/x:1: not found. Check trainer.image"),
        ({"waiting": Waiting("InvalidImageName", "")}, State.PENDING, "ImagePullFailed", "InvalidImageName"),
        ({"waiting": Waiting("CreateContainerConfigError", 'secret "hub" not found')},
         State.PENDING, "CreateContainerConfigError", 'secret "hub" not found'),
        ({"waiting": Waiting("ContainerCreating", "")}, State.STARTING, "ContainersStarting",
         "on node-0 (kubectl describe pods -l batch.kubernetes.io/job-name=tune-1 tells"),
    ],
    ids=["unschedulable", "no-claim", "pull", "image-name", "secret", "creating"],
)  # fmt: skip
def test_what_keeps_a_gang_from_running(fields: dict[str, Any], state: State, reason: str, says: str) -> None:
    world = World(make_job())
    world.step()
    world.pods = [pod(phase="Pending", running=False, **fields)]
    assert world.step().events == ()
    assert words(world) == (state, reason)
    assert says in (world.job.status.message or "")
    running = find(world.job.status, ConditionType.RUNNING)
    assert running is not None
    assert (running.status, running.reason) == ("False", reason)


def test_pods_that_kubernetes_does_not_create_are_spoken_of() -> None:
    world = World(make_job(trainer={"numNodes": 2}))
    assert world.step().requeue_after == CONFIG.pods_late_seconds
    world.pods = [pod()]
    world.step(CONFIG.pods_late_seconds)
    assert words(world) == (State.PENDING, "PodsNotCreated")
    assert "kubectl describe job tune-1" in (world.job.status.message or "")
    world.pods = [pod(), pod(index=1)]
    world.step(1)
    assert words(world) == (State.STARTING, "Loading")


def test_back_off_does_not_change_the_words_of_a_failed_pull() -> None:
    world = World(make_job())
    world.step()
    world.pods = [pod(phase="Pending", running=False, waiting=Waiting("ErrImagePull", "not found"))]
    world.step()
    before = world.job.status
    world.pods = [pod(phase="Pending", running=False, waiting=Waiting("ImagePullBackOff", "Back-off pulling"))]
    world.step()
    assert world.job.status == before


def test_progress_is_written_seldom_and_at_once_when_the_phase_changes() -> None:
    world = World(make_job())
    world.step()
    world.run_gang(1)
    world.progress = progress(step=0, activity=Activity.LOADING, total_steps=None)
    world.step(1)
    assert words(world) == (State.STARTING, "Loading")
    world.progress = progress(step=1)
    world.step(1)
    assert words(world) == (State.RUNNING, "Training")
    before = world.job.status
    world.progress = progress(step=2, activity=Activity.CHECKPOINTING)
    world.step(5)
    assert world.job.status == before
    world.step(5)
    assert world.job.status.progress is not None
    assert world.job.status.progress.summary == "2/400 (0%)"
    assert words(world) == (State.RUNNING, "Checkpointing")


def test_a_killed_rank_restarts_the_gang_in_one_plan() -> None:
    world = started(num_nodes=2)
    world.set_pod(ended(index=1, code=90, message=report(Reason.RANK_KILLED)))
    decision = world.step(1)
    assert [type(a) for a in decision.actions] == [Apply] * 3 + [Delete] * 3
    assert [e.reason for e in decision.events] == ["RankKilled"]
    assert words(world) == (State.RESTARTING, "RankKilled")
    assert (world.job.status.restarts, world.job.status.counted_restarts) == (1, 1)
    first, second = world.job.status.attempts
    assert (first.reason, first.to_step, first.lost_steps, first.exit_code) == ("RankKilled", 40, 10, 90)
    world.run_gang(2, 2)
    world.progress = progress(2, step=31, resumed_from_step=30)
    world.step(3)
    assert words(world) == (State.RUNNING, "Training")
    assert "Restart 1 after RankKilled at step 40, resumed from step 30." in (world.job.status.message or "")
    assert not is_true(world.job.status, ConditionType.RESTARTING)
    assert second.number == 2


def test_lost_steps_are_corrected_by_what_the_next_attempt_resumed_from() -> None:
    world = started()
    world.set_pod(pod(delete_time=world.now))
    world.step()
    assert world.job.status.attempts[0].lost_steps == 10
    # The old pod saved one more checkpoint while it left.
    world.set_pod(ended(code=143, delete_time=world.now, message=report(None, step=45, last_checkpoint_step=45)))
    world.run_gang(2)
    world.progress = progress(2, step=46, resumed_from_step=45)
    world.step(2)
    assert (world.job.status.attempts[0].to_step, world.job.status.attempts[0].lost_steps) == (45, 0)


def test_bad_data_fails_at_once_with_file_and_line() -> None:
    world = started()
    world.set_pod(ended(code=87, message=report(Reason.DATA_ERROR, "/mnt/pvc/data/train.jsonl:17: not JSON")))
    decision = world.step()
    assert decision.actions == ()
    assert words(world) == (State.FAILED, "DataError")
    assert "/mnt/pvc/data/train.jsonl:17: not JSON. Correct the file" in (world.job.status.message or "")
    assert world.job.status.restarts == 0


def test_out_of_restarts() -> None:
    world = started(recovery={"backoffLimit": 1})
    world.set_pod(ended(code=82, message=report(Reason.HANG)))
    world.step()
    world.run_gang(2)
    world.progress = progress(2, step=50, resumed_from_step=30)
    world.step(1)
    world.set_pod(ended(2, code=82, message=report(Reason.HANG, step=50)))
    world.step()
    assert words(world) == (State.FAILED, "BackoffLimitExceeded")
    assert "2 failures, recovery.backoffLimit is 1. The last one, Hang" in (world.job.status.message or "")
    assert world.job.status.restarts == 1


def test_where_a_rank_was_is_kept_when_its_pod_has_gone() -> None:
    world = started()
    world.set_pod(ended(code=82, message=report(Reason.HANG, traceback='File "loop.py", line 7 in train')))
    decision = world.step()
    assert any(isinstance(action, Delete) and action.kind is Kind.JOB for action in decision.actions)
    world.run_gang(2)
    world.step()
    first, second = world.job.status.attempts
    assert (first.traceback, second.traceback) == ('File "loop.py", line 7 in train', None)


@pytest.mark.parametrize("disruption", ["EvictionByEvictionAPI", "DeletionByTaintManager", "PreemptionByScheduler"])
def test_what_the_platform_does_is_not_counted(disruption: str) -> None:
    world = started(recovery={"backoffLimit": 0})
    for attempt in range(1, 6):
        world.set_pod(pod(attempt, delete_time=world.now, disruption=disruption))
        world.step()
        world.run_gang(attempt + 1)
        world.progress = progress(attempt + 1, step=40 + attempt, resumed_from_step=39 + attempt)
        world.step(1)
    assert (world.job.status.restarts, world.job.status.counted_restarts) == (5, 0)
    assert world.job.status.state is State.RUNNING


def test_attempts_without_progress_are_started_at_growing_distances() -> None:
    world = World(make_job(recovery={"backoffLimit": 9}))
    waits = []
    world.step()
    for _ in range(7):
        attempt = world.job.status.attempts[-1].number
        world.set_pod(ended(attempt, code=1))
        decision = world.step()
        begun = any(isinstance(action, Apply) for action in decision.actions)
        waits.append(0 if begun else decision.requeue_after)
        if not begun:
            assert words(world) == (State.RESTARTING, "PodFailed")
            world.step(decision.requeue_after or 0)
        assert world.job.status.attempts[-1].number == attempt + 1
    assert waits == [0, 10, 20, 40, 80, 160, 300]


def test_a_hub_that_does_not_answer_is_waited_for_from_the_first_time_on() -> None:
    world = World(make_job())
    world.step()
    world.set_pod(ended(code=92, message=report(Reason.HUB_UNAVAILABLE, step=0)))
    assert world.step().requeue_after == CONFIG.backoff_base_seconds


def test_suspend_and_resume() -> None:
    world = started()
    world.change_spec(suspend=True)
    decision = world.step(1)
    assert [(type(a), a.name) for a in decision.actions] == [(Delete, "tune-1")]
    assert words(world) == (State.SUSPENDED, "Suspended")
    assert "saving a checkpoint" in (world.job.status.message or "")
    assert world.job.status.start_time is None
    world.set_pod(ended(code=143, delete_time=NOW, message=report(Reason.TERMINATED, step=44, last_checkpoint_step=44)))
    world.step(2)
    assert world.job.status.message == "Set spec.suspend: false to go on from step 44."
    progress = world.job.status.progress
    assert progress is not None
    assert (progress.summary, progress.activity) == ("44/400 (11%)", None)
    world.change_spec(suspend=False)
    world.step(1)
    assert world.job.status.attempts[-1].number == 2
    assert world.job.status.restarts == 0
    assert world.job.status.start_time == world.now
    assert not is_true(world.job.status, ConditionType.SUSPENDED)


def test_a_pod_that_never_leaves_does_not_hide_how_to_go_on() -> None:
    world = started()
    world.change_spec(suspend=True)
    decision = world.step()
    assert decision.requeue_after is not None
    world.step(decision.requeue_after)
    assert world.job.status.message == "Set spec.suspend: false to go on from step 30."


def test_resumed_while_the_next_attempt_is_waited_for() -> None:
    world = World(make_job(recovery={"backoffLimit": 9}))
    world.step()
    for attempt in (1, 2):
        world.set_pod(ended(attempt, code=1))
        world.step()
    assert words(world) == (State.RESTARTING, "PodFailed")
    world.change_spec(suspend=True)
    world.step()
    world.change_spec(suspend=False)
    world.step()
    assert words(world) == (State.RESTARTING, "PodFailed")
    assert not is_true(world.job.status, ConditionType.SUSPENDED)


@pytest.mark.parametrize("end", ["running", "suspended", "complete"])
def test_conditions_answer_to_the_newest_spec(end: str) -> None:
    """`kubectl wait` takes one of an older generation for stale."""
    world = started()
    if end == "suspended":
        world.change_spec(suspend=True)
    elif end == "complete":
        world.set_pod(ended())
    world.step()
    world.change_spec(ttl_seconds_after_finished=1000)
    world.step()
    generation = world.job.metadata.generation
    assert {c.observed_generation for c in world.job.status.conditions} == {generation}
    assert world.job.status.observed_generation == generation


def test_what_is_left_of_an_attempt_makes_room_for_the_next_that_was_refused() -> None:
    world = started()
    world.set_pod(ended(code=90, message=report(Reason.RANK_KILLED)))
    status = refused(world.job.status, "Job", "tune-2", "exceeded quota: count/jobs.batch")
    world.job = world.job.model_copy(update={"status": status})
    decision = world.step()
    assert {(type(a), a.kind) for a in decision.actions} == {
        (Delete, Kind.JOB),
        (Delete, Kind.SERVICE),
        (Delete, Kind.CONFIG_MAP),
    }
    assert words(world) == (State.RESTARTING, "RankKilled")
    assert not is_true(world.job.status, ConditionType.RUNNING)
    assert (decision.requeue_after, [event.reason for event in decision.events]) == (0, ["RankKilled"])
    assert launched(world.step())[0].attempt == 2
    assert [(a.reason, a.counted) for a in world.job.status.attempts] == [("RankKilled", True), (None, None)]


def test_a_resume_waits_for_old_pods_but_not_for_ever() -> None:
    world = started()
    world.change_spec(suspend=True)
    world.step()
    world.change_spec(suspend=False)
    decision = world.step(1)
    assert words(world) == (State.PENDING, "Resuming")
    assert decision.requeue_after is not None
    world.step(decision.requeue_after)
    assert world.job.status.attempts[-1].number == 2


def launched(decision: Plan) -> tuple[LaunchSpec, dict[str, Any]]:
    """What a plan starts: the launch file and the Job's spec."""
    made = {action.kind: action.manifest for action in decision.actions if isinstance(action, Apply)}
    return LaunchSpec.model_validate_json(made[Kind.CONFIG_MAP]["data"]["launch.json"]), made[Kind.JOB]["spec"]


SMALLER = {"image": "registry/trainer:2", "resourcesPerNode": {"limits": {"cpu": 4}}}
"""One node instead of two, with another image."""


def test_a_job_that_was_changed_while_it_was_suspended_goes_on_with_other_ranks() -> None:
    world = started(num_nodes=2)
    before = world.job.status.plan
    assert before is not None and (before.world_size, before.gradient_accumulation_steps) == (2, 4)
    world.change_spec(suspend=True)
    world.step(1)
    world.pods = []
    world.change_spec(trainer=SMALLER)
    world.step(1)
    assert words(world) == (State.SUSPENDED, "Suspended")
    world.change_spec(suspend=False)
    decision = world.step(1)
    launch, job = launched(decision)
    assert (launch.num_nodes, launch.num_proc_per_node, launch.threads_per_process) == (1, 1, 4)
    assert (launch.training.gradient_accumulation_steps, launch.rendezvous.host) == (8, "localhost")
    assert (job["completions"], job["parallelism"]) == (1, 1)
    (container,) = job["template"]["spec"]["containers"]
    assert (container["image"], container["resources"]) == ("registry/trainer:2", {"limits": {"cpu": 4}})
    assert [e.message for e in decision.events] == [
        "Attempt 2 goes on from the last checkpoint, on 1 rank instead of 2."
    ]
    follows = {"image": "registry/trainer:2", "world_size": 1, "gradient_accumulation_steps": 8}
    assert world.job.status.plan == before.model_copy(update=follows)
    assert [attempt.world_size for attempt in world.job.status.attempts] == [2, 1]
    world.run_gang(2)
    world.step(1)
    assert words(world) == (State.STARTING, "Loading")
    world.set_pod(ended(2))
    world.step(1)
    assert world.job.status.state is State.COMPLETE


def test_a_change_that_comes_while_the_old_pods_are_saving_waits_for_them() -> None:
    world = started()
    world.change_spec(suspend=True)
    world.step()
    world.change_spec(trainer={"numNodes": 2}, suspend=False)
    assert world.step(1).actions == ()
    assert words(world) == (State.PENDING, "Resuming")
    world.set_pod(ended(code=143, delete_time=NOW, message=report(Reason.TERMINATED, step=44, last_checkpoint_step=44)))
    launch, job = launched(world.step(1))
    assert (launch.attempt, launch.num_nodes, job["completions"]) == (2, 2, 2)
    checkpoint = world.job.status.last_checkpoint
    assert checkpoint is not None and (checkpoint.step, world.job.status.attempts[0].to_step) == (44, 44)


def test_a_change_whose_suspension_nobody_saw_suspends_and_resumes() -> None:
    world = started(num_nodes=2)
    world.change_spec(trainer=SMALLER)  # suspended and resumed, while no operator ran
    decision = world.step(1)
    assert [(type(a), a.name) for a in decision.actions] == [(Delete, "tune-1")]
    assert words(world) == (State.PENDING, "Resuming")
    assert not is_true(world.job.status, ConditionType.RUNNING)
    world.set_pod(ended(code=143, delete_time=NOW, message=report(Reason.TERMINATED)))
    assert world.step(1).actions == (), "the other pod is still saving"
    world.set_pod(ended(index=1, code=143, delete_time=NOW, message=report(Reason.TERMINATED)))
    launch, _ = launched(world.step(1))
    assert (launch.attempt, launch.num_nodes) == (2, 1)
    first = world.job.status.attempts[0]
    assert (first.reason, first.message, world.job.status.restarts) == ("Suspended", "spec.trainer was changed.", 0)


def test_a_gang_is_complete_when_all_pods_that_it_was_made_with_are() -> None:
    world = started(num_nodes=2)
    world.set_pod(ended(index=0))
    world.change_spec(trainer={})
    assert world.plan().status.state is not State.COMPLETE
    world.set_pod(ended(index=1))
    assert world.plan().status.state is State.COMPLETE, "it finished before anybody saw the change"


def test_a_job_that_an_older_operator_started_is_not_taken_for_another() -> None:
    world = started(num_nodes=2)
    world.jobs["tune-1"] = replace(world.jobs["tune-1"], trainer=None)
    assert world.step(1).actions == ()


def test_what_was_refused_may_change_while_it_is_suspended() -> None:
    world = World(make_job(trainer={"numNodes": 2}))
    world.job = world.job.model_copy(update={"status": refused(world.job.status, "Job", "tune-1", "exceeded quota")})
    world.change_spec(suspend=True)
    assert world.step().actions == ()
    world.change_spec(trainer={}, suspend=False)
    launch, _ = launched(world.step())
    assert (launch.attempt, launch.num_nodes) == (1, 1)


def test_suspended_from_the_start_and_then_released() -> None:
    world = World(make_job(suspend=True))
    assert world.step().actions == ()
    assert words(world) == (State.SUSPENDED, "Suspended")
    world.change_spec(suspend=False)
    world.step(100)
    assert world.job.status.attempts[-1].number == 1


def test_the_deadline_counts_active_time_only() -> None:
    world = started(activeDeadlineSeconds=100)
    world.change_spec(suspend=True)
    world.step(50)
    world.pods = []
    world.step(1000)
    world.change_spec(suspend=False)
    world.step(1)
    world.run_gang(2)
    assert world.step(0).requeue_after == 100
    world.step(99)
    assert world.job.status.state is State.STARTING
    decision = world.step(1)
    assert words(world) == (State.FAILED, "DeadlineExceeded")
    assert [(type(a), a.name) for a in decision.actions] == [(Delete, "tune-2")]


def test_success_tells_the_losses_and_the_output() -> None:
    world = started(num_nodes=2)
    world.set_pod(ended(index=1))
    world.step(1)
    assert world.job.status.state is State.RUNNING
    message = report(None, "", step=400, total_steps=400, base_eval_loss=1.69, eval_loss=1.36, loss=1.2)
    world.set_pod(ended(index=0, message=message))
    decision = world.step(1)
    assert words(world) == (State.COMPLETE, "Complete")
    assert world.job.status.message == "Held-out loss 1.69 before, 1.36 after 400 steps. Output: pvc://data/out/tune"
    assert [e.reason for e in decision.events] == ["Complete"]
    assert world.job.status.progress is not None
    assert world.job.status.progress.summary == "400/400 (100%)"


def test_success_tells_an_early_stop_and_the_metrics() -> None:
    world = started()
    metric = MetricReport(name="HumanEvalPassAt1", value=0.25, base_value=0.125, step=30)
    words_of_trainer = "Stopped early after 30 of 400 steps: EvalLoss has not improved in 3 evaluations."
    message = report(None, words_of_trainer, step=30, total_steps=400, loss=1.2, metrics=[metric])
    world.set_pod(ended(index=0, message=message))
    world.step(1)
    assert words(world) == (State.COMPLETE, "Complete")
    assert (world.job.status.message or "").startswith(f"Training loss 1.2 after 30 steps. {words_of_trainer} Output: ")
    assert world.job.status.progress is not None
    (shown,) = world.job.status.progress.metrics
    assert shown.to_wire() == {"name": "HumanEvalPassAt1", "value": "0.25", "baseValue": "0.125", "step": 30}


def test_success_comes_before_suspension_and_deadline() -> None:
    world = started(activeDeadlineSeconds=10)
    world.set_pod(ended())
    world.change_spec(suspend=True)
    world.step(100)
    assert world.job.status.state is State.COMPLETE


def test_a_complete_job_waits_for_rank_0s_words() -> None:
    world = started()
    world.jobs["tune-1"] = replace(world.jobs["tune-1"], complete=True)
    world.step(1)
    assert world.job.status.state is State.RUNNING
    world.pods = []
    world.step(1)
    assert world.job.status.state is State.COMPLETE


def test_the_ttl_deletes_the_job_itself() -> None:
    world = started(ttlSecondsAfterFinished=60)
    world.set_pod(ended())
    world.step()
    assert world.step(59).actions == ()
    (action,) = world.step(1).actions
    assert (type(action), action.kind) == (Delete, Kind.FINE_TUNE_JOB)


@pytest.mark.parametrize("end", ["failed", "deadline"])
def test_the_ttl_is_looked_at_when_it_is_over(end: str) -> None:
    world = started(ttlSecondsAfterFinished=1, activeDeadlineSeconds=100)
    if end == "failed":
        world.set_pod(ended(code=87, message=report(Reason.DATA_ERROR)))
    assert world.step(0 if end == "failed" else 100).requeue_after == 1
    assert world.job.status.state is State.FAILED


def test_pods_that_outlive_a_failed_job_are_removed() -> None:
    world = started(num_nodes=2)
    world.set_pod(ended(index=0, code=89, message=report(Reason.CODE_ERROR)))
    world.step()
    assert world.job.status.state is State.FAILED
    assert world.step(1).actions == ()
    assert [a.name for a in world.step(CONFIG.leftover_seconds).actions] == ["tune-1"]


def test_an_attempt_that_a_dead_operator_began_is_adopted_with_its_cause() -> None:
    world = started()
    world.set_pod(ended(code=90, message=report(Reason.RANK_KILLED)))
    decision = world.plan()
    before = world.job.status
    world.apply(decision)
    # All actions were done, the status was never written.
    world.job = world.job.model_copy(update={"status": before})
    again = world.step(2)
    assert again.actions == ()
    first, second = world.job.status.attempts
    assert (first.reason, first.counted, second.number) == ("RankKilled", True, 2)
    assert (first.world_size, second.world_size) == (1, 1)
    assert (world.job.status.restarts, world.job.status.counted_restarts) == (1, 1)
    assert words(world) == (State.RESTARTING, "RankKilled")


def test_a_running_job_without_status_is_adopted() -> None:
    world = World(make_job())
    world.jobs["tune-1"] = child()
    world.run_gang(1)
    assert world.step().actions == ()
    assert world.job.status.attempts[-1].number == 1
    assert words(world) == (State.STARTING, "Loading")


def test_an_adopted_attempt_of_an_older_trainer_does_not_have_the_new_ones_ranks() -> None:
    world = started(num_nodes=2)
    world.job = world.job.model_copy(update={"status": FineTuneJobStatus()})
    world.change_spec(trainer=SMALLER)
    world.step(1)
    (attempt,) = world.job.status.attempts
    assert (attempt.number, attempt.reason, attempt.world_size) == (1, "Suspended", None)


def test_conditions_keep_their_time_while_they_say_the_same() -> None:
    world = started()
    condition = find(world.job.status, ConditionType.RUNNING)
    world.progress = progress(step=100)
    world.step(60)
    assert find(world.job.status, ConditionType.RUNNING) == condition


def test_only_twenty_attempts_are_kept() -> None:
    world = started()
    for attempt in range(1, 30):
        world.set_pod(pod(attempt, delete_time=world.now))
        world.step()
        world.run_gang(attempt + 1)
        world.progress = progress(attempt + 1, step=40 + attempt, resumed_from_step=39 + attempt)
        world.now += seconds(11)
        world.step()
    assert len(world.job.status.attempts) == 20
    assert world.job.status.restarts == 29
