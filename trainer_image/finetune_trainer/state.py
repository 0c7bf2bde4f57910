"""What a rank tells its supervisor: one small JSON file for each rank, replaced atomically.

The rank never waits for the disk; the supervisor reads when it is asked. A failure is a second file, written once.
"""

import json
import os
import threading
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from finetune_api.reasons import Reason
from finetune_api.reports import Activity
from finetune_trainer.errors import StorageError, writing
from finetune_trainer.files import write_atomic

MIN_INTERVAL_SECONDS = 0.05
"""Heartbeats that follow each other faster are left out: a step of a test model takes a few milliseconds."""


@dataclass
class RankState:
    """Facts of one rank; times are seconds, sizes are bytes, totals count since step 0 of the job."""

    rank: int
    attempt: int
    pid: int = 0
    activity: str = Activity.LOADING
    step: int = 0
    total_steps: int | None = None
    epoch: float = 0.0
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    samples_per_second: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    samples_total: int = 0
    tokens_total: int = 0
    base_eval_loss: float | None = None
    eval_loss: float | None = None
    resumed_from_step: int | None = None
    last_checkpoint_step: int | None = None
    last_checkpoint_time: float | None = None
    checkpoints: int = 0
    """Written by this attempt."""
    checkpoint_stall_seconds: float = 0.0
    """Time in which training stood still for them."""
    data_wait_seconds: float = 0.0
    """Time in which training waited for batches."""
    startup: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase, up to the end of this attempt's first step; see `startup.Startup`."""
    model_revision: str | None = None
    device: str = "cpu"
    device_utilization: float = 0.0
    """0 to 1. On CPU: this process's CPU time over wall time and threads."""
    memory_used_bytes: int = 0
    """On CPU: resident memory. On CUDA: allocated by torch."""
    memory_reserved_bytes: int = 0
    """On CPU: the same as used. On CUDA: held by torch's allocator."""
    memory_peak_bytes: int = 0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """`Progress.newest_metrics`."""
    note: str = ""
    """What people should know of a success, such as that it ended early."""
    heartbeat_time: float = 0.0
    """Wall clock, for people."""
    heartbeat_monotonic: float = 0.0
    """CLOCK_MONOTONIC, which all processes of a machine share, for the hang watch."""


@dataclass(frozen=True)
class RankFailure:
    """Why a rank ended, in its own words."""

    rank: int
    reason: Reason
    message: str
    traceback: str
    time: float


def state_path(folder: Path, rank: int) -> Path:
    return folder / f"state-{rank}.json"


def failure_path(folder: Path, rank: int) -> Path:
    return folder / f"failure-{rank}.json"


class StateWriter:
    """A rank's end of the wire. A thread replaces the file: on a busy disk that takes several milliseconds, between two steps."""

    def __init__(self, folder: Path, rank: int, attempt: int) -> None:
        self.state = RankState(rank=rank, attempt=attempt, pid=os.getpid())
        self._folder = folder
        self._published = 0.0
        self._waiting: bytes | None = None
        self._error: StorageError | None = None
        self._turn = threading.Condition()
        threading.Thread(target=self._write, name="state", daemon=True).start()

    def beat(self, activity: Activity | None = None, **facts: Any) -> None:
        """Updates facts and publishes them; a plain heartbeat too soon after the last one costs nothing.

        Raises:
            StorageError: an earlier one could not be written.
        """
        changed = activity is not None and activity != self.state.activity
        if activity is not None:
            self.state.activity = activity
        for name, value in facts.items():
            setattr(self.state, name, value)
        now = time.monotonic()
        self.state.heartbeat_monotonic, self.state.heartbeat_time = now, time.time()
        if changed or facts or now - self._published >= MIN_INTERVAL_SECONDS:
            self._published = now
            data = json.dumps(asdict(self.state)).encode()
            with self._turn:
                error, self._error = self._error, None
                self._waiting = data
                self._turn.notify_all()
            if error is not None:
                raise error

    def flush(self) -> None:
        """Waits until the newest facts are there for all to read."""
        with self._turn:
            self._turn.wait_for(lambda: self._waiting is None)

    def fail(self, reason: Reason, message: str, trace: str) -> None:
        """Records why this rank ends."""
        self.flush()
        failure = RankFailure(self.state.rank, reason, message, trace, time.monotonic())
        data = json.dumps(asdict(failure)).encode()
        write_atomic(failure_path(self._folder, self.state.rank), data, durable=False)

    def _write(self) -> None:
        """Of facts that follow each other faster than they can be written the newest is."""
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._waiting is not None)
                data = self._waiting
            assert data is not None
            error = None
            try:
                with writing("the pod's own volume", self._folder):
                    write_atomic(state_path(self._folder, self.state.rank), data, durable=False)
            except StorageError as found:
                error = found
            with self._turn:
                self._error = error or self._error
                if self._waiting is data:
                    self._waiting = None
                    self._turn.notify_all()


def read_state(folder: Path, rank: int) -> RankState | None:
    """The newest facts of a rank; None before its first heartbeat."""
    values = _read(state_path(folder, rank))
    if values is None:
        return None
    known = {f.name for f in fields(RankState)}
    return RankState(**{k: v for k, v in values.items() if k in known})


def read_failure(folder: Path, rank: int) -> RankFailure | None:
    """What a rank said when it ended; None if it said nothing."""
    values = _read(failure_path(folder, rank))
    return None if values is None else RankFailure(**{**values, "reason": Reason(values["reason"])})


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    return values
