"""The operator's own life: deletion while it is away, its return, its replicas, suspension, deadline and TTL."""

import time
from typing import Any

import pytest

from finetune_api.job import LABEL_JOB_NAME
from tests.e2e.cluster import RELEASE, Cluster
from tests.e2e.jobs import start
from tests.e2e.kube import wait_for

pytestmark = pytest.mark.cluster

NOWHERE: dict[str, Any] = {"trainer": {"nodeSelector": {"example.com/no-such": "node"}}}
"""A job whose pods no node takes: it stays Pending and costs nothing."""


def test_deletion_works_while_the_operator_is_down(cluster: Cluster) -> None:
    kubectl = cluster.kubectl
    kept = start(kubectl, "kept", {"training": {"maxSteps": 2}, "datasets": {"evaluation": []}})
    kept.complete()
    finished = [pod["metadata"]["uid"] for pod in kept.pods()]
    doomed = start(kubectl, "doomed", NOWHERE)
    doomed.wait_state("Pending")
    wait_for("its pods", doomed.pods, 30)
    cluster.scale_operator(0)
    try:
        kubectl("delete", "finetunejob", "doomed", "--timeout=30s")
        for kind in ("jobs", "pods", "services", "configmaps"):
            selector = f"{LABEL_JOB_NAME}=doomed"
            wait_for(f"{kind} of the deleted job to go", lambda: cluster.gone(kind, selector), 60)  # noqa: B023
    finally:
        cluster.scale_operator(1)
    late = start(kubectl, "late", NOWHERE)
    late.wait_state("Pending")
    assert [pod["metadata"]["uid"] for pod in kept.pods()] == finished, "a finished job is not started again"
    assert kept.status["state"] == "Complete"
    assert cluster.gone("jobs", f"{LABEL_JOB_NAME}=doomed")
    kubectl("delete", "finetunejob", "late")


def test_two_replicas_one_leader_and_handover(cluster: Cluster, measurements: dict[str, Any]) -> None:
    kubectl = cluster.kubectl
    cluster.scale_operator(2)
    try:
        leader = wait_for("a leader", lambda: _holder(cluster), 30)
        start(kubectl, "one-acts", NOWHERE).wait_state("Pending")
        acted = [name for name in _names(cluster) if _children_applied(cluster, name)]
        assert acted == [leader], "exactly one replica acts"
        at = time.monotonic()
        kubectl("delete", "pod", leader, "--grace-period=0", "--force", "--wait=false")
        start(kubectl, "after-the-leader", NOWHERE).wait_state("Pending", timeout=60)
        measurements["leader killed -> the next one acts (s)"] = round(time.monotonic() - at, 1)
        assert _holder(cluster) != leader
    finally:
        cluster.scale_operator(1)
        kubectl("delete", "finetunejob", "one-acts", "after-the-leader", "--ignore-not-found")


def test_suspend_and_resume(cluster: Cluster) -> None:
    spec = {"training": {"maxSteps": 15}, "checkpoint": {"everySteps": 100}}
    job = start(cluster.kubectl, "suspended", spec)
    step = job.wait_step(3)
    job.change(suspend=True)
    job.wait_state("Suspended")
    wait_for("its pods to leave", lambda: not _active(job.pods()), 60)
    assert job.conditions()["Suspended"]["status"] == "True"
    job.change(suspend=False)
    status = job.complete()
    assert status.get("restarts", 0) == 0, "a resume is no restart"
    assert status["attempts"][-1]["fromStep"] >= step, "it went on from the checkpoint made on SIGTERM"
    assert job.conditions()["Suspended"]["status"] == "False"


def test_deadline_and_ttl(cluster: Cluster) -> None:
    job = start(cluster.kubectl, "too-slow", {**NOWHERE, "activeDeadlineSeconds": 3, "ttlSecondsAfterFinished": 2})
    status = job.wait_state("Failed", timeout=30)
    assert status["reason"] == "DeadlineExceeded"
    assert "activeDeadlineSeconds" in status["message"]
    wait_for("the job to delete itself", lambda: cluster.gone("finetunejobs", "") or _absent(cluster, job.name), 30)


def test_another_controllers_job_is_left_alone(cluster: Cluster) -> None:
    job = start(cluster.kubectl, "foreign", {"managedBy": "example.com/other"})
    probe = start(cluster.kubectl, "own", NOWHERE)
    probe.wait_state("Pending")
    assert "status" not in job.object
    assert not job.pods()
    cluster.kubectl("delete", "finetunejob", job.name, probe.name)


def _absent(cluster: Cluster, name: str) -> bool:
    return name not in cluster.kubectl("get", "finetunejobs", "-o", "name")


def _active(pods: list[dict[str, Any]]) -> list[str]:
    return [pod["metadata"]["name"] for pod in pods if pod["status"]["phase"] in ("Pending", "Running")]


def _names(cluster: Cluster) -> list[str]:
    return [pod["metadata"]["name"] for pod in cluster.operator_pods()]


def _holder(cluster: Cluster) -> str | None:
    """The pod that holds the Lease."""
    for lease in cluster.kubectl.list("leases"):
        if lease["metadata"]["name"].startswith(RELEASE):
            identity = str(lease["spec"].get("holderIdentity") or "")
            return next((name for name in _names(cluster) if name in identity), None)
    return None


def _children_applied(cluster: Cluster, pod: str) -> float:
    """How many Jobs a replica has applied, from its own metrics."""
    metrics = cluster.kubectl(
        "get", "--raw", f"/api/v1/namespaces/{cluster.kubectl.namespace}/pods/{pod}:8080/proxy/metrics"
    )
    lines = [line for line in metrics.splitlines() if line.startswith("finetune_operator_api_requests_total")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if 'resource="jobs"' in line and 'verb="apply"' in line)
