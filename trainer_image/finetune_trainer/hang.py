"""Which rank hangs, when none of a pod gives a sign of life: the others only wait for it.

The evidence, in this order: a rank that does not even write its stacks (stopped, or stuck in the kernel), one whose main thread
is not inside a collective, one that is behind the others.
"""

import logging
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.reports import Activity
from finetune_trainer.gang import Gang
from finetune_trainer.state import RankState, read_state

WATCHED = (Activity.TRAINING, Activity.EVALUATING, Activity.CHECKPOINTING)
STACK_SECONDS = 1.0
"""A rank that can answer at all does so within milliseconds."""
OTHER_PODS_SECONDS = 10.0
"""So much longer a pod all of whose ranks wait lets the pod speak that they wait for."""
_MAIN = "finetune_trainer/rank.py"
_WAITING = ("torch/distributed/", "deepspeed/comm/")
_INNERMOST = 8
"""So many frames of a call are looked at: a collective's own are among them."""
log = logging.getLogger("finetune_trainer")


@dataclass(frozen=True)
class Suspect:
    """The rank that the others wait for."""

    state: RankState
    silence_seconds: float
    limit_seconds: float
    stack: str
    """Of its main thread, innermost call first; empty where it does not answer."""

    @property
    def waits(self) -> bool:
        """Whether even this one is inside a collective, so that all ranks of the pod wait for others."""
        return _in_collective(self.stack)

    @property
    def message(self) -> str:
        """What is known of it."""
        where = f"while {self.state.activity} after step {self.state.step}"
        hint = "" if self.stack else "; it answers no signal: stopped, or stuck in the kernel"
        return (
            f"rank {self.state.rank}: no heartbeat for {self.silence_seconds:.0f} s {where} "
            f"(limit {self.limit_seconds:.0f} s){hint}"
        )


@dataclass
class HangWatch:
    """Looks at the heartbeats of a pod's ranks."""

    gang: Gang
    folder: Path
    limit_seconds: float
    alone: bool
    """Whether the job has no other pods."""
    _waiting: Suspect | None = field(default=None, init=False)

    def look(self) -> Suspect | None:
        """The rank that hangs, once one does; in a pod that only waits for others, after these had their say."""
        silence = max((silence_seconds(state) for state in _watched(self.gang, self.folder)), default=0.0)
        if silence <= self.limit_seconds:
            self._waiting = None
            return None
        if self._waiting is None:
            self._waiting = suspect(self.gang, self.folder, self.limit_seconds)
        over = silence > self.limit_seconds + OTHER_PODS_SECONDS
        return self._waiting if self._waiting and (self.alone or over or not self._waiting.waits) else None


def suspect(gang: Gang, folder: Path, limit_seconds: float) -> Suspect | None:
    """Asks all ranks for their stacks, writes them to the log, and tells which one the others wait for.

    Returns:
        None if all have given a sign of life within the limit.
    """
    watched = _watched(gang, folder)
    if not any(silence_seconds(state) > limit_seconds for state in watched):
        return None
    stacks = _ask_for_stacks(gang, folder)
    for rank, text in stacks.items():
        log.error("stacks of rank %d:\n%s", rank, text or "it does not answer")
    main_threads = {rank: main_thread(text) for rank, text in stacks.items()}
    # One that waits may have given its last sign of life before the one that hangs.
    silent = [state for state in watched if silence_seconds(state) > limit_seconds / 2]
    first = culprit(silent, main_threads)
    return Suspect(first, silence_seconds(first), limit_seconds, main_threads.get(first.rank, ""))


def culprit(silent: Sequence[RankState], stacks: Mapping[int, str]) -> RankState:
    """The rank that the others wait for.

    Args:
        silent: ranks that have given no sign of life for long; at least one.
        stacks: of their main threads, by rank; of one that does not answer, nothing.
    """

    def innocence(state: RankState) -> tuple[bool, bool, int, float]:
        stack = stacks.get(state.rank, "")
        return bool(stack), _in_collective(stack), state.step, state.heartbeat_monotonic

    return min(silent, key=innocence)


def main_thread(stacks: str) -> str:
    """The main thread's part of what `faulthandler` wrote, innermost call first; empty where it is missing."""
    return next((thread.strip() for thread in stacks.split("\n\n") if _MAIN in thread), "")


def silence_seconds(state: RankState) -> float:
    """For how long a rank has given no sign of life."""
    return time.monotonic() - state.heartbeat_monotonic


def stack_path(folder: Path, rank: int) -> Path:
    """Where a rank appends the stacks of its threads on SIGUSR1."""
    return folder / f"stacks-{rank}.txt"


def _in_collective(stack: str) -> bool:
    frames = [line for line in stack.splitlines() if line.lstrip().startswith("File ")]
    return any(part in frame for frame in frames[:_INNERMOST] for part in _WAITING)


def _watched(gang: Gang, folder: Path) -> list[RankState]:
    exits = gang.exits()
    states = [state for rank in gang.processes if rank not in exits and (state := read_state(folder, rank))]
    return [state for state in states if state.activity in WATCHED]


def _ask_for_stacks(gang: Gang, folder: Path) -> dict[int, str]:
    """What every rank that still runs is doing; of one that does not answer, nothing."""
    asked = [rank for rank in gang.processes if rank not in gang.exits()]
    for rank in asked:
        stack_path(folder, rank).write_text("")  # of an earlier time
    gang.signal(signal.SIGUSR1)
    deadline = time.monotonic() + STACK_SECONDS
    while time.monotonic() < deadline and not all(_MAIN in _read(folder, rank) for rank in asked):
        time.sleep(0.02)
    return {rank: _read(folder, rank) for rank in asked}


def _read(folder: Path, rank: int) -> str:
    return stack_path(folder, rank).read_text(encoding="utf-8", errors="replace")
