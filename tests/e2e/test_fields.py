"""Fields beside the everyday ones, in jobs that run side by side: each reaches a real trainer and has its effect."""

import json
from typing import Any

import pytest

from tests.contract.manifests import GOOD
from tests.e2e.cluster import Cluster
from tests.e2e.jobs import CLAIM, HELD_OUT, PICTURES, PROBLEMS, SEEING, TRAIN, Job, start
from tests.e2e.volume import TOOLBOX

pytestmark = pytest.mark.cluster

QLORA: dict[str, Any] = {
    "datasets": {
        "train": [
            {"uri": TRAIN, "format": "Messages", "maxSamples": 32, "weight": "2"},
            {"uri": HELD_OUT, "format": "Messages", "tags": {"userTag": "user"}, "weight": "1"},
        ],
        "evaluation": [
            {"uri": HELD_OUT, "format": "Messages", "maxSamples": 4},
            {"uri": PROBLEMS, "benchmark": "HumanEval", "maxSamples": 2},
        ],
    },
    "method": "QLoRA",
    "adapter": {"variant": "DoRA", "loraPlusRatio": "4"},
    "quantization": {"bits": 4, "doubleQuantization": True},
    "training": {
        "maxSteps": 6,
        "packing": True,
        "globalBatchSize": 2,
        "overlong": "Split",
        "maskHistory": True,
        "attention": "Varlen",
        "optimizer": "AdamW8bit",
        "adamBeta2": "0.99",
        "scheduler": "WarmupStableDecay",
        "schedulerParameters": {"numDecaySteps": 2},
        "warmupSteps": 2,
        "activationCheckpointing": "SelectiveOp",
        "evalEverySteps": 3,
    },
    "evaluation": {"metric": "EvalLoss", "exportBest": True, "generation": {"maxNewTokens": 8}},
    "tracking": {
        "tensorBoard": {"uri": f"pvc://{CLAIM}/outputs/boards"},
        "wandb": {"project": "tests"},
        "profiler": {"uri": f"pvc://{CLAIM}/outputs/traces", "wait": 3, "active": 1},
    },
    "trainer": {"env": [{"name": "WANDB_MODE", "value": "offline"}, {"name": "HOME", "value": "/tmp"}]},
    "checkpoint": {"everySteps": 2, "background": True},
}
FREEZE: dict[str, Any] = {
    "datasets": {"evaluation": [{"uri": HELD_OUT, "format": "Messages", "maxSamples": 1}]},
    "method": "Freeze",
    "adapter": None,
    "freeze": {"trainableLayers": 1, "trainableModules": ["mlp"]},
    "training": {
        # CPUs without bf16 arithmetic emulate it: so little that it takes seconds.
        "maxSteps": 2,
        "maxLength": 64,
        "globalBatchSize": 2,
        "precision": "PureBF16",
        "optimizer": "PagedAdamW",
        "overlong": "TruncateShare",
        "trainOnPrompt": True,
        "groupByLength": True,
        "attention": "Eager",
        "activationCheckpointing": "FullOffload",
    },
    "deepspeed": {"zeroStage": 1, "config": {"zero_optimization": {"reduce_bucket_size": 1000000}}},
    "output": {"maxShardSize": "20MB"},
}
LLAVA: dict[str, Any] = {
    "model": {"uri": SEEING},
    "datasets": {
        "train": [{"uri": f"{PICTURES}/train.jsonl", "format": "Messages", "columns": {"images": "images"}}],
        "evaluation": [{"uri": f"{PICTURES}/heldout.jsonl", "format": "Messages"}],
    },
    "vision": {"freezeTower": False, "projectorLearningRate": "2e-3"},
    "training": {"maxSteps": 12, "loaderWorkers": 4},
    "deepspeed": {"zeroStage": 3},
}
ADMITTED: dict[str, dict[str, Any]] = {
    "merged adapter, shards": {"output": {**GOOD["spec"]["output"], "mergeAdapter": True, "maxShardSize": "2GiB"}},
    "liger and compile": {
        "training": {**GOOD["spec"]["training"], "ligerKernel": True, "compile": True, "attention": "Flex"}
    },
    "columns": {
        "datasets": {
            "train": [
                {"uri": "pvc://c/d", "format": "Alpaca", "columns": {"prompt": "q", "response": "a"}, "split": "train"}
            ]
        }
    },
    "template by name": {"model": {"uri": "pvc://c/m", "chatTemplate": "llama3"}},
    "early stopping": {
        "evaluation": {"metric": "TokenAccuracy", "earlyStoppingPatience": 2, "earlyStoppingMinDelta": "0.01"},
        "training": {**GOOD["spec"]["training"], "evalEverySteps": 2},
    },
}


@pytest.fixture(scope="module")
def jobs(cluster: Cluster) -> dict[str, Job]:
    """All of them, Complete."""
    specs = {"qlora": QLORA, "freeze": FREEZE, "llava": LLAVA}
    started = {name: start(cluster.kubectl, name, spec) for name, spec in specs.items()}
    for job in started.values():
        job.complete()
    return started


def test_qlora_with_a_benchmark_and_trackers(cluster: Cluster, jobs: dict[str, Job]) -> None:
    qlora = jobs["qlora"]
    progress = qlora.status["progress"]
    metrics = {metric["name"]: metric["value"] for metric in progress["metrics"]}
    assert set(metrics) == {"TokenAccuracy", "HumanEvalPassAt1"}
    result = json.loads(_read(cluster, f"outputs/{qlora.name}/train_result.json"))
    measured = {line["step"]: line["values"]["EvalLoss"] for line in result["metrics"]}
    assert set(measured) == {0, 3, 6} and result["exported_step"] in (3, 6)
    assert min(measured[3], measured[6]) < measured[0]
    config = json.loads(_read(cluster, f"outputs/{qlora.name}/adapter_config.json"))
    assert config["use_dora"] is True
    boards = cluster.kubectl.exec(TOOLBOX, "sh", "-c", "ls /mnt/outputs/boards/*")
    assert "events.out.tfevents" in boards
    traces = cluster.kubectl.exec(TOOLBOX, "sh", "-c", "ls /mnt/outputs/traces/*/attempt-1")
    assert traces.split() == ["rank-00000.json.gz"]


def test_frozen_layers_stay_and_the_output_has_shards(cluster: Cluster, jobs: dict[str, Job]) -> None:
    freeze = jobs["freeze"]
    changed = cluster.kubectl.exec(TOOLBOX, "python", "-c", CHANGED, f"/mnt/outputs/{freeze.name}").split()
    assert changed and all(name.startswith("model.layers.1.mlp.") for name in changed), changed


def test_a_model_that_sees(cluster: Cluster, jobs: dict[str, Job]) -> None:
    output = f"outputs/{jobs['llava'].name}"
    result = json.loads(_read(cluster, f"{output}/train_result.json"))
    assert result["data"]["train"][0]["images"] == result["data"]["train"][0]["samples"] > 50
    assert result["eval_loss"] < result["base_eval_loss"]
    config = json.loads(_read(cluster, f"{output}/adapter_config.json"))
    assert config["modules_to_save"] == ["vision_tower", "multi_modal_projector"]
    assert json.loads(_read(cluster, f"{output}/processor_config.json"))["processor_class"] == "LlavaProcessor"


CHANGED = """
import glob, sys
from safetensors.torch import load_file
def weights(folder):
    files = glob.glob(folder + "/*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}, len(files)
ours, count = weights(sys.argv[1])
base, _ = weights("/mnt/models/SmolLM2-first-2-layers")
assert count > 1, count
print(*(name for name in ours if not ours[name].equal(base[name].to(ours[name].dtype))))
"""


@pytest.mark.parametrize("case", ADMITTED)
def test_admitted(cluster: Cluster, case: str) -> None:
    manifest = {**GOOD, "spec": {**GOOD["spec"], **ADMITTED[case]}}
    assert "created" in cluster.kubectl.apply(manifest, dry_run=True)


def _read(cluster: Cluster, path: str) -> str:
    return cluster.kubectl.exec(TOOLBOX, "cat", f"/mnt/{path}")
