"""Builds micro-batches in threads while the device computes.

A batch is a pure function of its rows, and batches are handed out in the order of the plan, so neither the number of threads nor
their timing changes anything. Threads are enough: reading, decoding and arithmetic on pixels leave the interpreter free.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Row = int | None
T = TypeVar("T")


class Prefetcher(Generic[T]):
    """As many batches ahead as there are workers.

    Args:
        build: makes the batch of some rows; it runs in a thread.
        plan: the rows of one batch after the other, as they will be taken.
        workers: threads.
    """

    def __init__(self, build: Callable[[Sequence[Row]], T], plan: Iterator[Sequence[Row]], workers: int = 1) -> None:
        self._build, self._plan, self.workers = build, plan, workers
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
        self._ahead: deque[Future[T]] = deque()
        self._fill()

    def take(self) -> T:
        """The plan's next batch, after which another one is begun."""
        batch = self._ahead.popleft().result()
        self._fill()
        return batch

    def close(self) -> None:
        """Lets the threads end; what they have built is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _fill(self) -> None:
        while len(self._ahead) < self.workers and (rows := next(self._plan, None)) is not None:
            self._ahead.append(self._threads.submit(self._build, rows))
