"""Puts the parts together and runs them: stand by, lead, sync, work, leave."""

import asyncio
import logging
import signal
import time
from collections import Counter
from types import FrameType

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
    configuration = await load_configuration(config.kubeconfig)
    api, queue = Api(configuration), WorkQueue()
    controller = Controller(api, store, queue, EventRecorder(api, config.identity), config.plan)
    synchronizer = Synchronizer(api, store, queue, config.namespaces)
    # Tasks that are there before kopf starts are not cancelled by it: they end after it, in order.
    tasks: list[asyncio.Task[None]] = []
    try:
        await synchronizer.sync()
        side.synced = True
        metrics.SYNCED.set(1)
        tasks += [asyncio.create_task(controller.work()) for _ in range(config.workers)]
        await _first_pass(queue, store, started)
        tasks.append(asyncio.create_task(synchronizer.run()))
        poller = Poller(store, queue, config.poll_interval_seconds, config.plan.http_port)
        tasks.append(asyncio.create_task(poller.run()))
        await _watch(config, configuration, store, queue, synchronizer, tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await api.close()


async def _first_pass(queue: WorkQueue, store: Store, started: float) -> None:
    """Every job is looked at once; watches start meanwhile is not needed: nothing is missed, since they list anew."""
    while not queue.idle:
        await asyncio.sleep(0.01)
    seconds = time.monotonic() - started
    metrics.FIRST_PASS_SECONDS.set(seconds)
    _LOG.info("looked at %d jobs in %.2f s", len(store), seconds)


async def _watch(
    config: OperatorConfig,
    configuration: object,
    store: Store,
    queue: WorkQueue,
    synchronizer: Synchronizer,
    tasks: list[asyncio.Task[None]],
) -> None:
    """Runs kopf until a signal, or until one of our own tasks ends, which none should."""
    # Imported here: it takes most of the start-up time, and the first pass needs none of it.
    import kopf

    from finetune_operator.shell.watch import build_registry, build_settings

    watching = asyncio.create_task(
        kopf.operator(
            registry=build_registry(configuration, store, queue, synchronizer),
            settings=build_settings(),
            standalone=True,
            clusterwide=not config.namespaces,
            namespaces=config.namespaces,
        )
    )
    done, _ = await asyncio.wait({watching, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    if watching not in done:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    for task in done:
        task.result()


def _refresh_gauges(store: Store) -> None:
    states = Counter(entry.state for entry in list(store) if entry.body is not None)
    for state in (UNKNOWN_STATE, *State):
        metrics.JOBS.labels(str(state)).set(states.get(str(state), 0))
