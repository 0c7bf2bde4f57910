"""The shell's own small parts: work queue, store, controller, events, merge patch, configuration, election."""

import asyncio
from typing import Any

import pytest
from prometheus_client import REGISTRY

from finetune_operator.config import resolve_config
from finetune_operator.core.observe import parse_pod
from finetune_operator.core.situation import Apply, Event, Kind
from finetune_operator.shell.controller import Controller
from finetune_operator.shell.election import Election, LeaseConfig, LeaseLostError
from finetune_operator.shell.errors import ApiError, ConflictError, NotFoundError
from finetune_operator.shell.events import EventRecorder
from finetune_operator.shell.patch import merge_patch
from finetune_operator.shell.queue import WorkQueue
from finetune_operator.shell.store import Entry, Store
from tests.unit.operator.samples import CONFIG, UID, job_body

CHILDREN_COUNT = "finetune_operator_children_seconds_count"


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 10))


def test_a_key_that_waits_is_there_once() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        queue.add("a")
        queue.add("a")
        assert len(queue) == 1
        assert await queue.get() == "a"
        queue.done("a")
        assert queue.idle

    run(scenario())


def test_a_key_is_never_worked_on_twice_at_once_and_comes_again() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        queue.add("a")
        key = await queue.get()
        queue.add("a")
        assert len(queue) == 0
        queue.done(key)
        assert await queue.get() == "a"
        queue.done("a")
        assert queue.idle

    run(scenario())


def test_urgent_keys_go_first() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        for key, urgent in (("old", False), ("new", True), ("newer", True)):
            queue.add(key, urgent=urgent)
        assert [await queue.get() for _ in range(3)] == ["new", "newer", "old"]

    run(scenario())


def test_of_several_timers_the_earliest_counts() -> None:
    async def scenario() -> float:
        queue, loop = WorkQueue(), asyncio.get_running_loop()
        started = loop.time()
        queue.add_after("a", 60)
        queue.add_after("a", 0.05)
        queue.add_after("a", 30)
        await queue.get()
        return loop.time() - started

    assert 0.04 < run(scenario()) < 20


def test_failures_wait_longer_each_time_and_success_forgets_them() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        queue.add("a")
        waits = []
        for _ in range(3):
            waits.append(queue.retry(await queue.get()))
            queue.add("a")
        assert waits == [0.2, 0.4, 0.8]
        queue.done(await queue.get())
        queue.add("a")
        assert queue.retry(await queue.get()) == 0.2

    run(scenario())


def test_many_workers_share_the_keys() -> None:
    async def scenario() -> None:
        queue: WorkQueue = WorkQueue()
        active: set[str] = set()
        worked: list[str] = []

        async def work() -> None:
            while True:
                key = await queue.get()
                assert key not in active
                active.add(key)
                await asyncio.sleep(0)
                active.discard(key)
                worked.append(key)
                queue.done(key)

        workers = [asyncio.create_task(work()) for _ in range(8)]
        for number in range(200):
            queue.add(f"key-{number % 50}")
            if number % 7 == 0:
                await asyncio.sleep(0)
        while not queue.idle:
            await asyncio.sleep(0)
        for worker in workers:
            worker.cancel()
        assert set(worked) == {f"key-{number}" for number in range(50)}

    run(scenario())


def labels(attempt: int = 1) -> dict[str, str]:
    return {"finetune.dev/job-uid": UID, "finetune.dev/job-name": "tune", "finetune.dev/attempt": str(attempt)}


def job_object(version: int, uid: str = "j1", **status: Any) -> dict[str, Any]:
    meta = {
        "name": "tune-1", "namespace": "team", "uid": uid, "resourceVersion": str(version),
        "labels": labels(), "creationTimestamp": "2026-11-24T12:00:00Z",
        "ownerReferences": [{"kind": "FineTuneJob", "name": "tune", "uid": UID, "controller": True}],
    }  # fmt: skip
    return {"metadata": meta, "spec": {"completions": 1}, "status": status}


def pod_object(version: int, **status: Any) -> dict[str, Any]:
    meta = {
        "name": "tune-1-0-x", "namespace": "team", "uid": "p1", "resourceVersion": str(version), "labels": labels(),
        "ownerReferences": [{"kind": "Job", "name": "tune-1", "uid": "j1", "controller": True}],
    }  # fmt: skip
    return {"metadata": meta, "spec": {}, "status": status}


def test_an_older_event_never_replaces_what_is_newer() -> None:
    store = Store()
    body = job_body()
    body["metadata"]["resourceVersion"] = "20"
    assert store.put_finetunejob(body) == UID
    body["metadata"]["resourceVersion"] = "9"
    assert store.put_finetunejob(body) is None
    failed = {"type": "Failed", "status": "True"}
    assert store.put_job(job_object(5, conditions=[failed])) == UID
    assert store.put_job(job_object(4)) is None
    entry = store.get(UID)
    assert entry is not None
    assert entry.observed().jobs[0].failed


def test_what_does_not_count_is_no_news() -> None:
    store = Store()
    assert store.put_pod(pod_object(1, phase="Pending")) == UID
    assert store.put_pod(pod_object(2, phase="Pending", hostIP="10.0.0.1")) is None
    assert store.put_pod(pod_object(3, phase="Running")) == UID


def test_what_we_deleted_stays_deleted() -> None:
    store = Store()
    store.put_job(job_object(5))
    store.deleted_by_us(UID, "tune-1")
    assert store.put_job(job_object(6)) is None
    assert store.put_job(job_object(7, uid="j2")) == UID
    store.drop_job(job_object(8))
    entry = store.get(UID)
    assert entry is not None
    assert [job.uid for job in entry.observed().jobs] == ["j2"]


@pytest.mark.parametrize("known", [True, False])
def test_what_only_has_the_labels_is_nobodys_child(known: bool) -> None:
    """Anybody may write labels: in another namespace, or on a Job or a pod that no Job of ours made."""
    store = Store()
    if known:
        store.put_finetunejob(job_body())
    elsewhere = pod_object(5, phase="Failed")
    elsewhere["metadata"]["namespace"] = "theirs"
    odd_pod, odd_job = pod_object(5), job_object(5)
    odd_pod["metadata"]["annotations"] = {"batch.kubernetes.io/job-completion-index": "x"}
    del odd_job["spec"]["completions"]
    assert [store.put_pod(odd_pod), store.put_job(odd_job)] == [None, None]
    copied_pod, copied_job = pod_object(5, phase="Succeeded"), job_object(5)
    del copied_pod["metadata"]["ownerReferences"], copied_job["metadata"]["ownerReferences"]
    assert [store.put_pod(copied_pod), store.put_job(copied_job)] == [None, None]
    store.put_pod(elsewhere)
    store.put_finetunejob(job_body())
    entry = store.get(UID)
    assert entry is not None and entry.body is not None
    assert entry.observed().jobs == entry.observed().pods == ()


class FakeApi:
    """The API server, as far as one job's objects go."""

    def __init__(self, refuses: Exception) -> None:
        self.refuses = refuses
        self.patches: list[dict[str, Any]] = []

    async def apply(self, *_: Any) -> dict[str, Any]:
        raise self.refuses

    async def delete(self, *_: Any) -> None:
        raise self.refuses

    async def patch_status(self, _namespace: str, _name: str, body: dict[str, Any]) -> dict[str, Any]:
        self.patches.append(body["status"])
        return {**job_body(), "status": body["status"]}


def reconciled(refuses: Exception, status: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """What is written to the status of a job whose objects can neither be made nor deleted."""
    store, queue, api = Store(), WorkQueue(), FakeApi(refuses)
    store.put_finetunejob({**job_body(ttlSecondsAfterFinished=0), "status": status or {}})
    controller = Controller(api, store, queue, EventRecorder(api, "test"), CONFIG)  # type: ignore[arg-type]
    with pytest.raises(ApiError):
        run(controller._reconcile(UID))
    return api.patches


def test_what_cannot_be_made_is_in_the_status_and_a_result_stays_what_it_is() -> None:
    (patch,) = reconciled(ApiError(403, "Forbidden", "exceeded quota"))
    assert patch["reason"] == "ApplyFailed" and "exceeded quota" in patch["message"]
    twice = 'failed to create typed patch object: duplicate entries for key [name="HOME"]'
    assert len(reconciled(ApiError(500, "InternalError", twice))) == 1
    webhook = 'Internal error occurred: failed calling webhook "policy": connection refused'
    assert len(reconciled(ApiError(500, "InternalError", webhook))) == 1
    assert reconciled(ApiError(500, "InternalError", "etcd has no leader")) == []
    complete = {
        "state": "Complete",
        "completionTime": "2026-11-24T12:00:00Z",
        "conditions": [
            {"type": "Complete", "status": "True", "reason": "Complete", "message": "",
             "lastTransitionTime": "2026-11-24T12:00:00Z"}
        ],
    }  # fmt: skip
    assert reconciled(ApiError(403, "Forbidden", "nothing may be deleted"), complete) == []


def test_the_depth_of_the_queue_is_that_of_the_scrape() -> None:
    queue, api = WorkQueue(), FakeApi(ApiError(500, "", ""))
    Controller(api, Store(), queue, EventRecorder(api, "test"), CONFIG)  # type: ignore[arg-type]
    for depth, key in enumerate("abc", start=1):
        queue.add(key)
        assert REGISTRY.get_sample_value("finetune_operator_queue_depth") == depth


def test_only_new_jobs_count_in_the_time_until_children() -> None:
    class Applies(FakeApi):
        async def apply(self, *_: Any) -> dict[str, Any]:
            return job_object(9)

    def counted(*puts: tuple[dict[str, Any], bool]) -> float:
        """How many measurements two child Jobs bring, after these versions of the job."""
        store, api = Store(), Applies(ApiError(500, "", ""))
        for version, (body, created) in enumerate(puts, start=1):
            body["metadata"]["resourceVersion"] = str(version)
            store.put_finetunejob(body, created=created)
        controller = Controller(api, store, WorkQueue(), EventRecorder(api, "test"), CONFIG)  # type: ignore[arg-type]
        before = REGISTRY.get_sample_value(CHILDREN_COUNT) or 0.0
        for attempt in (1, 2):
            run(controller._apply(store.get(UID), Apply(Kind.JOB, f"tune-{attempt}", {})))  # type: ignore[arg-type]
        return (REGISTRY.get_sample_value(CHILDREN_COUNT) or 0.0) - before

    tried = {"status": {"attempts": [{"number": 1}]}}
    assert counted((job_body(), True)) == 1
    assert counted((job_body(), True), ({**job_body(), "status": {"state": "Pending"}}, False)) == 1
    assert counted((job_body(), False)) == 0, "it was listed: an operator that restarts did not make it wait"
    assert counted((job_body(suspend=True), True), (job_body(), False)) == 0
    assert counted((job_body(), True), (job_body(suspend=True), False), (job_body(), False)) == 0
    assert counted(({**job_body(), **tried}, True)) == 0


def test_an_event_that_has_expired_is_written_anew() -> None:
    sent: list[tuple[str, int]] = []

    class Events:
        async def request(self, method: str, *_: object, body: dict[str, Any], **_more: Any) -> None:
            sent.append((method, body["count"]))
            if sent[-1] == ("PATCH", 3):
                raise NotFoundError(404, "NotFound", "expired")

    async def scenario() -> None:
        recorder = EventRecorder(Events(), "test")  # type: ignore[arg-type]
        for _ in range(4):
            await recorder.record(Entry("team", "tune", UID), Event("Normal", "Suspended", "The job is suspended."))

    run(scenario())
    assert sent == [("POST", 1), ("PATCH", 2), ("PATCH", 3), ("POST", 1), ("PATCH", 2)]


def test_a_full_list_finds_what_vanished_without_an_event() -> None:
    store = Store()
    store.put_finetunejob(job_body())
    store.put_pod(pod_object(5))
    assert store.retain("pods", None, {"p1"}, 9) == []
    assert store.retain("pods", None, set(), 4) == []
    assert store.retain("pods", "others", set(), 9) == []
    assert store.retain("pods", "team", set(), 9) == [UID]
    assert store.retain("finetunejobs", None, set(), 99) == [UID]
    assert len(store) == 0


@pytest.mark.parametrize(
    ("old", "new", "patch"),
    [
        ({}, {"a": 1}, {"a": 1}),
        ({"a": 1}, {}, {"a": None}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}, {"a": {"c": None}}),
        ({"a": [1, 2]}, {"a": [2]}, {"a": [2]}),
        ({"a": {"b": 1}}, {"a": {"b": 1}}, {}),
    ],
)
def test_merge_patch(old: dict[str, Any], new: dict[str, Any], patch: dict[str, Any]) -> None:
    assert merge_patch(old, new) == patch


def test_a_pod_is_read_from_what_the_api_server_says() -> None:
    body = pod_object(
        7,
        phase="Failed",
        podIP="10.0.0.7",
        conditions=[
            {"type": "PodScheduled", "status": "True"},
            {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"},
        ],
        containerStatuses=[
            {"name": "istio-proxy", "state": {"running": {}}},
            {
                "name": "trainer",
                "state": {
                    "terminated": {
                        "exitCode": 90,
                        "reason": "Error",
                        "message": "{}",
                        "finishedAt": "2026-11-24T12:00:09Z",
                    }
                },
            },
        ],
    )
    body["metadata"] |= {"deletionTimestamp": "2026-11-24T12:01:00Z", "deletionGracePeriodSeconds": 60}
    body["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] = "1"
    read = parse_pod(body)
    assert (read.index, read.disruption, read.scheduled, read.running) == (1, "DeletionByTaintManager", True, False)
    assert read.terminated is not None
    assert (read.terminated.exit_code, str(read.delete_time)) == (90, "2026-11-24 12:00:00+00:00")


def test_flags_win_over_environment() -> None:
    environment = {
        "FINETUNE_TRAINER_IMAGE": "env:1",
        "FINETUNE_WORKERS": "3",
        "FINETUNE_NAMESPACES": "a,b",
        "POD_NAME": "op-0",
    }
    config = resolve_config(["--trainer-image", "flag:1"], environment)
    assert (config.plan.trainer_image, config.workers, config.namespaces) == ("flag:1", 3, ("a", "b"))
    assert (config.identity, config.lease is not None) == ("op-0", True)
    assert resolve_config(["--no-leader-elect", "--namespace", "c"], environment).lease is None


@pytest.mark.parametrize("arguments", [[], ["--trainer-image", "x", "--lease-duration", "2"]])
def test_wrong_arguments_end_at_once(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        resolve_config(arguments, {})


class FakeLeases:
    """The API server, as far as one Lease goes."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.down = False

    async def request(self, method: str, _target: object, *, body: Any = None, **_: Any) -> dict[str, Any]:
        if self.down:
            raise ConflictError(503, "Unavailable", "down")
        if method == "GET":
            if self.lease is None:
                raise NotFoundError(404, "NotFound", "no Lease")
            return self.lease
        version = int((self.lease or {"metadata": {}})["metadata"].get("resourceVersion", "0"))
        if method == "PUT" and body["metadata"]["resourceVersion"] != str(version):
            raise ConflictError(409, "Conflict", "changed")
        self.lease = {**body, "metadata": {**body["metadata"], "resourceVersion": str(version + 1)}}
        return self.lease


def replica(api: FakeLeases, name: str, duration_seconds: float = 1.0) -> Election:
    timing = {"duration_seconds": duration_seconds, "renew_deadline_seconds": 0.3, "retry_seconds": 0.05}
    return Election(api, LeaseConfig("ns", "op", name, **timing))  # type: ignore[arg-type]


def test_one_leads_and_a_release_hands_over_at_once() -> None:
    async def scenario() -> None:
        api = FakeLeases()
        first, second = replica(api, "one"), replica(api, "two")
        await first.acquire()
        waiting = asyncio.create_task(second.acquire())
        await asyncio.sleep(0.2)
        assert not second.leading
        await first.release()
        await asyncio.wait_for(waiting, 0.5)
        assert second.leading

    run(scenario())


def test_a_leader_that_dies_is_followed_after_the_lease_ran_out() -> None:
    async def scenario() -> None:
        api = FakeLeases()
        await replica(api, "one").acquire()
        second = replica(api, "two")
        await asyncio.wait_for(second.acquire(), 3)
        assert api.lease is not None
        assert api.lease["spec"]["holderIdentity"] == "two"
        assert api.lease["spec"]["leaseTransitions"] == 2

    run(scenario())


def test_a_leader_that_cannot_renew_gives_up_before_the_lease_runs_out() -> None:
    async def scenario() -> float:
        api = FakeLeases()
        leader = replica(api, "one", duration_seconds=30)
        await leader.acquire()
        api.down = True
        started = asyncio.get_running_loop().time()
        with pytest.raises(LeaseLostError):
            await leader.hold()
        return asyncio.get_running_loop().time() - started

    assert run(scenario()) < 20
