"""The real command with a stub in the trainer's place: signals, the lock, what is printed, exit statuses."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.manifests import GOOD

STUB = Path(__file__).with_name("stub")


class Command:
    """`finetune run` on a job in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.body: dict[str, Any] = copy.deepcopy(GOOD)
        self.started: list[subprocess.Popen[str]] = []
        self.body["spec"]["trainer"]["env"] = [{"name": "GREETING", "value": "hello"}]

    def start(self, stub: str, *options: str) -> subprocess.Popen[str]:
        file = self.folder / "job.yaml"
        file.write_text(json.dumps(self.body, indent=1))
        command = [
            sys.executable,
            "-m",
            "finetune_cli",
            "run",
            str(file),
            "--volume",
            f"finetune={self.folder}",
            *options,
        ]
        path = os.pathsep.join([str(STUB), *filter(None, sys.path)])
        environment = {**os.environ, "STUB": stub, "PYTHONPATH": path}
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # A shell that put the tests into the background has them ignore SIGINT, and what is ignored is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        self.started.append(process)
        return process

    def run(self, stub: str, *options: str) -> tuple[int, str]:
        process = self.start(stub, *options)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said

    def log(self, attempt: int = 1) -> str:
        path = self.folder / "checkpoints" / "default.good.run" / f"attempt-{attempt}.log"
        return path.read_text() if path.exists() else ""

    def launch(self, attempt: int) -> dict[str, Any]:
        """What the trainer was started with."""
        path = self.folder / "checkpoints" / "default.good.run" / f"attempt-{attempt}.launch.json"
        launch: dict[str, Any] = json.loads(path.read_text())
        return launch

    def state(self) -> str:
        """Everything that is kept of the run, for a failing test."""
        files = sorted(path for path in (self.folder / "checkpoints").rglob("*") if path.is_file())
        return "\n".join(f"{path}: {path.read_text(errors='replace')}" for path in files)

    def wait_for_start(self, attempt: int = 1) -> int:
        """Returns the trainer's process id."""
        _wait(lambda: "started" in self.log(attempt) and self.log(attempt).endswith("\n"), self.state)
        return int(self.log(attempt).split()[3])


def _wait(check: Callable[[], bool], state: Callable[[], str]) -> None:
    deadline = time.monotonic() + 60
    while not check():
        assert time.monotonic() < deadline, state()
        time.sleep(0.01)


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    made = Command(tmp_path)
    yield made
    for process in made.started:
        process.kill()  # of a test that failed; nothing happens to one that has ended
        process.wait()


def test_complete_then_already_complete_then_fresh(command: Command) -> None:
    status, said = command.run("succeed")
    assert status == 0, said
    assert "good on this machine: 2 ranks on" in said and "without meaning here: trainer.resourcesPerNode" in said
    assert "Complete: Held-out loss 2.5 before, 1.5 after 9 steps. Output: pvc://finetune/out" in said
    assert f"output: {command.folder / 'out'}" in said
    assert f"the same on a cluster: kubectl apply -f {command.folder / 'job.yaml'}" in said
    assert command.log().split()[:3] == ["started", "127.0.0.1", "hello"]
    status, said = command.run("succeed")
    assert status == 0 and "good is Complete already" in said and "`--fresh` begins anew" in said
    status, said = command.run("succeed", "--fresh")
    assert status == 0 and "checkpoints of the earlier run are kept (good-" in said and "Complete" in said


def test_ctrl_c_saves_and_the_same_command_goes_on(command: Command) -> None:
    process = command.start("wait")
    command.wait_for_start()
    status, said = command.run("succeed")
    assert status == 2 and f"`good` is running already (process {process.pid})" in said
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "saving a checkpoint and leaving" in said
    assert "interrupted, saved at step 7; the same command goes on from there" in said
    status, said = command.run("succeed")
    assert status == 0 and command.log(2).startswith("started")


def test_two_signals_at_once_stop_it_at_once(command: Command) -> None:
    process = command.start("wait")
    trainer = command.wait_for_start()
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted, nothing was saved" in said
    assert not command.log(2) and not Path(f"/proc/{trainer}").exists()


def test_a_reader_that_leaves_ends_nothing(command: Command) -> None:
    process = command.start("wait")
    command.wait_for_start()
    assert process.stdout is not None
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, command.state()
    status, said = command.run("succeed")
    assert status == 0 and "Complete" in said and command.log(2).startswith("started")


def test_active_time_stands_still_while_nothing_runs(command: Command) -> None:
    command.body["spec"]["activeDeadlineSeconds"] = 3600
    process = command.start("wait")
    command.wait_for_start()
    process.kill()
    process.wait()
    record = command.folder / "checkpoints" / "default.good.run" / "job.json"
    kept = json.loads(record.read_text())
    kept["status"]["startTime"] = "2026-01-01T00:00:00Z"  # the machine was off since
    record.write_text(json.dumps(kept))
    _wait(lambda: "saved" in command.log(), command.state)
    status, said = command.run("succeed")
    assert status == 0 and "Complete" in said, said


def test_an_interrupted_run_goes_on_with_other_ranks_and_is_otherwise_the_same(command: Command) -> None:
    process = command.start("wait")
    command.wait_for_start()
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    command.body["spec"]["trainer"] |= {"numNodes": 1, "resourcesPerNode": {"limits": {"cpu": 4}}}
    learned = command.body["spec"]["training"]["learningRate"]
    command.body["spec"]["training"]["learningRate"] = "1e-3"
    status, said = command.run("succeed")
    assert status == 2 and "`training` cannot be changed once the job exists" in said and "with `--fresh`" in said
    command.body["spec"]["training"]["learningRate"] = learned
    status, said = command.run("succeed")
    assert status == 0 and "good on this machine: 1 rank on" in said, said
    first, second = command.launch(1), command.launch(2)
    assert [(launch["numProcPerNode"], launch["threadsPerProcess"]) for launch in (first, second)] == [(2, 2), (1, 4)]
    accumulation = [launch["training"]["gradientAccumulationSteps"] for launch in (first, second)]
    assert accumulation == [2, 4], "the global batch stays"
    assert first["checkpoint"]["dir"] == second["checkpoint"]["dir"]


def test_a_killed_command_takes_its_trainer_along_and_nothing_starts_before_that(command: Command) -> None:
    process = command.start("wait")
    trainer = command.wait_for_start()
    process.kill()
    process.communicate()
    status, said = command.run("succeed")
    _wait(lambda: "saved" in command.log(), lambda: f"{status}: {said}\n{command.state()}")
    if status == 2:  # the trainer was still saving
        assert "is running already" in said
        _wait(lambda: not Path(f"/proc/{trainer}").exists(), command.state)
        status, said = command.run("succeed")
    assert status == 0 and "Complete" in said, said


def test_what_is_wrong_is_told_with_file_and_line(command: Command) -> None:
    command.body["spec"]["training"]["learnRate"] = "1e-3"
    status, said = command.run("succeed")
    assert status == 2
    assert "job.yaml:" in said and 'unknown field "spec.training.learnRate"; did you mean `learningRate`?' in said
    assert not (command.folder / "checkpoints").exists()
