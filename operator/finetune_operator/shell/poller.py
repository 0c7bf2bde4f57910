"""Asks rank 0 of each running job for its progress, at a bounded rate."""

import asyncio
import logging

import aiohttp
from pydantic import ValidationError

from finetune_api.reports import ProgressReport
from finetune_operator.shell.metrics import POLLS
from finetune_operator.shell.queue import WorkQueue
from finetune_operator.shell.store import Entry, Store

_LOG = logging.getLogger(__name__)
TIMEOUT_SECONDS = 2.0
CONCURRENCY = 16
_SIZE_LIMIT = 64 * 1024


class Poller:
    """Polls every job once in each interval, spread evenly over it."""

    def __init__(self, store: Store, queue: WorkQueue, interval_seconds: float, port: int) -> None:
        self._store = store
        self._queue = queue
        self._interval = interval_seconds
        self._port = port
        self._slots = asyncio.Semaphore(CONCURRENCY)

    async def run(self) -> None:
        """Polls until it is cancelled."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        # Pods are asked directly, whatever proxy the environment names, and each seldom: no connection is kept.
        connector = aiohttp.TCPConnector(limit=CONCURRENCY, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False, connector=connector) as session:
            while True:
                targets = [(entry, pod.ip) for entry in self._store if (pod := entry.rank0()) is not None]
                if not targets:
                    await asyncio.sleep(self._interval)
                    continue
                pause = self._interval / len(targets)
                async with asyncio.TaskGroup() as group:
                    for entry, ip in targets:
                        await self._slots.acquire()
                        group.create_task(self._poll(session, entry, ip))
                        await asyncio.sleep(pause)

    async def _poll(self, session: aiohttp.ClientSession, entry: Entry, ip: str) -> None:
        host = f"[{ip}]" if ":" in ip else ip
        try:
            async with session.get(f"http://{host}:{self._port}/progress", allow_redirects=False) as response:
                response.raise_for_status()
                report = ProgressReport.model_validate_json(await response.content.read(_SIZE_LIMIT))
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            # Usual while the trainer starts and ends.
            POLLS.labels("unreachable").inc()
            _LOG.debug("%s/%s: no progress from %s: %s", entry.namespace, entry.name, ip, error)
        except ValidationError as error:
            POLLS.labels("unreadable").inc()
            _LOG.warning("%s/%s: unreadable progress: %s", entry.namespace, entry.name, error)
        else:
            POLLS.labels("ok").inc()
            if report != entry.progress:
                entry.progress = report
                self._queue.add(entry.uid)
        finally:
            self._slots.release()
