"""Full lists, and watches, where one of the namespaces may not be read (any more)."""

import asyncio
from collections.abc import AsyncIterator
from itertools import islice
from typing import Any

import pytest

from finetune_operator.shell.errors import ApiError
from finetune_operator.shell.queue import WorkQueue
from finetune_operator.shell.store import Store
from finetune_operator.shell.sync import Synchronizer
from finetune_operator.shell.watch import build_settings
from tests.unit.operator.samples import job_body


class Lists:
    """The API server, as far as lists of FineTuneJobs go: one job in each namespace, named after it."""

    def __init__(self) -> None:
        self.forbidden: set[str] = set()
        self.gone: set[str] = set()

    async def list_chunks(
        self, target: tuple[str, str], namespace: str, _selector: str | None
    ) -> AsyncIterator[tuple[list[dict[str, Any]], int]]:
        if namespace in self.forbidden:
            raise ApiError(403, "Forbidden", f"cannot list resource in the namespace {namespace}")
        body = job_body()
        body["metadata"] |= {"name": namespace, "namespace": namespace, "uid": namespace}
        yield [body] if target[1] == "finetunejobs" and namespace not in self.gone else [], 100


def names(store: Store) -> set[str]:
    return {entry.name for entry in store}


def test_a_forbidden_namespace_holds_up_no_other(caplog: pytest.LogCaptureFixture) -> None:
    lists, store, queue = Lists(), Store(), WorkQueue()
    synchronizer = Synchronizer(lists, store, queue, ("a", "b", "c"))  # type: ignore[arg-type]
    lists.forbidden = {"b"}
    asyncio.run(synchronizer.sync())
    assert names(store) == {"a", "c"}
    assert [record.message for record in caplog.records if "namespace b" in record.message] != []
    lists.forbidden = set()
    asyncio.run(synchronizer.sync())
    assert names(store) == {"a", "b", "c"}
    lists.forbidden, lists.gone = {"b"}, {"c"}
    asyncio.run(synchronizer.sync())
    assert names(store) == {"a", "b"}, "what was not listed is not gone"


def test_where_nothing_may_be_read_the_list_fails() -> None:
    lists = Lists()
    lists.forbidden = {"a", "b"}
    synchronizer = Synchronizer(lists, Store(), WorkQueue(), ("a", "b"))  # type: ignore[arg-type]
    with pytest.raises(ApiError, match="cannot list"):
        asyncio.run(synchronizer.sync())


def test_a_watch_is_tried_again_for_ever() -> None:
    backoffs = build_settings().networking.error_backoffs
    for _ in "each request counts for itself":
        first, *_more, last = islice(backoffs, 1000)
        assert first == 1 and last == 60
