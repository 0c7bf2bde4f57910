"""Puts the parts together and runs them: stand by, lead, sync, work, leave."""

import asyncio
import logging
import signal
import time
from collections import Counter
from types import FrameType

from kubernetes.aio.client.configuration import Configuration

from finetune_api.status import State
from finetune_operator.config import OperatorConfig
from finetune_operator.shell import metrics
from finetune_operator.shell.api import Api, load_configuration
from finetune_operator.shell.controller import Controller
from finetune_operator.shell.events import EventRecorder
from finetune_operator.shell.poller import Poller
from finetune_operator.shell.queue import WorkQueue
from finetune_operator.shell.side import Side
from finetune_operator.shell.store import UNKNOWN_STATE, Store
from finetune_operator.shell.sync import Synchronizer

_LOG = logging.getLogger(__name__)
WATCHES_UP_SECONDS = 3.0
"""After so long kopf's watches have begun."""
EXIT_SECONDS = 2.0
"""What kopf gets to end its tasks."""


def run(config: OperatorConfig) -> int:
    """Runs the operator until it is told to stop. Returns the exit code."""
    store = Store()
    side = Side(config, refresh_gauges=lambda: _refresh_gauges(store))
    stopped = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        side.interrupt()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    side.start()
    try:
        if side.wait_until_leading() and not stopped:
            asyncio.run(_lead(config, store, side))
    finally:
        side.stop()
    return 0


async def _lead(config: OperatorConfig, store: Store, side: Side) -> None:
    started = time.monotonic()
    stop = asyncio.Event()
    _handle_signals(stop)
    configuration = await load_configuration(config.kubeconfig)
    api, queue = Api(configuration), WorkQueue()
    controller = Controller(api, store, queue, EventRecorder(api, config.identity), config.plan)
    synchronizer = Synchronizer(api, store, queue, config.namespaces)
    tasks: list[asyncio.Task[None]] = []
    watching: asyncio.Task[None] | None = None
    try:
        await synchronizer.sync()
        side.synced = True
        metrics.SYNCED.set(1)
        tasks += [asyncio.create_task(controller.work()) for _ in range(config.workers)]
        await _first_pass(queue, store, started)
        poller = Poller(store, queue, config.poll_interval_seconds, config.plan.http_port)
        tasks += [asyncio.create_task(synchronizer.run()), asyncio.create_task(poller.run())]
        watching = asyncio.create_task(_watch(config, configuration, store, queue, synchronizer, stop))
        stopping = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait({watching, stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        # In this order: nothing is written any more, then another replica may lead, then kopf may take its time to end.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        side.stop()
        if watching is not None:
            watching.cancel()
            await asyncio.wait({watching}, timeout=EXIT_SECONDS)
        await api.close()


def _handle_signals(stop: asyncio.Event) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)


async def _first_pass(queue: WorkQueue, store: Store, started: float) -> None:
    """Every job is looked at once. The watches, which begin with lists of their own, start after it."""
    while not queue.idle:
        await asyncio.sleep(0.01)
    seconds = time.monotonic() - started
    metrics.FIRST_PASS_SECONDS.set(seconds)
    _LOG.info("looked at %d jobs in %.2f s", len(store), seconds)


async def _watch(
    config: OperatorConfig,
    configuration: Configuration,
    store: Store,
    queue: WorkQueue,
    synchronizer: Synchronizer,
    stop: asyncio.Event,
) -> None:
    """Runs kopf until it is cancelled."""
    # Imported here: it takes most of the start-up time, and the first pass needs none of it.
    import kopf

    from finetune_operator.shell.watch import build_registry, build_settings

    # What vanished between our first list and kopf's left no event: list again once kopf watches.
    asyncio.get_running_loop().call_later(WATCHES_UP_SECONDS, synchronizer.watch_restarted)
    ours = asyncio.all_tasks()
    root_tasks = await kopf.spawn_tasks(
        registry=build_registry(configuration, store, queue, synchronizer),
        settings=build_settings(),
        standalone=True,
        clusterwide=not config.namespaces,
        namespaces=config.namespaces,
    )
    # kopf has taken the signals for itself; but our own tasks have to end before its do.
    _handle_signals(stop)
    await kopf.run_tasks(root_tasks, ignored=ours)


def _refresh_gauges(store: Store) -> None:
    states = Counter(entry.state for entry in list(store) if entry.body is not None)
    for state in (UNKNOWN_STATE, *State):
        metrics.JOBS.labels(str(state)).set(states.get(str(state), 0))
