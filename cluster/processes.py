"""Processes by pid and start time, so that a recycled pid is never taken for one of ours."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process as the kernel identifies it. `start_ticks` is field 22 of /proc/PID/stat."""

    pid: int
    start_ticks: int

    def alive(self) -> bool:
        """Tells whether this very process runs; a zombie does not."""
        return start_ticks(self.pid) == self.start_ticks

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal, unless the process is gone."""
        if self.alive():
            send(self.pid, number)


def start_ticks(pid: int) -> int | None:
    """Returns when the process started, in clock ticks since boot; None for one that is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name is in brackets and may itself hold blanks and brackets.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def find(pid: int) -> Process | None:
    """Returns the process that has this pid now."""
    ticks = start_ticks(pid)
    return None if ticks is None else Process(pid, ticks)


def command_line(pid: int) -> tuple[str, ...]:
    """Returns the process's arguments; empty for one that is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ()
    return tuple(text.removesuffix("\0").split("\0")) if text else ()


def send(pid: int, number: int) -> None:
    """Sends a signal to a pid that may have just gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
