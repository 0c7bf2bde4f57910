"""How the steps look: a table that moves on a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from demo.commands import last_line
from demo.steps import Board, Step

HEARTBEAT_SECONDS = 30.0
"""Without a terminal a running step says so often that it still runs."""


def duration(seconds: float) -> str:
    """Seconds as `7 s` or `3 min 05 s`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


class TableBoard:
    """For terminals: one line for each step, with what its log said last."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=8, transient=False)
        self._spinners: dict[str, Spinner] = {}

    def __enter__(self) -> Board:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def refresh(self, steps: Sequence[Step]) -> None:
        """Redraws the table."""
        table = Table(box=None, padding=(0, 1), show_header=False)
        for column in ("mark", "name", "what", "time"):
            table.add_column(column, no_wrap=column != "what")
        for step in steps:
            table.add_row(self._mark(step), step.name, self._text(step), _time(step))
        self._live.update(table)

    def _mark(self, step: Step) -> RenderableType:
        if step.started is None:
            return Text(" ")
        if step.seconds is not None:
            return Text("✓", style="green")
        return self._spinners.setdefault(step.name, Spinner("dots"))

    def _text(self, step: Step) -> Text:
        text = Text(step.what)
        if step.seconds is not None:
            text.append(f"  {step.result}" if step.result else "", style="dim")
        elif step.started is not None and (line := last_line(step.log)):
            text.append(f"\n{line[:90]}", style="dim")
        return text


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
                self._say(step, f"{_time(step)}  {last_line(step.log)[:90]}")

    def _say(self, step: Step, text: str) -> None:
        self._said[step.name] = time.monotonic()
        print(f"{time.strftime('%H:%M:%S')}  {step.name:<8} {text}", flush=True)


def _time(step: Step) -> str:
    if step.seconds is not None:
        return duration(step.seconds)
    if step.started is None:
        return f"usually {step.usual}"
    return f"{duration(time.monotonic() - step.started)} of usually {step.usual}"
