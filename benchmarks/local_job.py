"""A job under `finetune run`, for benchmarks: its process, and what its ranks tell while it runs."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_trainer.state import RankState, read_failure, read_state

CPUS = {"limits": {"cpu": str(os.cpu_count())}}
"""`resourcesPerNode`: all of this machine's."""


def inputs(root: Path, model: str = "model") -> dict[str, Any]:
    """The part of a spec that says where model and texts are; jobs of one program share a cache."""
    return {
        "model": {"uri": f"file://{root / model}"},
        "datasets": {"train": [{"uri": f"file://{root / 'train.jsonl'}", "format": "Text"}]},
        "cache": {"uri": f"file://{root / 'cache'}"},
    }


@contextmanager
def jobs_folder(prefix: str, parent: Path | None) -> Iterator[Path]:
    """A folder for a program's jobs. However the program ends, by an error or SIGTERM too, they are ended and it is removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as folder:
        try:
            yield Path(folder)
        finally:
            for job in _started:
                job.end()


_started: list["LocalJob"] = []


@dataclass
class LocalJob:
    """One job in a folder of its own, which holds its manifest, checkpoints, output and logs."""

    folder: Path
    name: str
    spec: dict[str, Any]
    """Of the FineTuneJob, but for `output` and `checkpoint.uri`, which are in the folder unless they are given."""
    peak_bytes: dict[int, int] = field(default_factory=dict)
    """Of each rank, the most memory that it has reported."""

    def start(self, *options: str) -> None:
        """Starts `finetune run`, or goes on with it."""
        scratch = self.folder / "tmp"
        scratch.mkdir(parents=True, exist_ok=True)
        spec = {"output": {"uri": f"file://{self.folder / 'output'}"}, **self.spec}
        spec["checkpoint"] = {"uri": f"file://{self._checkpoints}", **spec.get("checkpoint", {})}
        kind = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob"}
        file = self.folder / "job.yaml"
        file.write_text(json.dumps({**kind, "metadata": {"name": self.name}, "spec": spec}, indent=1), encoding="utf-8")
        self._said = self.folder / "said.log"
        with self._said.open("ab") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "finetune_cli", "run", str(file), *options],
                env={**os.environ, "TMPDIR": str(scratch)},
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        _started.append(self)

    def states(self) -> list[RankState]:
        """The newest word of each rank of the newest attempt."""
        newest: dict[int, RankState] = {}
        for folder in (self.folder / "tmp").glob("finetune-*"):
            for file in folder.glob("state-*.json"):
                state = read_state(folder, int(file.stem.partition("-")[2]))
                if state is not None and state.attempt >= newest.get(state.rank, state).attempt:
                    newest[state.rank] = state
        for rank, state in newest.items():
            self.peak_bytes[rank] = max(self.peak_bytes.get(rank, 0), state.memory_peak_bytes)
        return [state for _, state in sorted(newest.items())]

    def failure_times(self) -> list[float]:
        """When ranks that are just ending said why (`time.time()`); it is known until the attempt is over."""
        files = (self.folder / "tmp").glob("finetune-*/failure-*.json")
        read = [read_failure(file.parent, int(file.stem.partition("-")[2])) for file in files]
        return [time.time() - (time.monotonic() - failure.time) for failure in read if failure is not None]

    def wait(self, reached: Callable[[], bool], limit: float, *, what: str, pause: float = 0.02) -> float:
        """Waits until something is so and returns the time (`time.time()`).

        Raises:
            RuntimeError: the job ended before, or it takes too long; the message has what was said.
        """
        deadline = time.monotonic() + limit
        while not reached():
            self.states()
            if self.ended and not reached():
                raise RuntimeError(f"{self.name} ended before {what}:\n{self.said[-1500:]}\n{self.log[-3000:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: {what} not within {limit:.0f} s:\n{self.log[-3000:]}")
            time.sleep(pause)
        return time.time()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def end(self) -> None:
        """Ends it at once and saves nothing."""
        for _ in range(2):
            if not self.ended:
                self._process.terminate()  # not SIGINT, which a shell's background processes are made to ignore
                time.sleep(1)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def interrupt(self) -> int:
        """As Ctrl-C does: it saves and leaves. Returns its exit status."""
        self._process.terminate()
        return self.exit_status(120)

    def exit_status(self, limit: float) -> int:
        """Waits for its end."""
        try:
            return self._process.wait(limit)
        except subprocess.TimeoutExpired:
            self.end()
            raise RuntimeError(f"{self.name}: no end within {limit:.0f} s:\n{self.log[-3000:]}") from None

    @property
    def said(self) -> str:
        """What `finetune run` printed."""
        return self._said.read_text(encoding="utf-8", errors="replace")

    @property
    def log(self) -> str:
        """Of all attempts."""
        return "".join(file.read_text(errors="replace") for file in sorted(self.records.glob("attempt-*.log")))

    @property
    def status(self) -> dict[str, Any]:
        """The job's."""
        record = json.loads((self.records / "job.json").read_text(encoding="utf-8"))
        status: dict[str, Any] = record["status"]
        return status

    @property
    def records(self) -> Path:
        """Where logs, launch files and reports of the attempts are."""
        return self._checkpoints / f"default.{self.name}.run"

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The journal's lines about steps, in the order in which they were done."""
        lines = [line for file in self._checkpoints.glob("*/journal.jsonl") for line in file.read_text().splitlines()]
        return [entry for line in lines if "loss" in (entry := json.loads(line))]

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"
