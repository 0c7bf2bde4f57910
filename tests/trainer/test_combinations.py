"""Unusual combinations train: a subset here, each of them unlike the others; the matrix is `benchmarks/combinations.py`."""

from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.config import read_launch
from finetune_trainer.errors import ConfigError
from tests.trainer import jobs
from tests.trainer.conftest import Assets, StartPod
from tests.trainer.jobs import FULL, HPZ

TWO: dict[str, Any] = {"numProcPerNode": 2, "training__microBatchSize": 1}
CPU: dict[str, Any] = {"deepspeed__offloadOptimizer": "CPU"}
SUBSET: dict[str, dict[str, Any]] = {
    "dora-zero1-offloaded-fp32-every-second-layer": {
        **CPU,
        "deepspeed__zeroStage": 1,
        "adapter__variant": "DoRA",
        "training__precision": "FP32",
        "training__activationCheckpointing": "SelectiveLayer",
    },
    "full-zero3-pure-bf16-8bit-activations-on-cpu-hpz": {
        **FULL,
        **TWO,
        "deepspeed__zeroStage": 3,
        **HPZ,
        "training__precision": "PureBF16",
        "training__optimizer": "AdamW8bit",
        "training__activationCheckpointing": "FullOffload",
    },
    "full-zero3-pure-bf16-all-offloaded": {
        **FULL,
        **CPU,
        "deepspeed__zeroStage": 3,
        "deepspeed__offloadParameters": "CPU",
        "training__precision": "PureBF16",
    },
    "qlora-8bit-zero1-fp32-paged-recompute": {
        "method": "QLoRA",
        "quantization": {"bits": 8, "doubleQuantization": True},
        "deepspeed__zeroStage": 1,
        "training__precision": "FP32",
        "training__optimizer": "PagedAdamW8bit",
        "training__activationCheckpointing": "Full",
    },
}


def test_unusual_combinations_train(start: StartPod, tmp_path: Path) -> None:
    pods = {name: start(tmp_path / name, training__maxSteps=2, **changes) for name, changes in SUBSET.items()}
    for name, pod in pods.items():
        report = pod.done()
        assert report["evalLoss"] < report["baseEvalLoss"], name


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "QLoRA", "deepspeed__zeroStage": 3}, "quantised weights cannot be partitioned"),
        ({"method": "Freeze"}, "adapter: must be set for method LoRA and QLoRA, and absent for others"),
        ({"method": "QLoRA", "quantization": None}, "quantization: must be set for method QLoRA"),
    ],
    ids=["refused-combination", "adapter-of-freeze", "nothing-to-quantise-with"],
)
def test_a_local_launch_is_checked_as_the_api_server_does(
    assets: Assets, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    import json

    quantization = {"bits": 4, "doubleQuantization": True} if changes["method"] == "QLoRA" else None
    file = tmp_path / "launch.json"
    changes = {"quantization": quantization, **changes}
    file.write_text(json.dumps(jobs.launch(tmp_path, assets.model, assets.train, **changes)))
    with pytest.raises(ConfigError, match=says):
        read_launch(file)
