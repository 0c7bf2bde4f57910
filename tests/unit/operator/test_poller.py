"""Polls of progress: real HTTP on the addresses of this machine, one for each pod."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_api.reports import Activity, ProgressReport
from finetune_operator.core.observe import ObservedJob, ObservedPod
from finetune_operator.shell import poller as poller_module
from finetune_operator.shell.poller import CONCURRENCY, Poller
from finetune_operator.shell.queue import WorkQueue
from finetune_operator.shell.store import Entry, Store
from tests.trainer.jobs import free_port

NOW = datetime(2026, 11, 24, tzinfo=UTC)
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def report(step: int) -> bytes:
    return ProgressReport(attempt=1, activity=Activity.TRAINING, step=step, heartbeat_time=NOW).to_json().encode()


class Pods:
    """Pods that each do something of their own when they are asked, and a poller that asks them."""

    def __init__(self, interval_seconds: float = 0.0) -> None:
        self.store = Store()
        self.port = free_port()
        self.asked: Counter[str] = Counter()
        self.poller = Poller(self.store, WorkQueue(), interval_seconds, self.port)

    async def add(self, answer: Answer) -> Entry:
        number = len(self.store)
        entry = Entry("team", f"job-{number}", f"uid-{number}", may_run=True)
        entry.jobs["job"] = ObservedJob("job", "j", 1, 1, NOW, 1)
        entry.pods["pod"] = ObservedPod("pod", "p", 1, 1, 0, ip=f"127.0.1.{number + 1}", running=True)
        self.store._entries[entry.uid] = entry

        async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.asked[entry.uid] += 1
            await reader.readuntil(b"\r\n\r\n")
            await answer(reader, writer)
            writer.close()

        await asyncio.start_server(ask, entry.pods["pod"].ip, self.port)
        return entry

    async def poll(self, until: Callable[[], bool]) -> None:
        """Polls until something is so."""
        task = asyncio.create_task(self.poller.run())
        while not until() and not task.done():
            await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert until()


def saying(body: bytes, *parts: int) -> Answer:
    """An answer that comes in parts, cut at these places."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        for begin, end in zip((0, *parts), (*parts, len(body)), strict=True):
            writer.write(body[begin:end])
            await writer.drain()
            await asyncio.sleep(0.02)

    return answer


async def silence(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()  # until the poller hangs up


def run(scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def test_pods_that_do_not_answer_hold_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poller_module, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(poller_module, "TIMEOUT_SECONDS", 3600.0)

    async def scenario() -> None:
        pods = Pods()
        silent = [await pods.add(silence) for _ in range(2 * CONCURRENCY)]
        for entry in silent:
            entry.silent = True
        healthy = await pods.add(saying(report(1)))
        await pods.poll(lambda: pods.asked[healthy.uid] == 5)
        assert sorted({pods.asked[entry.uid] for entry in silent}) == [0, 1], "each is asked once, some wait"
        assert sum(pods.asked[entry.uid] for entry in silent) == CONCURRENCY

    run(scenario())


def test_who_does_not_answer_is_asked_again_after_the_whole_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poller_module, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(poller_module, "TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(poller_module, "STARTING_INTERVAL_SECONDS", 900.0)

    async def scenario() -> None:
        pods = Pods(interval_seconds=3600)
        entry = await pods.add(silence)
        refusing = await pods.add(silence)
        refusing.pods["pod"] = ObservedPod("pod", "p", 1, 1, 0, ip="127.0.2.1", running=True)
        begun = asyncio.get_running_loop().time()
        await pods.poll(lambda: all(0 < each.poll_at < float("inf") for each in pods.store))
        assert entry.silent and entry.poll_at - begun > 3000
        assert not refusing.silent and refusing.poll_at - begun < 3000, "its trainer starts: it costs nothing to ask"

    run(scenario())


@pytest.mark.parametrize("parts", [(), (10,), (10, 60)])
def test_an_answer_in_parts_is_read_whole(parts: tuple[int, ...]) -> None:
    async def scenario() -> None:
        pods = Pods(interval_seconds=3600)
        entry = await pods.add(saying(report(7), *parts))
        await pods.poll(lambda: 0 < entry.poll_at < float("inf"))
        assert entry.progress is not None and entry.progress.step == 7

    run(scenario())


def test_an_answer_without_an_end_is_given_up() -> None:
    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not writer.is_closing():
            writer.write(b" " * 4096)
            await writer.drain()

    async def scenario() -> None:
        pods = Pods()
        entry = await pods.add(endless)
        await pods.poll(lambda: pods.asked[entry.uid] > 1)
        assert entry.progress is None and not entry.silent

    run(scenario())
