"""Whole runs of a small random model of LLaVA's kind on easy-VQA: it learns, resumes exactly, and its result loads elsewhere."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.reasons import FAILURES, Reason
from finetune_trainer import vision
from finetune_trainer.step import loss_sum
from tests.trainer import jobs, tiny
from tests.trainer.jobs import FULL
from tests.trainer.test_resume import losses, weights
from tests.trainer.test_vision import TRAINED, Seeing, rows_of, seeing, store_of

__all__ = ["seeing"]
CPU = torch.device("cpu")
TWO: dict[str, Any] = {"numProcPerNode": 2}
ZERO3: dict[str, Any] = {**TWO, "deepspeed__zeroStage": 3}
StartSeeing = Callable[..., jobs.Pod]


@pytest.fixture
def start(server: jobs.ForkServer, seeing: Seeing, tmp_path: Path) -> StartSeeing:
    """Starts a job on the seeing model; keyword arguments change its launch file."""

    def start(folder: Path = tmp_path, data: str = "train.jsonl", **changes: Any) -> jobs.Pod:
        changes = {"training__precision": "FP32", "training__maxLength": 120, **changes}
        spec = jobs.launch(folder, seeing.model, seeing.data / data, seeing.data / "heldout.jsonl", **changes)
        return jobs.Pod(folder, spec, server)

    return start


RESUMED: dict[str, dict[str, Any]] = {
    "lora-tower-projector": {**TRAINED, "adapter__dropout": 0.1},
    "lora-tower-projector-zero3-2ranks-mixed-packed-recompute": {
        **TRAINED,
        **ZERO3,
        "data": "mixed.jsonl",
        "training__packing": True,
        "training__activationCheckpointing": "Full",
    },
    "lora-all-frozen-zero3-2ranks-mixed": {**ZERO3, "data": "mixed.jsonl"},
    "qlora-tower-projector-zero2-2ranks-mixed": {
        **TRAINED,
        **TWO,
        "method": "QLoRA",
        "quantization": {"bits": 4, "doubleQuantization": True},
        "deepspeed__zeroStage": 2,
        "data": "mixed.jsonl",
    },
    "full-tower-zero3-2ranks-offload-mixed": {
        **FULL,
        **ZERO3,
        "vision": {"freezeTower": False, "projectorLearningRate": None},
        "deepspeed__offloadOptimizer": "CPU",
        "data": "mixed.jsonl",
    },
    "freeze-projector-zero1-2ranks-grouped-mixed": {
        **TWO,
        "method": "Freeze",
        "adapter": None,
        "freeze": {"trainableLayers": 1, "trainableModules": ["All"], "extraModules": []},
        "vision": {"freezeTower": True, "projectorLearningRate": 0.002},
        "deepspeed__zeroStage": 1,
        "training__groupByLength": True,
        "data": "mixed.jsonl",
    },
}


@pytest.mark.parametrize("changes", RESUMED.values(), ids=RESUMED.keys())
def test_killed_and_resumed_is_identical(changes: dict[str, Any], start: StartSeeing, tmp_path: Path) -> None:
    """Also with another number of workers, on which nothing depends."""
    whole = start(tmp_path / "whole", **changes)
    killed = start(tmp_path / "killed", **changes, training__loaderWorkers=5)
    victim = killed.spec["numProcPerNode"] - 1
    killed.wait_for(lambda state: state.step >= 3 and state.last_checkpoint_step is not None, victim)
    killed.kill_rank(victim)
    assert killed.wait() == FAILURES[Reason.RANK_KILLED].exit_code, killed.log
    again = jobs.next_attempt(killed.spec)
    again["training"]["loaderWorkers"] = 1
    report, unbroken = jobs.Pod(killed.folder, again, killed.server).done(), whole.done()
    assert report["resumedFromStep"] in (2, 4)
    assert weights(killed.folder) == weights(whole.folder)
    assert losses(killed.folder) == losses(whole.folder)
    assert report["evalLoss"] == unbroken["evalLoss"] != unbroken["baseEvalLoss"]


def changed(seeing: Seeing, folder: Path) -> dict[str, set[str]]:
    """Which parts of a model written whole are other than they were: by part the kinds of their tensors."""
    from transformers import LlavaForConditionalGeneration

    before, after = (
        LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in (seeing.model, folder)
    )
    found: dict[str, set[str]] = {}
    for name, tensor in before.items():
        part = vision.part_of(name) or "language_model"
        found.setdefault(part, set()).add("same" if torch.equal(tensor, after[name]) else "changed")
    return found


def test_it_learns_what_is_in_the_pictures(start: StartSeeing, seeing: Seeing, tmp_path: Path) -> None:
    """After training the held-out answers are likelier beside their own pictures than beside others'."""
    from transformers import LlavaForConditionalGeneration

    pod = start(
        **FULL,
        vision={"freezeTower": False, "projectorLearningRate": 0.003},
        training__learningRate=0.003,
        training__maxSteps=120,
        training__globalBatchSize=16,
        training__microBatchSize=16,
        checkpoint__everySteps=1000,
    )
    report = pod.done()
    assert report["evalLoss"] < 0.6 * report["baseEvalLoss"]
    output = tmp_path / "output"
    assert changed(seeing, output) == {
        vision.TOWER: {"changed", "same"},  # the last layer, which nothing depends on
        vision.PROJECTOR: {"changed"},
        "language_model": {"changed"},
    }
    model = LlavaForConditionalGeneration.from_pretrained(output, dtype=torch.float32).eval()
    vision.prepare(model)
    rows = rows_of(seeing, store_of(seeing, seeing.data / "heldout.jsonl"))
    batch = rows.batch(list(range(len(rows))))
    assert batch.pixel_values is not None
    with torch.no_grad():
        own = loss_sum(model, batch, CPU).item()
        others = loss_sum(model, replace(batch, pixel_values=batch.pixel_values.roll(7, 0)), CPU).item()
    assert own / batch.num_targets == pytest.approx(report["evalLoss"], rel=1e-5)
    assert own < others


EXPORTED: dict[str, dict[str, Any]] = {
    "tower-projector-zero3-2ranks-merged": {**TRAINED, **ZERO3, "output__mergeAdapter": True},
    "tower-projector-qlora": {
        **TRAINED,
        "method": "QLoRA",
        "quantization": {"bits": 4, "doubleQuantization": True},
    },
    "projector": {"vision": {"freezeTower": True, "projectorLearningRate": 0.01}},
    "adapter-on-both": {"adapter__targetModules": ["q_proj", "vision_tower.encoder.layers.0.mlp.fc1"]},
}


@pytest.mark.parametrize("name", EXPORTED)
def test_results_load_in_plain_transformers_and_peft_with_the_same_loss(
    name: str, start: StartSeeing, seeing: Seeing, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

    report = start(**EXPORTED[name], training__maxSteps=4).done()
    output = tmp_path / "output"
    config = json.loads((output / "adapter_config.json").read_text())
    block = EXPORTED[name].get("vision") or {"freezeTower": True, "projectorLearningRate": None}
    parts = [] if block["freezeTower"] else [vision.TOWER]
    parts += [vision.PROJECTOR] if block["projectorLearningRate"] else []
    assert (config["modules_to_save"] or []) == parts
    processor = AutoProcessor.from_pretrained(output)
    assert type(processor).__name__ == "LlavaProcessor" and processor.tokenizer.chat_template == tiny.CHATML

    quantized: dict[str, Any] = {}
    if "qlora" in name:
        quantized["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.multi_modal_projector"],
        )
    base = AutoModelForImageTextToText.from_pretrained(seeing.model, dtype=torch.float32, **quantized)
    models = [PeftModel.from_pretrained(base, str(output))]
    if "merged" in name:
        models.append(AutoModelForImageTextToText.from_pretrained(output / "merged", dtype=torch.float32))
        assert AutoProcessor.from_pretrained(output / "merged").image_processor.size == {"shortest_edge": 64}
    rows = rows_of(seeing, store_of(seeing, seeing.data / "heldout.jsonl"))
    batch = rows.batch(list(range(len(rows))))
    for model in models:
        with torch.no_grad():
            logits = model.eval()(input_ids=batch.input_ids, pixel_values=batch.pixel_values).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        assert loss.item() == pytest.approx(report["evalLoss"], rel=1e-5)
    assert report["evalLoss"] < report["baseEvalLoss"]


def test_ranks_with_and_without_images_give_what_one_rank_gives(start: StartSeeing, tmp_path: Path) -> None:
    """Rank 1 has texts only in some steps: it goes through the tower all the same."""
    pods = {
        name: start(tmp_path / name, data="mixed.jsonl", **TRAINED, **changes, training__maxSteps=5)
        for name, changes in {
            "one": {},
            "zero3": ZERO3,
            "zero2": {**TWO, "deepspeed__zeroStage": 2},
        }.items()
    }
    reports = {name: pod.done() for name, pod in pods.items()}
    for name in ("zero3", "zero2"):
        assert reports[name]["evalLoss"] == pytest.approx(reports["one"]["evalLoss"], rel=1e-5), name


def test_rates_and_freezing_have_their_effect(start: StartSeeing, seeing: Seeing, tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "nothing": {},
        "slow": {"vision": {"freezeTower": True, "projectorLearningRate": 1e-6}},
        "fast": {"vision": {"freezeTower": True, "projectorLearningRate": 1e-2}},
        "tower": {"vision": {"freezeTower": False, "projectorLearningRate": None}},
    }
    pods = {
        name: start(tmp_path / name, **block, training__maxSteps=3, output__mergeAdapter=True)
        for name, block in cases.items()
    }
    for pod in pods.values():
        pod.done()
    parts = {name: changed(seeing, tmp_path / name / "output" / "merged") for name in cases}
    same, both = {"same"}, {"changed", "same"}  # embeddings, norms and the head have no adapter
    assert parts["nothing"] == {vision.TOWER: same, vision.PROJECTOR: same, "language_model": both}
    assert parts["tower"] == {vision.TOWER: both, vision.PROJECTOR: same, "language_model": both}
    assert parts["slow"] == parts["fast"] == {vision.TOWER: same, vision.PROJECTOR: {"changed"}, "language_model": both}

    def distance(name: str) -> float:
        from safetensors.torch import load_file

        file = "model.safetensors"
        before, after = load_file(seeing.model / file), load_file(tmp_path / name / "output" / "merged" / file)
        names = [n for n in before if "projector" in n]
        return sum(float((before[n].float() - after[n].float()).norm()) for n in names)

    assert distance("fast") > 100 * distance("slow") > 0


def test_a_broken_picture_ends_the_job_with_its_name(start: StartSeeing, seeing: Seeing, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(seeing.data, data)
    (data / "images" / "train" / "3.png").write_bytes(b"no picture")
    spec = jobs.launch(tmp_path, seeing.model, data / "train.jsonl", training__maxSteps=40, training__maxLength=120)
    pod = jobs.Pod(tmp_path, spec, start(tmp_path / "other", training__maxSteps=1).server)
    assert pod.wait() == FAILURES[Reason.DATA_ERROR].exit_code, pod.log
    assert "images/train/3.png cannot be decoded" in pod.report["message"]


def test_tokenised_data_is_cached_with_its_images(start: StartSeeing, seeing: Seeing, tmp_path: Path) -> None:
    from finetune_trainer.data.cache import cached_store

    def cached(data: Path) -> Path:
        from finetune_api.launch import LaunchDataset
        from finetune_api.spec import Overlong

        dataset = LaunchDataset.model_validate(jobs.dataset(data / "heldout.jsonl") | {"uri": "pvc://c/heldout.jsonl"})
        sets = [(dataset, data / "heldout.jsonl")]
        return cached_store(
            tmp_path / "cache", tmp_path / "f", sets, seeing.encoder(), 120, Overlong.TRUNCATE, lambda: None
        )

    first = cached(seeing.data)
    assert cached(seeing.data) == first
    copy = tmp_path / "copy"
    shutil.copytree(seeing.data, copy)
    assert cached(copy) != first, "its images lie elsewhere"
    digests = [json.loads((folder / "store.json").read_text())["digest"] for folder in (first, cached(copy))]
    assert digests[0] == digests[1], "and are the same data"
    damaged = first / "image_places.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert cached(seeing.data) == first and hashlib.sha256(damaged.read_bytes()).hexdigest()
    assert len(damaged.read_bytes()) == json.loads((first / "store.json").read_text())["entries"]["image_places"]
