"""Whatever happens in the middle of training, the job ends Complete and its result is the unbroken run's, bit for bit.

Every test breaks a running two-node job in one way, waits for Complete and compares the exported weights' SHA-256 and the
final losses with those of a job that nobody touched. What was lost and how long it took is printed as a table at the end.
A job that goes on with another number of ranks has the same losses but for the order of sums.
"""

import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, kill_rank
from tests.e2e.jobs import Job, now, start
from tests.e2e.kube import wait_for
from tests.e2e.recovery_table import Row
from tests.e2e.results import Result

pytestmark = pytest.mark.cluster

SPEC: dict[str, Any] = {
    "training": {"maxSteps": 30, "globalBatchSize": 2, "packing": True},
    "trainer": {"numNodes": 2},
    "deepspeed": {"zeroStage": 2},
    "checkpoint": {"everySteps": 5},
}
BREAK_AT = 12
ONE_NODE: dict[str, Any] = {"numNodes": 1, "resourcesPerNode": {"limits": {"cpu": "2"}}}
TOLERANCE = 2e-5
"""Relative difference of losses where a part of the steps is done on one rank instead of two: float32 sums in another order."""


@pytest.fixture(scope="module")
def unbroken(cluster: Cluster) -> Result:
    """The result of a job that nobody touched."""
    job = start(cluster.kubectl, "unbroken", SPEC)
    status = job.complete()
    assert status.get("restarts", 0) == 0
    return cluster.result(job)


def delete_pod(cluster: Cluster, job: Job) -> None:
    cluster.kubectl("delete", "pod", job.pods()[1]["metadata"]["name"], "--wait=false")


def kill_one_rank(cluster: Cluster, job: Job) -> None:
    kill_rank(cluster.kubectl, job.pods()[1]["metadata"]["name"])


def stop_one_rank(cluster: Cluster, job: Job) -> None:
    kill_rank(cluster.kubectl, job.pods()[1]["metadata"]["name"], signal.SIGSTOP)


def evict(cluster: Cluster, job: Job) -> None:
    cluster.evict(job.pods()[0]["metadata"]["name"])


@pytest.mark.parametrize(
    ("name", "disturb", "reason"),
    [
        ("pod-deleted", delete_pod, "PodDeleted"),
        ("rank-killed", kill_one_rank, "RankKilled"),
        ("rank-hung", stop_one_rank, "Hang"),
        ("evicted", evict, "Evicted"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gang_restarts(
    cluster: Cluster,
    unbroken: Result,
    recovery_table: list[Row],
    name: str,
    disturb: Callable[[Cluster, Job], None],
    reason: str,
) -> None:
    limits = {"recovery": {"hangTimeoutSeconds": 10}} if reason == "Hang" else {}
    job = start(cluster.kubectl, name, {**SPEC, **limits})
    job.wait_step(BREAK_AT)
    at = now()
    disturb(cluster, job)
    _finish(cluster, job, unbroken, recovery_table, reason, at)


def test_lost_node_kubelet_stopped(cluster: Cluster, unbroken: Result, recovery_table: list[Row]) -> None:
    """The pods run on, unseen: the next attempt fences them off. The operator is on the other node."""
    cluster.move_operator(cluster.toolbox_node)
    _lose_node(cluster, unbroken, recovery_table, "stop")


def test_lost_node_power_lost(cluster: Cluster, unbroken: Result, recovery_table: list[Row]) -> None:
    """All on the node ends at once, the only operator too: first it comes back elsewhere, then the job does."""
    cluster.move_operator(cluster.other_node)
    _lose_node(cluster, unbroken, recovery_table, "kill")


def test_operator_killed(cluster: Cluster, unbroken: Result, recovery_table: list[Row]) -> None:
    """The job trains on while the operator is away, and is adopted, not restarted, when it is back."""
    job = start(cluster.kubectl, "operator-killed", SPEC)
    job.wait_step(BREAK_AT)
    before = {pod["metadata"]["uid"] for pod in job.pods()}
    at = now()
    cluster.kill_operator()
    cluster.wait_operator()
    back = now() - at
    status = job.complete()
    assert status.get("restarts", 0) == 0
    assert {pod["metadata"]["uid"] for pod in job.pods()} == before
    assert cluster.result(job) == unbroken
    recovery_table.append(Row("operator-killed", "", back, 0, 0, 0))


def test_goes_on_with_other_ranks(cluster: Cluster, unbroken: Result) -> None:
    """Suspended on two nodes, resumed on one while the old pods may still be saving."""
    job = start(cluster.kubectl, "other-ranks", SPEC)
    step = job.wait_step(BREAK_AT)
    job.change(suspend=True)
    job.wait_state("Suspended")
    job.change(trainer=ONE_NODE, suspend=False)
    status = job.complete()
    first, second = status["attempts"]
    assert (first["reason"], status.get("restarts", 0)) == ("Suspended", 0)
    assert (first["worldSize"], second["worldSize"]) == (2, 1)
    assert second["fromStep"] >= step, "it went on from the checkpoint made on SIGTERM"
    assert status["progress"]["step"] == SPEC["training"]["maxSteps"]
    assert (status["plan"]["worldSize"], status["plan"]["gradientAccumulationSteps"]) == (1, 2)
    assert len(job.pods(2)) == 1
    result = cluster.result(job)
    assert result.base_eval_loss == unbroken.base_eval_loss
    assert float(result.loss) == pytest.approx(float(unbroken.loss), rel=TOLERANCE)
    assert float(result.eval_loss) == pytest.approx(float(unbroken.eval_loss), rel=TOLERANCE)


def _lose_node(cluster: Cluster, unbroken: Result, table: list[Row], how: str) -> None:
    job = start(cluster.kubectl, f"node-lost-{how}", SPEC)
    job.wait_step(BREAK_AT)
    node = cluster.other_node
    assert node in _nodes(job)
    at = now()
    try:
        cluster.lose_node(how, node)
        _finish(cluster, job, unbroken, table, "NodeLost", at)
    finally:
        cluster.start_node(node)


def _finish(cluster: Cluster, job: Job, unbroken: Result, table: list[Row], reason: str, at: float) -> None:
    """Waits for Complete, compares with the unbroken run and adds the table's row."""
    job.wait("a second attempt", lambda status: len(status.get("attempts", [])) > 1)
    detected = now() - at
    wait_for(f"{job.name}: the new gang runs", lambda: _all_run(job.pods(2)), 120, lambda: job.status)
    running = now() - at
    wait_for(f"{job.name}: training goes on", lambda: _trains_again(job), 120, lambda: job.status)
    training = now() - at
    status = job.complete()
    first, second = status["attempts"]
    assert first["reason"] == reason, first
    assert second["fromStep"] > 0, "the second attempt resumed from a checkpoint"
    assert status["restarts"] == 1
    assert cluster.result(job) == unbroken
    if first["lostSteps"]:
        assert "done again after the restart: the same losses and gradient norms to the bit." in status["message"]
    table.append(Row(job.name, reason, detected, running, training, first["lostSteps"]))


def _trains_again(job: Job) -> bool:
    """Also true once there is nothing left to train: pods on a lost node may have gone on to the last step, unseen."""
    progress = job.progress
    if progress.get("attempt") != 2 or progress["activity"] == "Loading":
        return job.status["state"] == "Complete"
    return bool(progress["step"] > progress["resumedFromStep"] or progress["activity"] != "Training")


def _all_run(pods: list[dict[str, Any]]) -> bool:
    return len(pods) == 2 and all(pod["status"]["phase"] == "Running" for pod in pods)


def _nodes(job: Job) -> list[str]:
    return [pod["spec"]["nodeName"] for pod in job.pods()]
