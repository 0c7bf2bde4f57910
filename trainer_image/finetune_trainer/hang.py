"""Which rank hangs, when none of a pod gives a sign of life: the others only wait for it.

The evidence, in this order: a rank that does not even write its stacks (stopped, or stuck in the kernel), one whose main thread
is not inside a collective, one that is behind the others.
"""

import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune_trainer.gang import Gang
from finetune_trainer.state import RankState

STACK_SECONDS = 1.0
"""A rank that can answer at all does so within milliseconds."""
_MAIN = "finetune_trainer/rank.py"
_WAITING = ("torch/distributed/", "deepspeed/comm/")
_INNERMOST = 8
"""So many frames of a call are looked at: a collective's own are among them."""


def stack_path(folder: Path, rank: int) -> Path:
    """Where a rank writes the stacks of its threads on SIGUSR1."""
    return folder / f"stacks-{rank}.txt"


def ask_for_stacks(gang: Gang, folder: Path) -> dict[int, str]:
    """What every rank that still runs is doing; of one that does not answer, nothing."""
    gang.signal(signal.SIGUSR1)
    asked = [rank for rank in gang.processes if rank not in gang.exits()]
    deadline = time.monotonic() + STACK_SECONDS
    while time.monotonic() < deadline and not all(_MAIN in _read(folder, rank) for rank in asked):
        time.sleep(0.02)
    return {rank: _read(folder, rank) for rank in asked}


def _read(folder: Path, rank: int) -> str:
    path = stack_path(folder, rank)
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def main_thread(stacks: str) -> str:
    """The main thread's part, innermost call first; empty where it is missing."""
    return next((thread.strip() for thread in stacks.split("\n\n") if _MAIN in thread), "")


def waits(stacks: str) -> bool:
    """Whether the main thread is inside a collective."""
    frames = [line for line in main_thread(stacks).splitlines() if line.lstrip().startswith("File ")]
    return any(part in frame for frame in frames[:_INNERMOST] for part in _WAITING)


def culprit(silent: Sequence[RankState], stacks: Mapping[int, str]) -> RankState:
    """The rank that the others wait for.

    Args:
        silent: ranks that have given no sign of life for long; at least one. One that waits may have given its last before
            the one that hangs.
        stacks: of their threads, by rank, as `faulthandler` writes them.
    """

    def innocence(state: RankState) -> tuple[bool, bool, int, float]:
        found = stacks.get(state.rank, "")
        return bool(found), waits(found), state.step, state.heartbeat_monotonic

    return min(silent, key=innocence)
