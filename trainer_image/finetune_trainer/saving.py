"""One checkpoint on its way to the volume, in a thread of every rank, while training goes on.

The ranks agree through the key-value store: collectives belong to the main thread, whose training uses them at the same time.
Each rank says how its part went; rank 0 commits when all have said so, and tells the others what became of it.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_api.reasons import Reason
from finetune_trainer.distributed import World
from finetune_trainer.errors import TrainerError, classify, error_of

FIRST_POLL_SECONDS, LAST_POLL_SECONDS = 0.005, 0.5
"""The store lives in rank 0's process: thousands of ranks that wait for a slow volume must not keep it busy."""
log = logging.getLogger("finetune_trainer")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that counts."""

    step: int
    time: float
    """When it was complete, Unix time."""
    seconds: float
    """How long it took since the state was staged."""


class Saving:
    """Writes this rank's part, and on rank 0 commits the whole.

    Args:
        world: this rank's place; only its store is used.
        step: of the state that is written.
        write: writes this rank's part, telling a callable of its progress, and returns what the manifest says of it.
        commit: makes the parts of all ranks count and returns when that was; called on rank 0 only.
        superseded: raises if a newer attempt owns the folder; asked on rank 0 when a part has failed.
    """

    def __init__(
        self,
        world: World,
        step: int,
        write: Callable[[Callable[[int], None]], dict[str, Any]],
        commit: Callable[[list[dict[str, Any]]], float],
        superseded: Callable[[], None],
    ) -> None:
        self.step = step
        self._world, self._write, self._commit, self._superseded = world, write, commit, superseded
        self._key = f"checkpoint/{step}"
        self._bytes = self._seen_bytes = 0
        self._part_ended = False
        self._failure: TrainerError | None = None
        self._saved: Saved | None = None
        self._started = time.perf_counter()
        self._thread = threading.Thread(target=self._run, name=f"checkpoint {step}", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether it is decided, as far as this rank knows."""
        return self._saved is not None or self._failure is not None

    @property
    def failed(self) -> bool:
        return self._failure is not None

    @property
    def saved(self) -> Saved | None:
        """None while it is not decided, and after a failure."""
        return self._saved

    def moved(self) -> bool:
        """Whether there was progress since the last call; what this rank cannot hasten counts as progress."""
        before, self._seen_bytes = self._seen_bytes, self._bytes
        return self._part_ended or self._bytes != before

    def result(self) -> Saved:
        """What became of it, once it has ended.

        Raises:
            TrainerError: a rank could not write, or a newer attempt owns the folder.
        """
        if self._failure is not None:
            raise self._failure
        assert self._saved is not None
        return self._saved

    def forget(self) -> None:
        """Takes the notes of all ranks out of the store; on rank 0, once every rank has seen the result."""
        for name in ("done", *map(str, range(self._world.size))):
            self._world.store.delete_key(f"{self._key}/{name}")

    def _run(self) -> None:
        try:
            self._tell(str(self._world.rank), self._outcome(lambda: self._write(self._count)))
            self._part_ended = True
            if self._world.is_first:
                self._tell("done", self._outcome(lambda: self._commit(self._parts())))
            done = self._hear("done")
            self._saved = Saved(self.step, _value(done), time.perf_counter() - self._started)
        except TrainerError as error:
            self._failure = error
        except Exception as error:  # the store is gone, and rank 0 with it
            self._failure = error_of(*classify(error))

    def _count(self, size: int) -> None:
        self._bytes += size

    def _outcome(self, work: Callable[[], Any]) -> dict[str, Any]:
        try:
            return {"value": work()}
        except Exception as error:
            reason, message = classify(error)
            log.error("step %d  the checkpoint cannot be saved: %s", self.step, message)
            return {"reason": reason, "message": message}

    def _parts(self) -> list[dict[str, Any]]:
        outcomes = [self._hear(str(rank)) for rank in range(self._world.size)]
        if any("reason" in outcome for outcome in outcomes):
            self._superseded()  # a newer attempt clears the folder away: that is then the cause
        return [_value(outcome, f"rank {rank}: ") for rank, outcome in enumerate(outcomes)]

    def _tell(self, name: str, outcome: dict[str, Any]) -> None:
        self._world.store.set(f"{self._key}/{name}", json.dumps(outcome))

    def _hear(self, name: str) -> dict[str, Any]:
        """Asks again and again instead of a blocking `get`, which would hold the store's lock against the main thread."""
        key, pause = f"{self._key}/{name}", FIRST_POLL_SECONDS
        while not self._world.store.check([key]):
            time.sleep(pause)
            pause = min(2 * pause, LAST_POLL_SECONDS)
        outcome: dict[str, Any] = json.loads(self._world.store.get(key))
        return outcome


def _value(outcome: dict[str, Any], who: str = "") -> Any:
    if "reason" in outcome:
        raise error_of(Reason(outcome["reason"]), who + outcome["message"])
    return outcome["value"]
