"""kopf's part: it watches, and every event only means "look again". No handler of kopf ever writes."""

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import kopf
from kubernetes.aio.client.configuration import Configuration

from finetune_api.job import GROUP, LABEL_JOB_UID, PLURAL, VERSION
from finetune_operator.shell.queue import WorkQueue
from finetune_operator.shell.storage import NoDiffBase, NoProgress
from finetune_operator.shell.store import Store
from finetune_operator.shell.sync import Synchronizer


class _Forever:
    """Waits between kopf's attempts, without an end: where they run out kopf ends, and with it the watches of all namespaces.

    A watch that is forbidden in one namespace is tried again until the namespace or its Role is there.
    """

    def __iter__(self) -> Iterator[float]:
        yield from (1, 1, 2, 3, 5, 8, 13, 21, 34)
        yield from repeat(60)


def build_settings() -> kopf.OperatorSettings:
    """kopf's settings, each set on purpose."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    # Never written, since no handler needs it; named so that nobody meets a stranger's finalizer.
    settings.persistence.finalizer = f"{GROUP}/kopf"
    settings.persistence.progress_storage = NoProgress()
    settings.persistence.diffbase_storage = NoDiffBase()
    settings.watching.chunk_size = 500
    settings.watching.label_selectors["batch", "v1", "jobs"] = LABEL_JOB_UID
    settings.watching.label_selectors["", "v1", "pods"] = LABEL_JOB_UID
    settings.networking.request_timeout = 30
    settings.networking.error_backoffs = _Forever()
    # Without it kopf wants to list and watch namespaces and CRDs.
    settings.scanning.disabled = True
    # A worker is one task for each object; idle ones are only memory.
    settings.queueing.idle_timeout = 0.5
    settings.process.ultimate_exiting_timeout = 10
    return settings


def build_registry(
    configuration: Configuration, store: Store, queue: WorkQueue, synchronizer: Synchronizer
) -> kopf.OperatorRegistry:
    """The handlers: three kinds are watched, each event goes into the store and puts its job in line."""
    registry = kopf.OperatorRegistry()

    def enqueue(uid: str | None) -> None:
        if uid is not None:
            queue.add(uid)

    async def login(**_: Any) -> kopf.ConnectionInfo:
        return await connection_info(configuration)

    async def finetunejob(event: kopf.RawEvent, **_: Any) -> None:
        _note(event, synchronizer)
        body: dict[str, Any] = dict(event["object"])
        if event["type"] == "DELETED":
            uid = body["metadata"]["uid"]
            store.drop_finetunejob(uid)
            queue.add(uid)
        else:
            created = event["type"] == "ADDED"
            uid = store.put_finetunejob(body, created=created)
            if uid is not None:
                queue.add(uid, urgent=created)

    async def job(event: kopf.RawEvent, **_: Any) -> None:
        _note(event, synchronizer)
        body: dict[str, Any] = dict(event["object"])
        enqueue(store.drop_job(body) if event["type"] == "DELETED" else store.put_job(body))

    async def pod(event: kopf.RawEvent, **_: Any) -> None:
        _note(event, synchronizer)
        body: dict[str, Any] = dict(event["object"])
        enqueue(store.drop_pod(body) if event["type"] == "DELETED" else store.put_pod(body))

    kopf.on.login(registry=registry)(login)
    kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)(finetunejob)
    kopf.on.event("batch", "v1", "jobs", registry=registry)(job)
    kopf.on.event("", "v1", "pods", registry=registry)(pod)
    return registry


def _note(event: kopf.RawEvent, synchronizer: Synchronizer) -> None:
    # kopf gives the type None to what its own list holds, at the start and after a watch broke.
    if event["type"] is None:
        synchronizer.watch_restarted()


async def connection_info(configuration: Configuration) -> kopf.ConnectionInfo:
    """kopf's credentials from the same configuration as the operator's own client."""
    header = await configuration.get_api_key_with_prefix("BearerToken") or ""
    scheme, _, token = header.rpartition(" ")
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        insecure=not configuration.verify_ssl,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
        scheme=scheme or None,
        token=token or None,
    )
