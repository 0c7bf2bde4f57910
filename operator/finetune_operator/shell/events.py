"""Kubernetes events about jobs. The same event again raises the count of the one that is there."""

import logging
from collections import OrderedDict
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from finetune_api.job import API_VERSION, KIND
from finetune_operator.core.situation import Event
from finetune_operator.shell.api import EVENTS, FIELD_MANAGER, Api
from finetune_operator.shell.errors import ApiError, ConflictError, NotFoundError
from finetune_operator.shell.metrics import EVENTS_LOST
from finetune_operator.shell.store import Entry

_LOG = logging.getLogger(__name__)
_KNOWN_LIMIT = 2048
_MESSAGE_LIMIT = 1024


class EventRecorder:
    """Writes events; one that cannot be written is logged and counted, since nothing depends on it."""

    def __init__(self, api: Api, instance: str) -> None:
        self._api = api
        self._instance = instance
        self._counts: OrderedDict[str, int] = OrderedDict()

    async def record(self, entry: Entry, event: Event) -> None:
        """Writes one event, or counts it up."""
        message = event.message[:_MESSAGE_LIMIT]
        digest = sha256(f"{entry.uid}/{event.reason}/{message}".encode()).hexdigest()[:16]
        name = f"{entry.name[:200]}.{digest}"
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        count = self._counts.get(name, 0) + 1
        try:
            if count == 1 or not await self._count_up(entry.namespace, name, count, now):
                count = 1
                await self._create(entry, event, message, name, now)
        except ApiError as error:
            EVENTS_LOST.inc()
            _LOG.warning("event lost: %s/%s %s: %s (%s)", entry.namespace, entry.name, event.reason, message, error)
            return
        self._counts[name] = count
        self._counts.move_to_end(name)
        if len(self._counts) > _KNOWN_LIMIT:
            self._counts.popitem(last=False)

    async def _create(self, entry: Entry, event: Event, message: str, name: str, now: str) -> None:
        body: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": entry.namespace},
            "involvedObject": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "namespace": entry.namespace,
                "name": entry.name,
                "uid": entry.uid,
            },
            "type": event.type,
            "reason": event.reason,
            "message": message,
            "source": {"component": FIELD_MANAGER},
            "reportingComponent": FIELD_MANAGER,
            "reportingInstance": self._instance,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            await self._api.request("POST", EVENTS, verb="create", namespace=entry.namespace, body=body)
        except ConflictError:
            # Written by the operator before this one.
            await self._count_up(entry.namespace, name, 2, now)

    async def _count_up(self, namespace: str, name: str, count: int, now: str) -> bool:
        """False if it has expired (events do after an hour)."""
        body = {"count": count, "lastTimestamp": now}
        content_type = "application/merge-patch+json"
        try:
            await self._api.request(
                "PATCH", EVENTS, verb="patch", namespace=namespace, name=name, body=body, content_type=content_type
            )
        except NotFoundError:
            return False
        return True
