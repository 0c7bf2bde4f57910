"""Steps that depend on each other, run side by side where they do not."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from demo import commands


@dataclass
class Step:
    """One thing to do."""

    name: str
    what: str
    """What it does, for people."""
    usual: str
    """How long it usually takes, the first time and later."""
    run: Callable[[Path], str]
    """Does it, writing to the given log; returns a few words about the result."""
    after: Sequence[str] = ()
    """Names of the steps that have to be done before."""
    log: Path = field(default_factory=Path)
    started: float | None = None
    seconds: float | None = None
    result: str = ""


class Board(Protocol):
    """Shows how far the steps are."""

    def refresh(self, steps: Sequence[Step]) -> None: ...


class StepError(commands.CommandError):
    """A step failed; the message says which, why, what to do and where the log is."""


def run_all(steps: Sequence[Step], board: Board, refresh_seconds: float = 0.5) -> None:
    """Runs all steps, each as soon as those it depends on are done.

    Raises:
        StepError: one failed. Programs that other steps had started are ended.
    """
    waiting = list(steps)
    running: dict[Future[str], Step] = {}
    with ThreadPoolExecutor(max_workers=len(steps)) as pool:
        try:
            while waiting or running:
                done = {step.name for step in steps if step.seconds is not None}
                for step in [step for step in waiting if set(step.after) <= done]:
                    waiting.remove(step)
                    step.started = time.monotonic()
                    running[pool.submit(step.run, step.log)] = step
                board.refresh(steps)
                finished, _ = wait(running, refresh_seconds, FIRST_COMPLETED)
                for future in finished:
                    _finish(running.pop(future), future)
            board.refresh(steps)
        except BaseException:
            # Nothing may keep running for a result that nobody will use; threads end with their programs.
            commands.end_all()
            raise


def _finish(step: Step, future: Future[str]) -> None:
    try:
        step.result = future.result()
    except commands.CommandError as error:
        tail = "\n".join(f"    {line}" for line in _tail(step.log))
        hint = f"\n  hint: {error.hint}" if error.hint else ""
        raise StepError(f"{step.name}: {error}{hint}\n  log: {step.log}\n{tail}") from error
    assert step.started is not None
    step.seconds = time.monotonic() - step.started


def _tail(log: Path) -> list[str]:
    try:
        return [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-8:]
    except OSError:
        return []
