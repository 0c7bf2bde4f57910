"""A trainer's supervisor as a process of this machine: its start, its end, and what it says in between.

What a kubelet does for a pod. Owns processes and sockets; decides nothing.
"""

import ctypes
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from finetune_api.launch import LaunchSpec
from finetune_api.reports import TERMINATION_MESSAGE_LIMIT_BYTES, ProgressReport
from finetune_operator.local.machine import LocalError

HOST = "127.0.0.1"
POLL_SECONDS = 1.0
TIMEOUT_SECONDS = 5.0
_LOG_BYTES = 2048
"""Of a trainer that left no report, so much of the log's end stands for it, as in Kubernetes."""
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class Process(Protocol):
    """The part of `subprocess.Popen` that is used here."""

    pid: int

    def poll(self) -> int | None: ...
    def send_signal(self, number: int, /) -> None: ...


Start = Callable[[list[str], Mapping[str, str], Path, int], Process]
"""Starts a program: command, environment, log, and the descriptor of the lock that it inherits."""


def start_process(command: list[str], environment: Mapping[str, str], log: Path, lock: int) -> Process:
    """Starts a program in a session of its own: a terminal's Ctrl-C does not reach it."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=(lock,),
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    """Should this process be killed, the trainer saves a checkpoint and leaves.

    The kernel signals at every change of parent, so once or more: a dying process' threads hand the child on to each other.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_ports() -> tuple[int, int]:
    """Two ports that nobody listens on."""
    with socket.socket() as first, socket.socket() as second:
        first.bind((HOST, 0))
        second.bind((HOST, 0))
        return int(first.getsockname()[1]), int(second.getsockname()[1])


@dataclass
class Trainer:
    """One attempt's supervisor."""

    launch: LaunchSpec
    folder: Path
    process: Process = field(init=False)
    _newest: ProgressReport | None = field(init=False, default=None)

    @property
    def log(self) -> Path:
        return self.folder / f"attempt-{self.launch.attempt}.log"

    @property
    def report(self) -> Path:
        return self.folder / f"attempt-{self.launch.attempt}.report.json"

    def start(self, environment: Mapping[str, str], lock: int, start: Start = start_process) -> None:
        """Starts the supervisor and begins to ask it for its progress."""
        launch_file = self.folder / f"attempt-{self.launch.attempt}.launch.json"
        try:
            launch_file.write_text(self.launch.model_dump_json(by_alias=True, indent=2) + "\n", encoding="utf-8")
            self.report.unlink(missing_ok=True)
        except OSError as error:
            raise LocalError(f"{self.folder} cannot be written: {error.strerror}") from error
        command = [sys.executable, "-m", "finetune_trainer", "--launch", str(launch_file)]
        command += ["--termination-log", str(self.report), "--http-host", HOST]
        # A folder `datasets` or `torch` in the current one must not be imported.
        self.process = start(command, {**environment, "PYTHONSAFEPATH": "1"}, self.log, lock)
        threading.Thread(target=self._ask, name=f"progress-{self.launch.attempt}", daemon=True).start()

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self.process.poll()

    def send_signal(self, number: int) -> None:
        """To the supervisor, which passes it on."""
        self.process.send_signal(number)

    def progress(self) -> ProgressReport | None:
        """Rank 0's newest report; None before its first."""
        return self._newest

    def message(self) -> str:
        """What it left when it ended: its report, or else the end of its log."""
        try:
            text = self.report.read_text(encoding="utf-8")
        except OSError:
            text = ""
        if text:
            return text[:TERMINATION_MESSAGE_LIMIT_BYTES]
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _LOG_BYTES))
            return file.read().decode(errors="replace")

    def _ask(self) -> None:
        """On a thread of its own: a supervisor that is starting up lets its callers wait."""
        while self.process.poll() is None:
            connection = http.client.HTTPConnection(HOST, self.launch.http_port, timeout=TIMEOUT_SECONDS)
            try:
                connection.request("GET", "/progress")
                self._newest = ProgressReport.model_validate_json(connection.getresponse().read())
            except (OSError, http.client.HTTPException, ValidationError):
                pass  # usual while it starts and ends
            finally:
                connection.close()
            time.sleep(POLL_SECONDS)


def num_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """GPUs that this process' children will see, as far as device files and CUDA_VISIBLE_DEVICES tell."""
    if not (devices / "nvidiactl").exists():
        return 0
    there = sum(1 for path in devices.glob("nvidia[0-9]*"))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return there
    return sum(1 for name in visible.split(",") if name.strip() not in ("", "-1"))


def child_environment(variables: Mapping[str, str], *, use_gpus: bool) -> dict[str, str]:
    """This process' environment with what the job adds."""
    cpu = {} if use_gpus else {"DS_ACCELERATOR": "cpu"}
    return {**os.environ, **variables, **cpu}
