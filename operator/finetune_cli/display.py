"""How a job is shown while it runs: a bar in a terminal, plain lines elsewhere. The same for `follow` and `run`."""

import sys
import time
from abc import ABC, abstractmethod
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from finetune_api.job import FineTuneJob
from finetune_api.reports import ProgressReport
from finetune_cli.view import Figures, figures, headline, state_line

PLAIN_LINE_SECONDS = 10.0
"""Without a terminal a line is printed this often at most."""


def open_display(name: str) -> "Display":
    """The display that fits standard output; to be used in a `with`."""
    console = Console(stderr=False, highlight=False)
    return _Bar(console, name) if console.is_terminal else _Lines(name)


class Display(ABC):
    """Shows a job's changes of state and its newest figures."""

    _last: tuple[object, ...] = ()

    def show(self, job: FineTuneJob, report: ProgressReport | None) -> None:
        """Shows what is new.

        Args:
            job: as its status has it.
            report: rank 0's own figures, which are finer; None where it does not answer.
        """
        if (shown := headline(job)) != self._last:
            self._last = shown
            self._state(state_line(job))
        newest = figures(job, report)
        if newest is not None:
            self._figures(newest)

    @abstractmethod
    def __enter__(self) -> "Display": ...

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    @abstractmethod
    def _state(self, line: str) -> None: ...

    @abstractmethod
    def _figures(self, shown: Figures) -> None: ...


class _Bar(Display):
    """A progress bar for a terminal, with the state's changes above it."""

    def __init__(self, console: Console, name: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn(
                "{task.fields[steps]}  loss {task.fields[loss]}  {task.fields[rate]} tokens/s  ETA {task.fields[eta]}"
            ),
            console=console,
        )
        self._name = name
        self._task: TaskID | None = None

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _state(self, line: str) -> None:
        self._progress.console.print(f"{time.strftime('%H:%M:%S')}  {line}", markup=False)

    def _figures(self, shown: Figures) -> None:
        fields: dict[str, Any] = {
            "steps": f"{shown.step}/{shown.total_steps or '?'}",
            "loss": shown.loss,
            "rate": shown.tokens_per_second,
            "eta": shown.eta,
        }
        if self._task is None:
            self._task = self._progress.add_task(self._name, total=shown.total_steps, **fields)
        self._progress.update(self._task, completed=shown.step, total=shown.total_steps, **fields)


class _Lines(Display):
    """Plain lines, for logs and pipes."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._printed_at = float("-inf")

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _state(self, line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {self._name}  {line}", flush=True)

    def _figures(self, shown: Figures) -> None:
        if time.monotonic() - self._printed_at < PLAIN_LINE_SECONDS:
            return
        self._printed_at = time.monotonic()
        print(
            f"{time.strftime('%H:%M:%S')}  {self._name}  step {shown.step}/{shown.total_steps or '?'}"
            f"  loss {shown.loss}  {shown.tokens_per_second} tokens/s  ETA {shown.eta}",
            flush=True,
        )
        sys.stdout.flush()
