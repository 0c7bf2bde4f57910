"""Launch files for tests, and the trainer as a process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_trainer.state import RankState, read_state

FULL: dict[str, Any] = {"method": "Full", "adapter": None}
"""Changes of a launch file that train all weights."""
QLORA: dict[str, Any] = {"method": "QLoRA", "quantization": {"bits": 4, "doubleQuantization": True}}
HPZ: dict[str, Any] = {"deepspeed__config": {"zero_optimization": {"zero_hpz_partition_size": 2}}}
"""Second parts of ZeRO-3's weights on each node of two ranks."""
PLAIN_ADAPTER: dict[str, Any] = {"variant": "LoRA", "loraPlusRatio": None}


_GIVEN: set[int] = set()


def free_port() -> int:
    """A port that nobody listens on, and that was not given before: whoever got that may not listen yet."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _GIVEN:
            _GIVEN.add(port)
            return port


def launch(folder: Path, model: Path, train: Path, evaluation: Path | None = None, /, **changes: Any) -> dict[str, Any]:
    """A small LoRA job; `changes` are set by dotted path with `__` for the dot."""
    spec: dict[str, Any] = {
        "schemaVersion": 1,
        "job": {"namespace": "team", "name": "tiny", "uid": "uid-1"},
        "attempt": 1,
        "numNodes": 1,
        "numProcPerNode": 1,
        "threadsPerProcess": 1,
        "rendezvous": {"host": "localhost", "port": free_port()},
        "httpPort": free_port(),
        "terminationGraceSeconds": 30,
        "communicationTimeoutSeconds": 60,
        "hangTimeoutSeconds": 60,
        "model": {"uri": f"file://{model}", "source": {"kind": "Path", "path": str(model)}},
        "train": [dataset(train)],
        "evaluation": [] if evaluation is None else [dataset(evaluation)],
        "method": "LoRA",
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.0, "targetModules": ["All"], **PLAIN_ADAPTER},
        "training": {
            "maxLength": 64,
            "packing": False,
            "globalBatchSize": 4,
            "microBatchSize": 2,
            "epochs": None,
            "maxSteps": 6,
            "learningRate": 0.01,
            "scheduler": "Cosine",
            "warmupRatio": 0.1,
            "weightDecay": 0.01,
            "maxGradNorm": 1.0,
            "precision": "BF16",
            "activationCheckpointing": "None",
            "seed": 7,
            "evalEverySteps": None,
            "optimizer": "AdamW",
            "adamBeta1": 0.9,
            "adamBeta2": 0.999,
            "adamEpsilon": 1e-8,
            "warmupSteps": None,
            "schedulerParameters": {
                "numCycles": 1,
                "minLrRate": 0.0,
                "lrEnd": 1e-7,
                "power": 1.0,
                "timescale": None,
                "numDecaySteps": None,
            },
            "overlong": "Truncate",
            "trainOnPrompt": False,
            "maskHistory": False,
            "groupByLength": False,
            "attention": "Auto",
            "ligerKernel": False,
            "compile": False,
            "loaderWorkers": 2,
        },
        "deepspeed": {"zeroStage": 0, "offloadOptimizer": "None", "offloadParameters": "None", "config": None},
        "checkpoint": {
            "dir": str(folder / "checkpoints"),
            "everySteps": 2,
            "keep": 2,
            "onTermination": True,
            "background": True,
        },
        "outputDir": str(folder / "output"),
        "cacheDir": str(folder / "cache"),
        "freeze": None,
        "quantization": None,
        "vision": None,
        "output": {"mergeAdapter": False, "maxShardBytes": 5_000_000_000},
        "tracking": {"wandb": None, "tensorBoard": None, "profiler": None},
        "benchmarks": [],
        "generation": {
            "samples": 1,
            "temperature": 0.0,
            "topP": 1.0,
            "maxNewTokens": 16,
            "batchSize": 4,
            "k": [1],
            "timeoutSeconds": 5,
        },
        "selection": {
            "metric": None,
            "exportBest": False,
            "earlyStoppingPatience": None,
            "earlyStoppingMinDelta": 0.0,
        },
    }
    spec["model"]["chatTemplate"] = None
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = spec
        for name in parents:
            place = place[name]
        place[last] = value
    ranks = spec["numNodes"] * spec["numProcPerNode"]
    training = spec["training"]
    training["gradientAccumulationSteps"] = training["globalBatchSize"] // (training["microBatchSize"] * ranks)
    return spec


def dataset(path: Path, form: str = "Auto", **more: Any) -> dict[str, Any]:
    """A data set of a launch file."""
    source = {"kind": "Path", "path": str(path)}
    absent = dict.fromkeys(("maxSamples", "split", "columns", "tags", "weight"))
    return {"uri": f"file://{path}", "source": source, "format": form, **absent, **more}


def next_attempt(spec: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The same job, one attempt later, on free ports."""
    spec = deepcopy(spec)
    spec["attempt"] += 1
    spec["httpPort"] = free_port()
    spec["rendezvous"]["port"] = free_port()
    return {**spec, **changes}


class ForkServer:
    """Starts pods without a new interpreter, see `forkserver.py`."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "fork.sock")
        program = Path(__file__).with_name("forkserver.py")
        self._process = subprocess.Popen([sys.executable, str(program), self.path], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        while self._process.stdout.readline() != b"ready\n":
            assert self._process.poll() is None

    def start(self, arguments: list[str], environment: dict[str, str], log: Path, exit_file: Path) -> int:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self.path)
            request = {"arguments": arguments, "environment": environment, "log": str(log), "exit_file": str(exit_file)}
            with connection.makefile("rw") as stream:
                stream.write(json.dumps(request) + "\n")
                stream.flush()
                return int(stream.readline())

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@dataclass
class Pod:
    """One node's supervisor and its ranks, as processes."""

    folder: Path
    spec: dict[str, Any]
    server: ForkServer | None
    """None: a real `python -m finetune_trainer`."""
    node: int = 0
    pid: int = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"launch-{self.spec['attempt']}-{self.node}"
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(self.spec), encoding="utf-8")
        self.report_file = self.folder / f"{name}.report.json"
        self.log_file = self.folder / f"{name}.log"
        self.exit_file = self.folder / f"{name}.exit"
        self.scratch = self.folder / f"{name}.tmp"
        self.scratch.mkdir(exist_ok=True)
        arguments = ["--launch", str(file), "--termination-log", str(self.report_file)]
        environment = {**os.environ, "JOB_COMPLETION_INDEX": str(self.node), "TMPDIR": str(self.scratch)}
        self.process: subprocess.Popen[bytes] | None = None
        if self.server is not None:
            self.pid = self.server.start(arguments, environment, self.log_file, self.exit_file)
            return
        with self.log_file.open("wb") as log:
            command = [sys.executable, "-m", "finetune_trainer", *arguments]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self.pid = self.process.pid

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.report_file.read_text(encoding="utf-8"))
        return report

    @property
    def journal(self) -> list[dict[str, Any]]:
        """Of all attempts, line by line."""
        file = self.folder / "checkpoints" / "journal.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    def state(self, rank: int = 0) -> RankState | None:
        for folder in self.scratch.glob("finetune-*"):
            return read_state(folder, rank)
        return None

    def exit_code(self) -> int | None:
        """None while it runs."""
        if self.process is not None:
            return self.process.poll()
        return int(self.exit_file.read_text()) if self.exit_file.exists() else None

    def wait_for(self, check: Callable[[RankState], bool], rank: int = 0, timeout: float = 180) -> RankState:
        """Waits until a rank's state fulfils a condition."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            state = self.state(rank)
            if state is not None and check(state):
                return state
            assert self.exit_code() is None, f"ended early:\n{self.log}"
            time.sleep(0.002)
        raise AssertionError(f"not within {timeout} s:\n{self.log}")

    def wait_for_step(self, step: int, rank: int = 0) -> RankState:
        return self.wait_for(lambda state: state.step >= step, rank)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.spec['httpPort']}{path}", timeout=10) as answer:
            text: str = answer.read().decode()
            return text

    def kill_rank(self, rank: int = 0) -> None:
        state = self.state(rank)
        assert state is not None
        os.kill(state.pid, signal.SIGKILL)

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def wait(self, timeout: float = 240) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.exit_code()) is None:
            assert time.monotonic() < deadline, f"still running after {timeout} s:\n{self.log}"
            time.sleep(0.002)
        return code

    def done(self) -> dict[str, Any]:
        """Waits for success and returns the report."""
        code = self.wait()
        assert code == 0, f"exit code {code}:\n{self.log}"
        return self.report
