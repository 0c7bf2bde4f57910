"""Builds the next micro-batch in a thread while the device computes.

A batch is a pure function of its rows, so what was prefetched is what would have been built: the order of data does not
depend on timing.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Row = int | None
T = TypeVar("T")


class Prefetcher(Generic[T]):
    """One batch ahead.

    Args:
        build: makes the batch of some rows; it runs in a thread of its own.
    """

    def __init__(self, build: Callable[[Sequence[Row]], T]) -> None:
        self._build = build
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: tuple[tuple[Row, ...], Future[T]] | None = None

    def take(self, rows: Sequence[Row], following: Sequence[Row] | None) -> T:
        """The batch of `rows`, after which that of `following` is begun.

        Args:
            rows: what is wanted now; built here if something else was announced.
            following: what will be wanted next; None: nothing known.
        """
        ahead, self._ahead = self._ahead, None
        batch = ahead[1].result() if ahead is not None and ahead[0] == tuple(rows) else self._build(rows)
        if following is not None:
            self._ahead = (tuple(following), self._thread.submit(self._build, list(following)))
        return batch
