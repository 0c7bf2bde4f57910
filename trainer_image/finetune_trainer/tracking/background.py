"""Keeps trackers away from training: each has a thread and a bounded queue, and whatever it does, training does not notice."""

import logging
import math
import queue
import threading
import time
from collections.abc import Sequence

from finetune_trainer.tracking.base import RunFacts, Tracker

QUEUE_POINTS = 10_000
"""About as many steps may wait for a tracker that is slow; later ones are dropped and counted."""
FINISH_SECONDS = 5.0
"""So long may trackers hold up the end of a run that succeeded."""
FINISH_FAILED_SECONDS = 2.0
"""A run that failed is wanted back soon."""
log = logging.getLogger("finetune_trainer")


class _Lane:
    """One tracker, its thread and its queue."""

    def __init__(self, tracker: Tracker, facts: RunFacts, capacity: int) -> None:
        self._tracker, self._facts = tracker, facts
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(capacity)
        self._closing = threading.Event()
        self._succeeded = False
        self._broken = False
        self.dropped = 0
        self.thread = threading.Thread(target=self._work, name=tracker.name, daemon=True)
        self.thread.start()

    def put(self, step: int, values: dict[str, float]) -> None:
        try:
            self._queue.put_nowait((step, values))
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                log.warning("%s: does not keep up or does not answer; points from step %d on are lost", self.name, step)

    def close(self, succeeded: bool) -> None:
        self._succeeded = succeeded
        self._closing.set()

    def wait(self, deadline: float) -> None:
        self.thread.join(max(0.0, deadline - time.monotonic()))
        lost = self.dropped + self._queue.qsize()
        if self.thread.is_alive():
            log.warning("%s: not finished in time and left behind (%d points not handed over)", self.name, lost)
        elif lost:
            log.warning("%s: %d points were lost", self.name, lost)

    @property
    def name(self) -> str:
        return self._tracker.name

    def _work(self) -> None:
        try:
            self._tracker.start(self._facts)
        except BaseException as error:  # a client may also raise SystemExit
            self._break(error)
        while (point := self._next()) is not None:
            if self._broken:
                self.dropped += 1
                continue
            try:
                self._tracker.log(*point)
            except BaseException as error:
                self.dropped += 1
                self._break(error)
        if not self._broken:
            try:
                self._tracker.finish(self._succeeded)
            except BaseException as error:
                self._break(error)

    def _next(self) -> tuple[int, dict[str, float]] | None:
        while True:
            try:
                return self._queue.get(timeout=0.1)
            except queue.Empty:
                if self._closing.is_set():
                    return None

    def _break(self, error: BaseException) -> None:
        self._broken = True
        log.warning("%s: %s: %s; training goes on without it", self.name, type(error).__name__, error)


class Tracking:
    """All trackers of a run. Nothing here raises or waits, but for `finish`, which waits a few seconds at most."""

    def __init__(self, trackers: Sequence[Tracker], facts: RunFacts, capacity: int = QUEUE_POINTS) -> None:
        self._lanes = [_Lane(tracker, facts, capacity) for tracker in trackers]

    def log(self, step: int, **values: float | None) -> None:
        """Hands on one point; what is absent or no number is left out."""
        known = {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
        for lane in self._lanes:
            lane.put(step, known)

    def finish(self, succeeded: bool) -> None:
        """Lets the trackers come to an end, all of them within a few seconds."""
        deadline = time.monotonic() + (FINISH_SECONDS if succeeded else FINISH_FAILED_SECONDS)
        for lane in self._lanes:
            lane.close(succeeded)
        for lane in self._lanes:
            lane.wait(deadline)
