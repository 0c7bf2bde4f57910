"""The work queue: keyed, de-duplicating, one worker per key at a time, with timers and backoff per key."""

import asyncio
import heapq
from collections import deque

BACKOFF_BASE_SECONDS = 0.2
BACKOFF_CAP_SECONDS = 60.0


class WorkQueue:
    """Keys that wait to be worked on. For one event loop; not thread-safe.

    A key that is added while it waits is there once; one that is added while it is worked on comes again afterwards. Urgent
    keys go first: a new job's pods are worth more than the newest words about one that waits.
    """

    def __init__(self) -> None:
        self._ready: deque[str] = deque()
        self._urgent: deque[str] = deque()
        self._waiting: set[str] = set()
        self._active: set[str] = set()
        self._again: set[str] = set()
        self._failures: dict[str, int] = {}
        self._due: dict[str, float] = {}
        self._timers: list[tuple[float, str]] = []
        self._alarm: asyncio.TimerHandle | None = None
        self._signals: deque[asyncio.Future[None]] = deque()

    def __len__(self) -> int:
        return len(self._ready) + len(self._urgent)

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is worked on (timers aside)."""
        return not len(self) and not self._active and not self._again

    def add(self, key: str, *, urgent: bool = False) -> None:
        """Puts a key in line."""
        if key in self._active:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            (self._urgent if urgent else self._ready).append(key)
            self._signal()

    def add_after(self, key: str, seconds: float) -> None:
        """Puts a key in line later; of several times the earliest counts."""
        due = asyncio.get_running_loop().time() + seconds
        if due < self._due.get(key, float("inf")):
            self._due[key] = due
            heapq.heappush(self._timers, (due, key))
            self._set_alarm()

    async def get(self) -> str:
        """Takes the next key; it has to be given back with `done` or `retry`."""
        while not len(self):
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._signals.append(future)
            try:
                await future
            except asyncio.CancelledError:
                if future in self._signals:
                    self._signals.remove(future)
                elif not future.cancelled():
                    self._signal()
                raise
        key = (self._urgent or self._ready).popleft()
        self._waiting.discard(key)
        self._active.add(key)
        # A reconcile answers all that was known when it began; whoever wants another sets another timer.
        self._due.pop(key, None)
        return key

    def done(self, key: str) -> None:
        """The work succeeded: its backoff starts anew."""
        self._failures.pop(key, None)
        self._release(key)

    def retry(self, key: str) -> float:
        """The work failed: it comes again after a wait that doubles each time. Returns the wait in seconds."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        seconds: float = min(BACKOFF_BASE_SECONDS * 2.0 ** min(failures, 20), BACKOFF_CAP_SECONDS)
        self._release(key)
        self.add_after(key, seconds)
        return seconds

    def forget(self, key: str) -> None:
        """Drops what is remembered of a key that is gone."""
        self._failures.pop(key, None)
        self._due.pop(key, None)

    def _release(self, key: str) -> None:
        self._active.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def _signal(self) -> None:
        while self._signals:
            future = self._signals.popleft()
            if not future.done():
                future.set_result(None)
                return

    def _set_alarm(self) -> None:
        loop = asyncio.get_running_loop()
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if self._timers:
            self._alarm = loop.call_at(self._timers[0][0], self._ring)

    def _ring(self) -> None:
        now = asyncio.get_running_loop().time()
        while self._timers and self._timers[0][0] <= now:
            due, key = heapq.heappop(self._timers)
            if self._due.get(key) == due:
                del self._due[key]
                self.add(key)
        self._alarm = None
        self._set_alarm()
