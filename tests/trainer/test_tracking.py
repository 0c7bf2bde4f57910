"""Trackers: real clients in real runs, and that no tracker whatever it does is noticed by training."""

import gzip
import json
import logging
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.launch import LaunchSpec
from finetune_trainer.tracking import background
from finetune_trainer.tracking.background import Tracking
from finetune_trainer.tracking.base import RunFacts, run_config
from tests.trainer import jobs
from tests.trainer.conftest import Assets, StartPod
from tests.trainer.test_resume import weights

SECRET = "0123456789abcdef0123456789abcdef01234567"
FACTS = RunFacts("uid", 1, 0, {})


def wandb_children(pid: int) -> list[int]:
    """The client's processes that were started by this rank; they name it in their arguments."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words[0].endswith(b"wandb-core") and words[words.index(b"--pid") + 1] == str(pid).encode() and state != "Z":
            found.append(int(folder.name))
    return found


def wandb_is_gone(pid: int) -> bool:
    """Whether no client's process outlives its rank; they end by themselves within a second, on a machine that is not busy."""
    deadline = time.monotonic() + 20
    while wandb_children(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def wandb_data(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of one, or its last part
            yield record
            record = b""


def wandb_records(file: Path) -> dict[str, Any]:
    """What an offline run's file would upload: configuration, history by step, run id, project and name, exit code."""
    from wandb.proto import wandb_internal_pb2 as pb

    config, history, run, code = {}, {}, pb.RunRecord(), None
    for data in wandb_data(file):
        record = pb.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            run = record.run
            config |= {update.key: json.loads(update.value_json) for update in run.config.update}
        if record.HasField("history"):
            history[record.history.step.num] = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
        if record.HasField("exit"):
            code = record.exit.exit_code
    names = {"id": run.run_id, "project": run.project, "name": run.display_name}
    return {"config": config, "history": history, "exit": code, **names}


def test_a_killed_and_resumed_run_is_one_run_in_both_trackers(
    start: StartPod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    key = tmp_path / "key"
    key.write_text(SECRET + "\n")
    folder = tmp_path / "wandb"
    folder.mkdir()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(folder))
    wandb = {"project": "tunes", "entity": "team", "runName": "tiny", "tokenFile": str(key)}
    tracking = {"wandb": wandb, "tensorBoard": {"dir": str(tmp_path / "events" / "tiny")}, "profiler": None}
    # Step 40 waits for the checkpoint of step 20, which is held: the rank lives until the client has started.
    monkeypatch.setenv("TEST_HOOK", "tests.trainer.volume_hook")
    monkeypatch.setenv("TEST_HOLD", str(tmp_path))
    pod = start(tracking=tracking, training__maxSteps=50, checkpoint__everySteps=20, training__evalEverySteps=25)
    state = pod.wait_for_step(40)
    deadline = time.monotonic() + 60
    while not (children := wandb_children(state.pid)):
        assert time.monotonic() < deadline, pod.log
        time.sleep(0.01)
    environment = Path(f"/proc/{children[0]}/environ").read_bytes()
    assert SECRET.encode() not in environment and b"WANDB_API_KEY" not in environment
    (tmp_path / "20").touch()
    pod.wait_for(lambda state: state.last_checkpoint_step == 20)
    while not list(tmp_path.glob("wandb/wandb/offline-run-*/*.wandb")):
        assert time.monotonic() < deadline, pod.log
        time.sleep(0.01)
    pod.kill_rank()
    pod.wait()
    assert wandb_is_gone(state.pid), "the client's process does not outlive its rank"

    monkeypatch.delenv("TEST_HOOK")
    resumed = jobs.Pod(pod.folder, jobs.next_attempt(pod.spec), pod.server)
    report = resumed.done()
    assert "goes on without it" not in resumed.log and "left behind" not in resumed.log
    journal = {line["step"]: line["loss"] for line in resumed.journal if "loss" in line}
    events = EventAccumulator(str(tmp_path / "events" / "tiny"), size_guidance={"scalars": 0})
    events.Reload()
    scalars = {event.step: event.value for event in events.Scalars("loss")}
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 51)), "each step once"
    assert scalars == pytest.approx(journal, rel=1e-6)
    assert [(e.step, e.value) for e in events.Scalars("base_eval_loss")] == [(0, pytest.approx(report["baseEvalLoss"]))]
    assert [e.step for e in events.Scalars("eval_loss")] == [0, 25, 50]

    runs = [wandb_records(file) for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]
    assert [run["id"] for run in runs] == ["uid-1", "uid-1"]
    last = runs[1]
    assert last["exit"] == 0
    assert {step: values["loss"] for step, values in last["history"].items() if "loss" in values} == {
        step: loss for step, loss in journal.items() if step > 20
    }
    assert last["history"][50]["eval_loss"] == report["evalLoss"]
    wanted = {"learning_rate", "grad_norm", "tokens_per_second", "samples_per_second", "memory_used_bytes"}
    assert wanted | {"checkpoint_stall_seconds"} <= last["history"][50].keys()
    assert last["config"]["training"]["learningRate"] == 0.01 and last["config"]["method"] == "LoRA"
    written = [path for root in (folder, tmp_path / "events") for path in root.rglob("*") if path.is_file()]
    assert written and not [path for path in written if SECRET.encode() in path.read_bytes()]


def test_trackers_that_cannot_work_change_nothing(
    start: StartPod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that does not answer, a folder that cannot be: the run ends as without them, and says so once."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    key = tmp_path / "key"
    key.write_text(SECRET)
    (tmp_path / "file").write_text("")
    wandb = {"project": "tunes", "entity": None, "runName": "tiny", "tokenFile": str(key)}
    nowhere = str(tmp_path / "file" / "events")
    profiler = {"dir": nowhere, "wait": 1, "warmup": 0, "active": 1}
    tracking = {"wandb": wandb, "tensorBoard": {"dir": nowhere}, "profiler": profiler}
    plain = start(tmp_path / "plain")
    tracked = start(tmp_path / "tracked", tracking=tracking)
    done = tracked.wait_for(lambda state: state.activity == "Done")
    ended = time.monotonic()
    tracked.done()
    assert time.monotonic() - ended < background.FINISH_SECONDS + 1
    plain.done()
    assert weights(tmp_path / "tracked") == weights(tmp_path / "plain")
    assert tracked.log.count("tracking.wandb: ") == 1 and tracked.log.count("tracking.tensorBoard: ") == 2
    assert "tracking.tensorBoard: 9 points were lost" in tracked.log, "six steps, two evaluations, the base's"
    assert tracked.log.count("tracking.profiler: ") == 1
    assert wandb_is_gone(done.pid)


def test_a_profile_has_the_steps_asked_for_and_changes_nothing(start: StartPod, tmp_path: Path) -> None:
    profiler = {"dir": str(tmp_path / "traces"), "wait": 1, "warmup": 1, "active": 2}
    profiled = start(
        tmp_path / "profiled", tracking={"wandb": None, "tensorBoard": None, "profiler": profiler}, numProcPerNode=2
    )
    plain = start(tmp_path / "plain", numProcPerNode=2)
    profiled.done()
    plain.done()
    assert weights(tmp_path / "profiled") == weights(tmp_path / "plain")
    for rank in range(2):
        with gzip.open(tmp_path / "traces" / "attempt-1" / f"rank-0000{rank}.json.gz") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert {name for name in names if name and name.startswith("ProfilerStep")} == {
            "ProfilerStep#2",
            "ProfilerStep#3",
        }
        assert "aten::mm" in names


class Fake:
    """A tracker that does what it is told, and notes what it got."""

    name = "tracking.fake"

    def __init__(self, start: Any = lambda: None, log: Any = lambda: None, finish: Any = lambda: None) -> None:
        self._start, self._log, self._finish = start, log, finish
        self.points: list[tuple[int, dict[str, float]]] = []
        self.ended: bool | None = None

    def start(self, facts: RunFacts) -> None:
        self._start()

    def log(self, step: int, values: dict[str, float]) -> None:
        self._log()
        self.points.append((step, values))

    def finish(self, succeeded: bool) -> None:
        self._finish()
        self.ended = succeeded


def raises() -> None:
    raise SystemExit("client is upset")


def test_points_arrive_in_order_and_what_is_no_number_is_left_out() -> None:
    fake = Fake()
    tracking = Tracking([fake], FACTS)
    tracking.log(1, loss=2.0, eval_loss=None, grad_norm=float("nan"))
    tracking.log(2, loss=1)
    tracking.finish(succeeded=True)
    assert fake.points == [(1, {"loss": 2.0}), (2, {"loss": 1.0})] and fake.ended is True


@pytest.mark.parametrize("part", ["start", "log", "finish"])
@pytest.mark.parametrize("how", ["raises", "hangs"])
def test_a_tracker_that_fails_is_not_noticed(
    part: str, how: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "FINISH_SECONDS", 0.3)
    gate = threading.Event()
    broken, good = Fake(**{part: raises if how == "raises" else gate.wait}), Fake()
    tracking = Tracking([broken, good], FACTS, capacity=50)
    with caplog.at_level(logging.WARNING):
        for step in range(200):
            tracking.log(step, loss=1.0)
            while len(good.points) <= step:
                time.sleep(0.0005)
        tracking.finish(succeeded=True)
    gate.set()  # so nothing has waited for it
    assert len(good.points) == 200 and good.ended is True
    lines = [record.message for record in caplog.records]
    said = {"raises": "client is upset; training goes on without it", "hangs": "left behind"}[how]
    assert sum(said in line for line in lines) == 1
    if part != "finish":
        lost = {"raises": "200 points were lost", "hangs": "points not handed over"}[how]
        assert sum(lost in line for line in lines) == 1
        assert len(lines) <= 3


def test_the_configuration_has_no_secrets(assets: Assets, tmp_path: Path) -> None:
    hub = {"kind": "Hub", "repoId": "a/b", "repoType": "model", "revision": "main", "path": "", "tokenFile": "/etc/x"}
    wandb = {"project": "p", "entity": None, "runName": "r", "tokenFile": "/etc/y"}
    changes = {"model__source": hub, "tracking__wandb": wandb}
    config = run_config(LaunchSpec.model_validate(jobs.launch(tmp_path, assets.model, assets.train, **changes)))
    assert "/etc" not in json.dumps(config) and "attempt" not in config
    assert config["model"]["source"]["repoId"] == "a/b" and config["training"]["maxSteps"] == 6
