"""Full lists: once before anything is decided, and again whenever a watch may have missed a deletion."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from finetune_api.job import LABEL_JOB_UID
from finetune_operator.core.situation import Kind
from finetune_operator.shell.api import PODS, Api, path_of
from finetune_operator.shell.errors import ApiError
from finetune_operator.shell.queue import WorkQueue
from finetune_operator.shell.store import Store

_LOG = logging.getLogger(__name__)
FORBIDDEN = 403
SETTLE_SECONDS = 1.0
"""A list starts when no watch has (re)started for so long."""
PERIOD_SECONDS = 600.0
"""And at least so often."""


class Synchronizer:
    """Keeps the store complete."""

    def __init__(self, api: Api, store: Store, queue: WorkQueue, namespaces: tuple[str, ...]) -> None:
        self._api = api
        self._store = store
        self._queue = queue
        self._namespaces: tuple[str | None, ...] = namespaces or (None,)
        self._restarted = asyncio.Event()

    def watch_restarted(self) -> None:
        """A watch has begun with a list of its own: deletions may have been missed before it."""
        self._restarted.set()

    async def sync(self) -> None:
        """Lists jobs, then their children, in chunks, and puts in line what has changed.

        Jobs come first: so a status is never newer than the children that it is compared with. A namespace that the operator
        may not read is left out, and what is known of its jobs stays: a team may have deleted it with its Role.

        Raises:
            ApiError: the API server does not answer, or none of the namespaces may be read.
        """
        forbidden: dict[str | None, ApiError] = {}
        for kind, target, selector, put in (
            ("finetunejobs", path_of(Kind.FINE_TUNE_JOB), None, self._store.put_finetunejob),
            ("jobs", path_of(Kind.JOB), LABEL_JOB_UID, self._store.put_job),
            ("pods", PODS, LABEL_JOB_UID, self._store.put_pod),
        ):
            for namespace in self._namespaces:
                try:
                    await self._list(kind, target, namespace, selector, put)
                except ApiError as error:
                    if error.status != FORBIDDEN:
                        raise
                    forbidden[namespace] = error
        if len(forbidden) == len(self._namespaces):
            raise next(iter(forbidden.values()))
        for namespace, refusal in forbidden.items():
            _LOG.error("namespace %s is left out until the next list: %s", namespace, refusal.message)

    async def _list(
        self,
        kind: str,
        target: tuple[str, str],
        namespace: str | None,
        selector: str | None,
        put: Callable[[dict[str, Any]], str | None],
    ) -> None:
        seen: set[str] = set()
        versions: list[int] = []
        async for items, version in self._api.list_chunks(target, namespace, selector):
            versions.append(version)
            for body in items:
                seen.add(body["metadata"]["uid"])
                self._enqueue(put(body))
        # What was created after the list began is not in it, and not gone either.
        for uid in self._store.retain(kind, namespace, seen, min(versions)):
            self._queue.add(uid)

    async def run(self) -> None:
        """Lists again after watches have restarted, and now and then."""
        while True:
            try:
                await asyncio.wait_for(self._restarted.wait(), PERIOD_SECONDS)
                while self._restarted.is_set():
                    self._restarted.clear()
                    await asyncio.sleep(SETTLE_SECONDS)
            except TimeoutError:
                _LOG.debug("periodic list")
            try:
                await self.sync()
            except Exception:
                # The watches go on without it; the next restart or period tries again.
                _LOG.exception("the list of jobs and children failed")
                await asyncio.sleep(SETTLE_SECONDS)
                self._restarted.set()

    def _enqueue(self, uid: str | None) -> None:
        if uid is not None:
            self._queue.add(uid)
