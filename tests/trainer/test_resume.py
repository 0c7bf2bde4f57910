"""A run that was killed and resumed ends with the same bytes as one that was not, for every way of spreading the state."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.reasons import FAILURES, Reason
from tests.trainer import jobs
from tests.trainer.conftest import Assets, StartPod
from tests.trainer.jobs import FULL, HPZ

TWO: dict[str, Any] = {"numProcPerNode": 2, "training__microBatchSize": 1}
CPU: dict[str, Any] = {"deepspeed__offloadOptimizer": "CPU"}
DROPOUT: dict[str, Any] = {"training__packing": True, "adapter__dropout": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "lora-zero0-packing-dropout": DROPOUT,
    "lora-zero0-fp32": {"training__precision": "FP32", "adapter__dropout": 0.1},
    "lora-zero3-2ranks-packing-dropout": {**DROPOUT, **TWO, "deepspeed__zeroStage": 3},
    "full-zero0-fp32-2ranks": {**FULL, **TWO, "training__precision": "FP32"},
    "full-zero1": {**FULL, "deepspeed__zeroStage": 1},
    "full-zero2-2ranks": {**FULL, **TWO, "deepspeed__zeroStage": 2},
    "full-zero3-2ranks-recompute": {
        **FULL,
        **TWO,
        "deepspeed__zeroStage": 3,
        "training__activationCheckpointing": "Full",
    },
    "full-zero3-2ranks-hpz": {**FULL, **TWO, **HPZ, "deepspeed__zeroStage": 3},
    "lora-zero3-2ranks-hpz": {**TWO, **HPZ, "deepspeed__zeroStage": 3},
    "full-zero2-offload": {**FULL, **CPU, "deepspeed__zeroStage": 2},
    "full-zero3-offload-all": {**FULL, **CPU, "deepspeed__zeroStage": 3, "deepspeed__offloadParameters": "CPU"},
    "qlora-4bit-dora-loraplus-packing-dropout-selective": {
        **DROPOUT,
        "method": "QLoRA",
        "quantization": {"bits": 4, "doubleQuantization": True},
        "adapter__variant": "DoRA",
        "adapter__loraPlusRatio": 4.0,
        "training__activationCheckpointing": "SelectiveOp",
    },
    "qlora-8bit-zero2-2ranks-paged": {
        **TWO,
        "method": "QLoRA",
        "quantization": {"bits": 8, "doubleQuantization": True},
        "training__optimizer": "PagedAdamW",
        "deepspeed__zeroStage": 2,
    },
    "full-pure-bf16-zero0-8bit-offloaded-activations": {
        **FULL,
        "training__precision": "PureBF16",
        "training__optimizer": "AdamW8bit",
        "training__activationCheckpointing": "FullOffload",
    },
    "freeze-pure-bf16-zero2-2ranks": {
        **TWO,
        "method": "Freeze",
        "adapter": None,
        "freeze": {"trainableLayers": 1, "trainableModules": ["All"], "extraModules": ["norm"]},
        "training__precision": "PureBF16",
        "deepspeed__zeroStage": 2,
    },
    "lora-zero3-2ranks-compiled": {
        **TWO,
        "deepspeed__zeroStage": 3,
        "training__packing": True,
        "training__compile": True,
    },
    "full-pure-bf16-zero0-compiled": {
        **FULL,
        "training__precision": "PureBF16",
        "training__packing": True,
        "training__compile": True,
    },
}


def weights(folder: Path) -> dict[str, str]:
    """SHA-256 of each exported safetensors file."""
    files = sorted((folder / "output").glob("*.safetensors"))
    assert files
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def losses(folder: Path) -> dict[int, tuple[str, str]]:
    """The last loss and gradient norm of each step, every bit of them."""
    lines = [json.loads(line) for line in (folder / "checkpoints" / "journal.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss_hex"], line["grad_norm_hex"]) for line in lines if "loss_hex" in line}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_killed_and_resumed_is_identical(
    changes: dict[str, Any], start: StartPod, assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if changes.get("training__compile"):
        monkeypatch.setenv("TEST_HOOK", "tests.trainer.compile_hook")
    changes = {**changes, "evaluation": [jobs.dataset(assets.evaluation, maxSamples=4)]}
    whole = start(tmp_path / "whole", **changes)
    killed = start(tmp_path / "killed", **changes)
    victim = killed.spec["numProcPerNode"] - 1
    killed.wait_for(lambda state: state.step >= 3 and state.last_checkpoint_step is not None, victim)
    killed.kill_rank(victim)
    assert killed.wait() == FAILURES[Reason.RANK_KILLED].exit_code, killed.log
    assert killed.report["reason"] == "RankKilled" and killed.report["rank"] == victim
    reached = max(losses(killed.folder))

    resumed = jobs.Pod(killed.folder, jobs.next_attempt(killed.spec), killed.server)
    report, unbroken = resumed.done(), whole.done()
    assert report["resumedFromStep"] in (2, 4)
    assert weights(killed.folder) == weights(whole.folder)
    assert losses(killed.folder) == losses(whole.folder)
    again = "done again after the restart: the same losses and gradient norms to the bit." in report["message"]
    assert again is (reached > report["resumedFromStep"])
    for name in ("loss", "evalLoss", "baseEvalLoss"):
        assert report[name] == unbroken[name], name


def test_sigterm_saves_and_resumes_identically(start: StartPod, tmp_path: Path) -> None:
    changes = {"training__maxSteps": 20, "checkpoint__everySteps": 100, "training__packing": True}
    whole = start(tmp_path / "whole", **changes)
    stopped = start(tmp_path / "stopped", **changes)
    stopped.wait_for_step(5)
    stopped.terminate()
    assert stopped.wait(20) == 143, stopped.log
    report = stopped.report
    assert report["reason"] == "Terminated"
    assert report["lastCheckpointStep"] == report["step"] >= 5

    resumed = jobs.Pod(stopped.folder, jobs.next_attempt(stopped.spec), stopped.server)
    assert resumed.done()["resumedFromStep"] == report["step"]
    whole.done()
    assert weights(stopped.folder) == weights(whole.folder)
    assert losses(stopped.folder) == losses(whole.folder)


def test_sigterm_on_one_of_two_pods_stops_both_at_one_step(
    server: jobs.ForkServer, assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    spec = jobs.launch(
        tmp_path, assets.model, assets.train, numNodes=2, training__microBatchSize=1, training__maxSteps=400
    )
    pods = [jobs.Pod(tmp_path, {**spec, "httpPort": jobs.free_port()}, server, node=node) for node in (0, 1)]
    pods[1].wait_for_step(3, rank=1)
    pods[1].terminate()
    assert [pod.wait(30) for pod in pods] == [143, 143], pods[0].log + pods[1].log
    assert pods[0].report["step"] == pods[1].report["step"]
    assert (tmp_path / "checkpoints" / f"step-{pods[0].report['step']:08d}" / "manifest.json").exists()


def test_a_killed_rank_ends_the_other_pod_too(
    server: jobs.ForkServer, assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pod tells its own part: the operator finds the cause in the first and restarts both."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    spec = jobs.launch(
        tmp_path, assets.model, assets.train, numNodes=2, training__microBatchSize=1, training__maxSteps=4000
    )
    pods = [jobs.Pod(tmp_path, {**spec, "httpPort": jobs.free_port()}, server, node=node) for node in (0, 1)]
    pods[1].wait_for_step(3, rank=1)
    pods[1].kill_rank(1)
    assert pods[1].wait(10) == FAILURES[Reason.RANK_KILLED].exit_code
    assert pods[0].wait(10) == FAILURES[Reason.COMMUNICATION_ERROR].exit_code, pods[0].log


def test_sigterm_without_saving(start: StartPod) -> None:
    pod = start(checkpoint__onTermination=False, checkpoint__everySteps=1000, training__maxSteps=400)
    pod.wait_for_step(2)
    pod.terminate()
    assert pod.wait(20) == 143
    assert "onTermination: false" in pod.report["message"]
    assert not list(pod.folder.glob("checkpoints/step-*"))


def test_sigterm_while_loading_leaves_at_once(start: StartPod) -> None:
    # Rank 1 of two nodes never comes, so rank 0 waits for it in Loading.
    pod = start(numNodes=2, training__microBatchSize=1)
    pod.wait_for(lambda state: state.activity == "Loading")
    pod.terminate()
    assert pod.wait(5) == 143
    assert "while loading" in pod.report["message"]
