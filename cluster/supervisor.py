"""Keeps the parts running: starts each when what it needs answers, restarts it when it dies, adopts what a killed
predecessor left running. It decides nothing else; what is to run is written by `up`.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from cluster import cgroups, kubeapi, parts, processes
from cluster.errors import ClusterError
from cluster.parts import Part, Seen
from cluster.processes import Process
from cluster.settings import PYTHON, REPOSITORY, Settings

TICK_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 5.0
# A part that ran this long was healthy: its next crash is a first one again.
HEALTHY_SECONDS = 30.0
MAX_LOG_BYTES = 50_000_000


@dataclass
class _Slot:
    process: Process | None = None
    argv: tuple[str, ...] = ()
    restarts: int = -1
    failures: int = 0
    started: float = 0.0
    not_before: float = 0.0


@dataclass
class Supervisor:
    """The loop's state. Built anew from the recorded files whenever a supervisor starts."""

    settings: Settings
    slots: dict[str, _Slot] = field(default_factory=dict)
    wanted: list[Part] = field(default_factory=list)
    wanted_stamp: int = -1

    def adopt(self) -> None:
        """Takes over what a predecessor recorded."""
        for name, seen in parts.read_seen(self.settings).items():
            self.slots[name] = _Slot(seen.process, seen.argv, seen.restarts, started=time.monotonic())

    def tick(self) -> None:
        """Looks at every part once, and acts."""
        _reap()
        before = self._seen()
        wanted = {part.name: part for part in self._wanted()}
        held = parts.held(self.settings)
        answers: dict[str, bool] = {}
        for name in [name for name in self.slots if name not in wanted]:
            self._stop(self.slots.pop(name))
        for part in wanted.values():
            slot = self.slots.setdefault(part.name, _Slot())
            if slot.process and slot.process.alive():
                # Changed flags, or a held part: it dies here and is started (or not) in a later tick.
                if slot.argv != part.argv or part.name in held:
                    self._stop(slot)
                continue
            self._note_death(slot)
            if part.name not in held and time.monotonic() >= slot.not_before and self._may_start(part, answers):
                self._start(part, slot)
        if self._seen() != before:
            parts.write_seen(self.settings, self._seen())

    def _wanted(self) -> list[Part]:
        # Read only when written: ten times a second, parsing would be what the supervisor mostly does.
        stamp = parts.stamp(self.settings)
        if stamp != self.wanted_stamp:
            self.wanted, self.wanted_stamp = parts.read(self.settings), stamp
        return self.wanted

    def _seen(self) -> dict[str, Seen]:
        return {name: Seen(slot.process, max(slot.restarts, 0), slot.argv) for name, slot in self.slots.items()}

    def _note_death(self, slot: _Slot) -> None:
        if slot.process is None:
            return
        slot.process = None
        now = time.monotonic()
        slot.failures = 0 if now - slot.started > HEALTHY_SECONDS else slot.failures + 1
        slot.not_before = now + min(MAX_BACKOFF_SECONDS, 0.1 * 2.0**slot.failures)

    def _stop(self, slot: _Slot) -> None:
        if slot.process:
            slot.process.kill(signal.SIGKILL)
            slot.process = None

    def _may_start(self, part: Part, answers: dict[str, bool]) -> bool:
        for probe in part.after:
            if probe not in answers:
                answers[probe] = _answers(self.settings, probe)
            if not answers[probe]:
                return False
        return True

    def _start(self, part: Part, slot: _Slot) -> None:
        procs = cgroups.create_leaf(part.cgroup)
        _kill_strays(part)
        with _open_log(parts.log(self.settings, part.name)) as log:
            child = subprocess.Popen(
                part.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(part.env),
                cwd="/",
                start_new_session=True,
                # Before exec, so that no child of the part can be born outside.
                preexec_fn=lambda: _join(procs),
            )
        slot.process = processes.find(child.pid)
        slot.argv, slot.started, slot.restarts = part.argv, time.monotonic(), slot.restarts + 1


def start(settings: Settings) -> None:
    """Starts a supervisor in the background, unless one runs."""
    if running(settings):
        return
    procs = cgroups.create_leaf(f"{settings.cgroup}/host/supervisor")
    with _open_log(parts.log(settings, "supervisor")) as log:
        subprocess.Popen(
            [PYTHON, "-m", "cluster", "supervise"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd="/",
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            start_new_session=True,
            preexec_fn=lambda: _join(procs),
        )
    deadline = time.monotonic() + 10
    while not running(settings):
        if time.monotonic() > deadline:
            raise ClusterError("the supervisor does not start", log=parts.log(settings, "supervisor"))
        time.sleep(0.02)


def running(settings: Settings) -> Process | None:
    """Returns the supervisor's process, if one runs."""
    try:
        pid, ticks = (int(word) for word in _pid_file(settings).read_text().split())
    except (FileNotFoundError, ValueError):
        return None
    process = Process(pid, ticks)
    return process if process.alive() else None


def supervise(settings: Settings) -> None:
    """Runs the loop until killed. Two at once would start everything twice, so the second returns."""
    lock = (settings.state / "supervisor.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    me = processes.find(os.getpid())
    assert me is not None
    supervisor = Supervisor(settings)
    supervisor.adopt()
    parts.write_atomically(_pid_file(settings), f"{me.pid} {me.start_ticks}")
    while True:
        supervisor.tick()
        time.sleep(TICK_SECONDS)


def _pid_file(settings: Settings) -> Path:
    return settings.state / "supervisor.pid"


def _join(procs: Path) -> None:
    procs.write_text("0")


def _kill_strays(part: Part) -> None:
    """Kills a copy of the part that a supervisor started and was killed before it could record.

    By command line and not all of the cgroup: containerd's also holds the shims, which outlive it.
    """
    for pid in cgroups.members(part.cgroup):
        command = processes.command_line(pid)
        # A part that enters a namespace first is seen without that prefix.
        if command and part.argv[-len(command) :] == command:
            processes.send(pid, signal.SIGKILL)


def _open_log(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
        path.replace(path.with_suffix(".log.1"))
    return path.open("ab")


def _reap() -> None:
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return


def _answers(settings: Settings, probe: str) -> bool:
    kind, _, where = probe.partition(":")
    if kind == "ready":
        return kubeapi.Client(settings.api_url, settings.pki, "admin", timeout_seconds=1).ready()
    try:
        if kind == "unix":
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(1)
                connection.connect(where)
        else:
            host, _, port = where.rpartition(":")
            socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True
