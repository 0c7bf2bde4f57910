"""Runs other programs: output to a log, and all of them ended when the demo ends early."""

import ctypes
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent


class CommandError(Exception):
    """A program failed.

    Attributes:
        hint: what a person can do about it; empty where only the log can tell.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


_running: set[subprocess.Popen[str]] = set()
_lock = threading.Lock()
_stopped = threading.Event()


def end_with_parent() -> None:
    """Makes this process end when the one that started it does, even by SIGKILL; its own children end with it.

    A `make test` that was killed leaves nothing behind that would be in the way of the next one.
    """

    def end(*_: object) -> None:
        end_all(patience_seconds=0)
        os._exit(143)

    signal.signal(signal.SIGTERM, end)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


_PR_SET_PDEATHSIG = 1
_WRAPPER = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
"""The same for a child, which cannot be asked to do it itself."""


def wrapped(command: Sequence[str | Path]) -> list[str]:
    """A command that ends when this process does."""
    return [*_WRAPPER, *(str(word) for word in command)]


def run(
    command: Sequence[str | Path], log: Path, *, stdin: str | None = None, hint: str = "", timeout: float | None = None
) -> str:
    """Runs a program and returns its standard output; both outputs go to the log as well.

    Raises:
        CommandError: it ended with another status than 0, or took longer than `timeout` seconds.
    """
    words = [str(word) for word in command]
    if _stopped.is_set():
        raise CommandError("stopped, since another step failed")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as errors:
        errors.write(f"$ {' '.join(words)}\n")
        errors.flush()
        pipe = subprocess.PIPE if stdin is not None else subprocess.DEVNULL
        with _started(words, stdin=pipe, stdout=subprocess.PIPE, stderr=errors, start_new_session=True) as process:
            try:
                output, _ = process.communicate(stdin, timeout)
            except subprocess.TimeoutExpired:
                _end(process, 10)
                raise CommandError(f"`{' '.join(words[:4])} ...` took longer than {timeout:.0f} s", hint) from None
        errors.write(output)
    if process.returncode:
        raise CommandError(f"`{' '.join(words[:4])} ...` failed with status {process.returncode}", hint)
    return output


def status(command: Sequence[str | Path], output: IO[str] | None, environment: Mapping[str, str]) -> int:
    """Runs a program, shown as it goes or with both outputs in a file, and returns its exit status."""
    with _started([str(word) for word in command], stdout=output, stderr=output, env=environment) as process:
        return process.wait()


@contextmanager
def _started(words: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(wrapped(words), cwd=ROOT, text=True, **options)
    with _lock:
        _running.add(process)
    try:
        yield process
    finally:
        with _lock:
            _running.discard(process)


def end_all(patience_seconds: float = 10) -> None:
    """Ends every program that still runs, with its children."""
    _stopped.set()
    # No lock: a signal's handler may have interrupted its holder.
    for process in tuple(_running):
        _end(process, patience_seconds)


def _end(process: subprocess.Popen[str], patience_seconds: float) -> None:
    try:
        # Those with a process group of their own take their children along.
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()
        process.wait(patience_seconds)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass


def last_line(log: Path) -> str:
    """The last line of a log that says something, for showing that work goes on."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 2000))
            lines = file.read().decode(errors="replace").replace("\r", "\n").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith("$ ")), "")
