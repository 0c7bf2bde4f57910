"""The reconcile loop: observe, plan, act, write status, tell. Nothing is decided here."""

import asyncio
import logging
import time
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from finetune_api.job import FineTuneJob
from finetune_api.status import FineTuneJobStatus
from finetune_operator.core.plan import plan
from finetune_operator.core.refused import refused
from finetune_operator.core.settings import PlanConfig
from finetune_operator.core.situation import Action, Apply, Delete, Event, Kind, Plan
from finetune_operator.shell import metrics
from finetune_operator.shell.api import Api
from finetune_operator.shell.errors import ApiError, ConflictError, NotFoundError
from finetune_operator.shell.events import EventRecorder
from finetune_operator.shell.patch import merge_patch
from finetune_operator.shell.queue import WorkQueue
from finetune_operator.shell.store import Entry, Store

_LOG = logging.getLogger(__name__)


class Controller:
    """Works on the queue with a fixed number of workers."""

    def __init__(self, api: Api, store: Store, queue: WorkQueue, recorder: EventRecorder, config: PlanConfig) -> None:
        self._api = api
        self._store = store
        self._queue = queue
        self._recorder = recorder
        self._config = config
        self._unreadable: dict[str, int] = {}
        # At the time of a scrape: workers that all wait for the API server take nothing and would tell nothing.
        metrics.QUEUE_DEPTH.set_function(lambda: len(queue))

    async def work(self) -> None:
        """One worker: runs until it is cancelled."""
        while True:
            uid = await self._queue.get()
            started = time.perf_counter()
            try:
                result = await self._reconcile(uid)
            except asyncio.CancelledError:
                self._queue.done(uid)
                raise
            except ConflictError as error:
                result = "conflict"
                self._complain(uid, error, self._queue.retry(uid))
            except Exception as error:
                # The border of one job: whatever is wrong with it must not stop the others.
                result = "error"
                self._complain(uid, error, self._queue.retry(uid))
            else:
                self._queue.done(uid)
            metrics.RECONCILES.labels(result).inc()
            metrics.RECONCILE_SECONDS.observe(time.perf_counter() - started)

    async def _reconcile(self, uid: str) -> str:
        entry = self._store.get(uid)
        if entry is None or entry.body is None:
            self._queue.forget(uid)
            self._unreadable.pop(uid, None)
            return "gone"
        job = await self._read(entry, entry.body)
        if job is None:
            return "unreadable"
        version = entry.version
        decision = plan(job, entry.observed(), datetime.now(UTC).replace(microsecond=0), self._config)
        try:
            await self._act(entry, decision.actions)
        except ApiError as error:
            await self._refused(entry, job, version, error)
            raise
        written = await self._write_status(entry, version, job.status, decision.status)
        for event in decision.events:
            await self._recorder.record(entry, event)
        _count(job.status, decision)
        if decision.requeue_after is not None:
            self._queue.add_after(uid, decision.requeue_after)
        return "changed" if written or decision.actions else "unchanged"

    async def _read(self, entry: Entry, body: bytes) -> FineTuneJob | None:
        """Parses the job. One of another version of the CRD is left as it is, with an event and a log line, once."""
        try:
            return FineTuneJob.model_validate_json(body)
        except ValidationError as error:
            if self._unreadable.get(entry.uid) != entry.version:
                self._unreadable[entry.uid] = entry.version
                first = error.errors()[0]
                text = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
                message = f"This operator cannot read the job, and leaves it alone: {text}"
                _LOG.warning("%s/%s: %s", entry.namespace, entry.name, message)
                await self._recorder.record(entry, Event("Warning", "Unreadable", message))
            return None

    async def _act(self, entry: Entry, actions: tuple[Action, ...]) -> None:
        """ConfigMap and Service side by side, then the Job, then what is to be deleted."""
        applies = [action for action in actions if isinstance(action, Apply)]
        before = [self._apply(entry, action) for action in applies if action.kind is not Kind.JOB]
        if before:
            await _all(before)
        for action in applies:
            if action.kind is Kind.JOB:
                await self._apply(entry, action)
        deletes = [self._delete(entry, action) for action in actions if isinstance(action, Delete)]
        if deletes:
            await _all(deletes)

    async def _apply(self, entry: Entry, action: Apply) -> None:
        try:
            body = await self._api.apply(action.kind, action.manifest)
        except ApiError as error:
            error.add_note(f"{action.kind} {action.name}")
            raise
        if action.kind is Kind.JOB:
            self._store.put_job(body)
            if entry.new_since is not None:
                metrics.CHILDREN_SECONDS.observe(time.monotonic() - entry.new_since)
                entry.new_since = None

    async def _delete(self, entry: Entry, action: Delete) -> None:
        try:
            await self._api.delete(action.kind, entry.namespace, action.name, action.uid)
        except NotFoundError:
            _LOG.debug("%s/%s: %s %s is gone already", entry.namespace, entry.name, action.kind, action.name)
        if action.kind is Kind.JOB:
            self._store.deleted_by_us(entry.uid, action.name)

    async def _write_status(self, entry: Entry, version: int, old: FineTuneJobStatus, new: FineTuneJobStatus) -> bool:
        """Writes the status if it differs. The version makes it fail if the job has changed since it was read."""
        if new == old:
            return False
        patch = merge_patch(old.to_wire(), new.to_wire())
        if not patch:
            return False
        body: dict[str, Any] = {"metadata": {"resourceVersion": str(version)}, "status": patch}
        try:
            answer = await self._api.patch_status(entry.namespace, entry.name, body)
        except NotFoundError:
            self._store.drop_finetunejob(entry.uid)
            return False
        except ConflictError:
            await self._refresh(entry)
            raise
        self._store.put_finetunejob(answer)
        return True

    async def _refresh(self, entry: Entry) -> None:
        """Reads a job anew whose last version was not the newest."""
        try:
            body = await self._api.get(Kind.FINE_TUNE_JOB, entry.namespace, entry.name)
        except NotFoundError:
            self._store.drop_finetunejob(entry.uid)
            return
        if body["metadata"]["uid"] != entry.uid:
            self._store.drop_finetunejob(entry.uid)
        self._queue.add(self._store.put_finetunejob(body) or entry.uid)

    async def _refused(self, entry: Entry, job: FineTuneJob, version: int, error: ApiError) -> None:
        """Says in status what the API server does not accept; a server that does not answer is not worth a word."""
        # Without a note something could not be deleted: what the status says stays true.
        applied = getattr(error, "__notes__", None)
        if error.transient or isinstance(error, NotFoundError) or not applied:
            return
        kind, _, name = applied[0].partition(" ")
        await self._write_status(entry, version, job.status, refused(job.status, kind, name, error.message))

    def _complain(self, uid: str, error: Exception, seconds: float) -> None:
        entry = self._store.get(uid)
        name = f"{entry.namespace}/{entry.name}" if entry else uid
        expected = isinstance(error, ApiError)
        _LOG.log(
            logging.WARNING if expected else logging.ERROR,
            "%s: reconcile failed, next try in %.1f s: %s",
            name,
            seconds,
            error,
            exc_info=None if expected else error,
        )


async def _all(coroutines: list[Any]) -> None:
    """Runs side by side, waits for all, then raises the first error."""
    if len(coroutines) == 1:
        await coroutines[0]
        return
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


def _count(old: FineTuneJobStatus, decision: Plan) -> None:
    new = decision.status
    if (new.restarts or 0) > (old.restarts or 0) and len(new.attempts) > 1:
        metrics.RESTARTS.labels(new.attempts[-2].reason or "Unknown").inc()
    if new.state != old.state and new.state == "Failed":
        metrics.FAILURES.labels(new.reason or "Unknown").inc()
