"""What people see: `kubectl get ftj`, `-o wide` and `describe` for every state a job can be in.

Each case brings a real job into a state and looks at the printed lines. With UPDATE_DOCS=1 the lines become
docs/what-you-see.md.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.cluster import ROOT, Cluster, kill_rank
from tests.e2e.jobs import CLAIM, HELD_OUT, Job, start
from tests.e2e.kube import wait_for

pytestmark = pytest.mark.cluster

DOCUMENT = ROOT / "docs" / "what-you-see.md"
LONG: dict[str, Any] = {"training": {"maxSteps": 5000}, "datasets": {"evaluation": []}, "checkpoint": {"everySteps": 5}}
HUGE = {"requests": {"cpu": "500m"}, "limits": {"cpu": "900", "memory": "4Gi"}}


class Gallery:
    """Collects what was printed, in order."""

    def __init__(self, cluster: Cluster) -> None:
        self.kubectl = cluster.kubectl
        self.registry = cluster.images["trainer"].partition("/")[0]
        self.sections: list[str] = []

    def look(self, title: str, job: Job) -> str:
        """`get`, `get -o wide` and `describe` of the job, which the section keeps."""
        get = self.kubectl("get", "ftj", job.name)
        wide = self.kubectl("get", "ftj", job.name, "-o", "wide")
        describe = self.kubectl("describe", "ftj", job.name)
        shown = describe[describe.index("\nStatus:") + 1 :]
        self.sections.append(
            f"## {title}\n\n```console\n$ kubectl get ftj {job.name}\n{get}\n$ kubectl get ftj {job.name} -o wide\n{wide}\n"
            f"$ kubectl describe ftj {job.name}   # from Status on\n{shown}```\n"
        )
        return get + wide + describe

    def text(self) -> str:
        return HEAD + "\n".join(self.sections).replace(f"{self.registry}/", "registry.example.com/")


HEAD = """# What you see

Printed by a real cluster; `UPDATE_DOCS=1 make test TESTS=tests/e2e/test_display.py` writes this page again.

"""


@pytest.fixture(scope="module")
def gallery(cluster: Cluster) -> Any:
    shown = Gallery(cluster)
    yield shown
    if os.environ.get("UPDATE_DOCS"):
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(shown.text())


def _delete(job: Job) -> None:
    job.kubectl("delete", "finetunejob", job.name, "--wait=true")


def test_queued(cluster: Cluster, gallery: Gallery) -> None:
    """Waits for room: the nodes could take it, but others are there."""
    holder = start(cluster.kubectl, "first-in-line", LONG)
    holder.wait_state("Running")
    big = {"trainer": {"resourcesPerNode": {"requests": {"cpu": _free_cpu(cluster)}, "limits": {"memory": "1Gi"}}}}
    job = start(cluster.kubectl, "queued", {**LONG, **big, "trainer": {**big["trainer"], "numNodes": 2}})
    job.wait("Unschedulable", lambda status: status.get("reason") == "Unschedulable")
    shown = gallery.look("Queued: no room yet", job)
    assert "Pending" in shown
    assert "Insufficient cpu" in shown
    _delete(job)
    _delete(holder)


def test_running_then_restarted(cluster: Cluster, gallery: Gallery) -> None:
    job = start(cluster.kubectl, "restarted", LONG)
    job.wait("progress", lambda status: status.get("progress", {}).get("step", 0) > 6)
    shown = gallery.look("Running", job)
    assert "Running" in shown
    assert "/5000 (" in shown
    kill_rank(cluster.kubectl, job.pods()[0]["metadata"]["name"])
    job.wait("restart", lambda status: status.get("restarts") == 1)
    job.wait_step(8)
    job.wait("progress again", lambda status: status.get("state") == "Running")
    shown = gallery.look("Restarted and running again", job)
    assert "RankKilled" in shown
    _delete(job)


def test_suspended(cluster: Cluster, gallery: Gallery) -> None:
    job = start(cluster.kubectl, "suspended-job", LONG)
    job.wait_step(3)
    job.change(suspend=True)
    job.wait_state("Suspended")
    wait_for("its pods to leave", lambda: not [p for p in job.pods() if p["status"]["phase"] == "Running"], 60)
    shown = gallery.look("Suspended", job)
    status = job.status
    assert "suspend" in status["message"]
    assert status["progress"]["step"] == status["lastCheckpoint"]["step"] >= 3, "what was saved on the way out counts"
    assert "Suspended" in shown
    _delete(job)


@pytest.mark.parametrize(
    ("name", "title", "spec", "reason", "says"),
    [
        (
            "unschedulable",
            "Unschedulable: no node can ever take it",
            {"trainer": {"resourcesPerNode": HUGE, "nodeSelector": {"gpu": "h100"}}},
            "Unschedulable",
            "node",
        ),
        (
            "missing-image",
            "Missing its image",
            {"trainer": {"image": "$TRAINER:no-such-tag"}},
            "ImagePullFailed",
            "trainer.image",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "-" in value else "",
)
def test_cannot_start(
    cluster: Cluster, gallery: Gallery, name: str, title: str, spec: dict[str, Any], reason: str, says: str
) -> None:
    if image := spec["trainer"].get("image"):
        spec = {"trainer": {"image": image.replace("$TRAINER", cluster.images["trainer"].rpartition(":")[0])}}
    job = start(cluster.kubectl, name, spec)
    job.wait(reason, lambda status: status.get("reason") == reason)
    shown = gallery.look(title, job)
    assert "Pending" in shown
    assert says in job.status["message"]
    _delete(job)


def test_failed_by_bad_data(cluster: Cluster, gallery: Gallery) -> None:
    data = {"train": [{"uri": f"pvc://{CLAIM}/datasets/missing.jsonl"}], "evaluation": []}
    job = start(cluster.kubectl, "bad-data", {"datasets": data})
    job.wait_state("Failed")
    shown = gallery.look("Failed: bad data", job)
    assert "DataError" in shown
    assert "missing.jsonl" in shown
    _delete(job)


def test_out_of_restarts(cluster: Cluster, gallery: Gallery) -> None:
    job = start(cluster.kubectl, "out-of-restarts", {**LONG, "recovery": {"backoffLimit": 1}})
    for attempt in (1, 2):
        wait_for(f"attempt {attempt}", lambda: job.pods(attempt), 60)  # noqa: B023
        _once_training(job, attempt, lambda: kill_rank(cluster.kubectl, job.pods()[0]["metadata"]["name"]))
    job.wait_state("Failed")
    shown = gallery.look("Out of restarts", job)
    assert "BackoffLimitExceeded" in shown
    assert "RankKilled" in shown
    _delete(job)


def test_complete(cluster: Cluster, gallery: Gallery) -> None:
    job = start(cluster.kubectl, "complete", {"datasets": {"evaluation": [{"uri": HELD_OUT, "maxSamples": 4}]}})
    job.complete()
    shown = gallery.look("Complete", job)
    assert "20/20 (100%)" in shown
    assert f"pvc://{CLAIM}/outputs/complete" in shown
    _delete(job)


def _once_training(job: Job, attempt: int, then: Callable[[], None]) -> None:
    job.wait(f"attempt {attempt}", lambda status: status.get("attempts", [{}])[-1].get("number") == attempt)
    job.wait_step(1)
    then()


def _free_cpu(cluster: Cluster) -> str:
    """More than what is left on the node that runs something, less than a whole node has."""
    node = cluster.kubectl("get", "nodes", "-o", "jsonpath={.items[0].status.allocatable.cpu}")
    return f"{int(node) * 1000 - 100}m" if node.isdigit() else node
