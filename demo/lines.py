"""How the steps look without a terminal: plain lines. Standard library only."""

import time
from collections.abc import Sequence

from demo.commands import last_line
from demo.steps import Board, Step

HEARTBEAT_SECONDS = 30.0
"""A running step says so often that it still runs."""


def duration(seconds: float) -> str:
    """Seconds as `7 s` or `3 min 05 s`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


class LineBoard:
    """For logs and pipes: a line when a step starts, one when it ends, and signs of life in between."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}
        self._ended: set[str] = set()

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def refresh(self, steps: Sequence[Step]) -> None:
        """Prints what is new."""
        for step in steps:
            if step.started is None or step.name in self._ended:
                continue
            if step.name not in self._said:
                self._say(step, f"{step.what} (usually {step.usual})")
            if step.seconds is not None:
                self._ended.add(step.name)
                self._say(step, f"done in {duration(step.seconds)}" + (f": {step.result}" if step.result else ""))
            elif time.monotonic() - self._said[step.name] > HEARTBEAT_SECONDS:
                self._say(step, f"{time_left(step)}  {last_line(step.log)[:90]}")

    def _say(self, step: Step, text: str) -> None:
        self._said[step.name] = time.monotonic()
        print(f"{time.strftime('%H:%M:%S')}  {step.name:<8} {text}", flush=True)


def time_left(step: Step) -> str:
    """How long a step took, or takes so far and usually."""
    if step.seconds is not None:
        return duration(step.seconds)
    if step.started is None:
        return f"usually {step.usual}"
    return f"{duration(time.monotonic() - step.started)} of usually {step.usual}"
