"""`finetune run` with the real supervisor and ranks: its result is the cluster's, whatever happens on the way."""

import argparse
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from finetune_api.job import FineTuneJob
from finetune_cli import run
from finetune_cli.errors import CliError
from finetune_operator.core.resolve import resolve
from finetune_operator.core.settings import PlanConfig
from finetune_operator.local import admission
from finetune_trainer.server import bind
from finetune_trainer.state import RankState, read_state
from tests.trainer import jobs
from tests.trainer.conftest import Assets

Watch = Callable[[int, Path], None]
"""Called on a thread for each started supervisor: its attempt and the folder that its ranks' states are in."""


class Forked:
    """A supervisor that was forked instead of started, as `local.process.Process`."""

    def __init__(self, pid: int, exit_file: Path) -> None:
        self.pid = pid
        self._exit_file = exit_file

    def poll(self) -> int | None:
        return int(self._exit_file.read_text()) if self._exit_file.exists() else None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class Machine:
    """Runs a job in one folder, through `finetune run`."""

    def __init__(self, folder: Path, server: jobs.ForkServer, assets: Assets, **spec: Any) -> None:
        self.folder, self.server, self.assets = folder, server, assets
        folder.mkdir(parents=True)
        self.watch: Watch | None = None
        self.volumes = [f"assets={assets.model.parent}", f"work={folder}"]
        self.secrets: list[str] = []
        self.body = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "tiny"},
            "spec": {
                "model": {"uri": "pvc://assets/model"},
                "datasets": {
                    "train": [{"uri": "pvc://assets/train.jsonl"}],
                    "evaluation": [{"uri": "pvc://assets/eval.jsonl"}],
                },
                "adapter": {"rank": 4, "dropout": "0.1"},
                "training": {
                    "maxLength": 64,
                    "packing": True,
                    "globalBatchSize": 4,
                    "microBatchSize": 2,
                    "maxSteps": 6,
                    "learningRate": "0.01",
                },
                "checkpoint": {"everySteps": 2},
                "output": {"uri": "pvc://work/output"},
                **spec,
            },
        }

    def run(self, fresh: bool = False) -> int:
        file = self.folder / "job.yaml"
        file.write_text(json.dumps(self.body, indent=1))
        options = argparse.Namespace(
            file=str(file), volume=self.volumes, secret=self.secrets, device="cpu", fresh=fresh
        )
        return run.main(options, self._start)

    def _start(self, command: list[str], environment: Mapping[str, str], log: Path, lock: int) -> Forked:
        assert command[:3] == [sys.executable, "-m", "finetune_trainer"] and "--http-host" in command
        attempt = int(log.stem.removeprefix("attempt-"))
        scratch = self.folder / f"scratch-{time.monotonic_ns()}"
        scratch.mkdir()
        exit_file = scratch / "exit"
        pid = self.server.start(command[3:], {**environment, "TMPDIR": str(scratch)}, log, exit_file)
        if self.watch is not None:
            threading.Thread(target=self.watch, args=(attempt, scratch), daemon=True).start()
        return Forked(pid, exit_file)

    @property
    def kept(self) -> dict[str, Any]:
        kept: dict[str, Any] = json.loads((self.folder / "checkpoints" / "default.tiny.run" / "job.json").read_text())
        return kept

    @property
    def weights(self) -> str:
        return hashlib.sha256((self.folder / "output" / "adapter_model.safetensors").read_bytes()).hexdigest()


def wait_for_step(scratch: Path, step: int) -> RankState:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for folder in scratch.glob("finetune-*"):
            state = read_state(folder, 0)
            if state is not None and state.step >= step:
                return state
        time.sleep(0.002)
    raise AssertionError("the step was not reached")


@pytest.fixture(scope="module")
def unbroken(server: jobs.ForkServer, assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    machine = Machine(tmp_path_factory.mktemp("local") / "unbroken", server, assets)
    assert machine.run() == 0
    return machine


def test_complete_and_what_it_says(unbroken: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    status = unbroken.kept["status"]
    assert status["state"] == "Complete" and status["message"].startswith("Held-out loss")
    assert unbroken.run() == 0, "it is complete already, nothing runs"
    said = capsys.readouterr().out
    assert "tiny is Complete already: Held-out loss" in said and str(unbroken.folder / "output") in said


def test_the_result_is_that_of_the_clusters_pods(server: jobs.ForkServer, assets: Assets, tmp_path: Path) -> None:
    """Two pods of one rank, as the operator launches them, and one machine with two ranks: the same bytes."""
    spec = {"trainer": {"numNodes": 2}, "deepspeed": {"zeroStage": 2}}
    local = Machine(tmp_path / "local", server, assets, **spec)
    local.body["spec"]["training"]["microBatchSize"] = 1
    assert local.run() == 0

    body, _ = admission.admit(local.body)
    job = FineTuneJob.from_object({**body, "metadata": {"name": "tiny", "namespace": "team", "uid": "uid-12345"}})
    launch = resolve(job, 1, PlanConfig(trainer_image="trainer")).launch.model_dump_json(by_alias=True)
    launch = launch.replace("/mnt/pvc/assets", str(assets.model.parent)).replace(
        "/mnt/pvc/work", str(tmp_path / "pods")
    )
    rendezvous = {"host": "localhost", "port": jobs.free_port()}
    specs = [{**json.loads(launch), "rendezvous": rendezvous, "httpPort": jobs.free_port()} for _ in range(2)]
    pods = [jobs.Pod(tmp_path / "pods", spec, server, node) for node, spec in enumerate(specs)]
    for pod in pods:
        assert pod.wait() == 0, pod.log
    exported = (tmp_path / "pods" / "output" / "adapter_model.safetensors").read_bytes()
    assert local.weights == hashlib.sha256(exported).hexdigest()


def test_a_killed_rank_is_a_second_attempt_and_the_same_weights(
    unbroken: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(tmp_path / "killed", unbroken.server, unbroken.assets)

    def kill(attempt: int, scratch: Path) -> None:
        if attempt == 1:
            os.kill(wait_for_step(scratch, 3).pid, signal.SIGKILL)

    machine.watch = kill
    assert machine.run() == 0
    status = machine.kept["status"]
    assert [a.get("reason") for a in status["attempts"]] == ["RankKilled", None]
    assert status["countedRestarts"] == 1 and status["attempts"][1]["fromStep"] in (2, 4)
    assert machine.weights == unbroken.weights
    assert "Restart 1 after RankKilled" in capsys.readouterr().out

    machine.body["spec"]["training"]["seed"] = 1
    with pytest.raises(CliError, match="`training` cannot be changed once the job exists"):
        machine.run()
    machine.watch = None
    assert machine.run(fresh=True) == 0
    assert machine.weights != unbroken.weights
    assert machine.kept["status"]["attempts"][0]["fromStep"] == 0, "an earlier run's checkpoints are not taken up"
    assert len(list((machine.folder / "checkpoints").glob("tiny-*"))) == 2, "and they are kept"


def test_more_failures_than_allowed_are_a_failed_job(
    unbroken: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(tmp_path / "failed", unbroken.server, unbroken.assets, recovery={"backoffLimit": 0})
    machine.watch = lambda _, scratch: os.kill(wait_for_step(scratch, 1).pid, signal.SIGKILL)
    assert machine.run() == 1
    assert machine.kept["status"]["reason"] == "BackoffLimitExceeded"
    assert "1 failure, recovery.backoffLimit is 0" in capsys.readouterr().out


def _stop_at(step: int) -> Watch:
    def stop(_: int, scratch: Path) -> None:
        wait_for_step(scratch, step)
        os.kill(os.getpid(), signal.SIGTERM)

    return stop


def test_interrupted_and_gone_on_is_identical(unbroken: Machine, tmp_path: Path) -> None:
    machine = Machine(tmp_path / "again", unbroken.server, unbroken.assets)
    machine.watch = _stop_at(3)
    assert machine.run() == 130
    status = machine.kept["status"]
    assert status["state"] == "Suspended" and status["lastCheckpoint"]["step"] >= 3
    machine.watch = None
    assert machine.run() == 0
    attempts = machine.kept["status"]["attempts"]
    assert attempts[1]["fromStep"] == status["lastCheckpoint"]["step"], "nothing was lost"
    assert machine.kept["status"]["restarts"] == 0
    assert machine.weights == unbroken.weights


def test_the_supervisor_listens_where_it_is_told() -> None:
    with bind(jobs.free_port(), "127.0.0.1") as here, bind(jobs.free_port()) as everywhere:
        assert here.getsockname()[0] == "127.0.0.1"
        assert everywhere.getsockname()[0] == ("::" if socket.has_dualstack_ipv6() else "0.0.0.0")


def test_a_wrong_manifest_starts_nothing(unbroken: Machine, tmp_path: Path) -> None:
    machine = Machine(tmp_path / "wrong", unbroken.server, unbroken.assets, trainer={"numNodes": 3})
    with pytest.raises(CliError, match=r"job\.yaml:\d+: spec: `training\.globalBatchSize` must be a multiple of"):
        machine.run()
    assert {path.name for path in machine.folder.iterdir()} == {"job.yaml"}
