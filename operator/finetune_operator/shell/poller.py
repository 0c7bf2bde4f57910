"""Asks rank 0 of each running job for its progress, at a bounded rate."""

import asyncio
import logging
import math
import time

import aiohttp
from pydantic import ValidationError

from finetune_api.reports import Activity, ProgressReport
from finetune_operator.core.observe import ObservedPod
from finetune_operator.shell.metrics import POLLS
from finetune_operator.shell.queue import WorkQueue
from finetune_operator.shell.store import Entry, Store

_LOG = logging.getLogger(__name__)
TIMEOUT_SECONDS = 2.0
CONCURRENCY = 16
"""Polls at the same time, and as many again of pods that did not answer last time: each takes the whole timeout."""
TICK_SECONDS = 0.25
STARTING_INTERVAL_SECONDS = 1.0
"""Between polls of a job that has not begun to train."""
_SIZE_LIMIT = 64 * 1024


class Poller:
    """Polls every running job once in each interval; one that is starting up, more often."""

    def __init__(self, store: Store, queue: WorkQueue, interval_seconds: float, port: int) -> None:
        self._store = store
        self._queue = queue
        self._interval = interval_seconds
        self._port = port
        self._answering, self._silent = asyncio.Semaphore(CONCURRENCY), asyncio.Semaphore(CONCURRENCY)

    async def run(self) -> None:
        """Polls until it is cancelled."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        # Pods are asked directly, whatever proxy the environment names, and each seldom: no connection is kept.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with (
            aiohttp.ClientSession(timeout=timeout, trust_env=False, connector=connector) as session,
            asyncio.TaskGroup() as group,
        ):
            while True:
                now = time.monotonic()
                for entry in self._store:
                    if entry.poll_at <= now and entry.rank0() is not None:
                        entry.poll_at = math.inf  # until this poll has ended
                        group.create_task(self._poll_in_turn(session, entry))
                await asyncio.sleep(TICK_SECONDS)

    async def _poll_in_turn(self, session: aiohttp.ClientSession, entry: Entry) -> None:
        async with self._silent if entry.silent else self._answering:
            pod = entry.rank0()
            if pod is None:
                entry.poll_at = time.monotonic()
            else:
                await self._poll(session, entry, pod)

    async def _poll(self, session: aiohttp.ClientSession, entry: Entry, pod: ObservedPod) -> None:
        entry.silent = False
        host = f"[{pod.ip}]" if ":" in pod.ip else pod.ip
        try:
            async with session.get(f"http://{host}:{self._port}/progress", allow_redirects=False) as response:
                response.raise_for_status()
                report = ProgressReport.model_validate_json(await _read(response))
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            # Usual while the trainer starts and ends.
            POLLS.labels("unreachable").inc()
            entry.silent = isinstance(error, TimeoutError)
            _LOG.debug("%s/%s: no progress from %s: %s", entry.namespace, entry.name, pod.ip, error)
        except ValidationError as error:
            POLLS.labels("unreadable").inc()
            _LOG.warning("%s/%s: unreadable progress: %s", entry.namespace, entry.name, error)
        else:
            POLLS.labels("ok").inc()
            if report != entry.progress:
                entry.progress = report
                self._queue.add(entry.uid)
        known = entry.progress
        starting = known is None or known.attempt != pod.attempt or known.activity is Activity.LOADING
        soon = starting and not entry.silent
        entry.poll_at = time.monotonic() + (min(STARTING_INTERVAL_SECONDS, self._interval) if soon else self._interval)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The body, or as much of it as anybody may send."""
    body = bytearray()
    async for part in response.content.iter_any():
        body += part
        if len(body) > _SIZE_LIMIT:
            break
    return bytes(body)
