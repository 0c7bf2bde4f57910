"""How the steps look on a terminal: a table that moves."""

from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from demo.commands import last_line
from demo.lines import time_left
from demo.steps import Board, Step


class TableBoard:
    """One line for each step, with what its log said last."""

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
            table.add_column(column, no_wrap=True, overflow="ellipsis")
        for step in steps:
            table.add_row(self._mark(step), step.name, self._text(step), time_left(step))
        self._live.update(table)

    def _mark(self, step: Step) -> RenderableType:
        if step.started is None:
            return Text(" ")
        if step.seconds is not None:
            return Text("✓", style="green")
        return self._spinners.setdefault(step.name, Spinner("dots"))

    def _text(self, step: Step) -> Text:
        text = Text(step.what, no_wrap=True, overflow="ellipsis")
        if said := step.result or (last_line(step.log) if step.started is not None else ""):
            text.append(f"\n{said}", style="dim")
        return text
