"""The arithmetic: against plain transformers, packed against separate, many ranks against one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.launch import LaunchDataset
from finetune_trainer.data.batches import IGNORE, Rows
from finetune_trainer.data.packing import pack_rows, single_rows
from finetune_trainer.data.store import TokenStore, build_store
from finetune_trainer.data.tokenize import Encoder
from finetune_trainer.step import loss_sum
from tests.trainer import jobs, tiny
from tests.trainer.conftest import Assets, StartPod

CPU = torch.device("cpu")


def store_of(file: Path) -> TokenStore:
    dataset = LaunchDataset.model_validate(jobs.dataset(file))
    return build_store([(dataset, file)], Encoder(tiny.make_tokenizer(), "x"), 64, lambda: None)


@pytest.fixture(scope="module")
def store(assets: Assets) -> TokenStore:
    return store_of(assets.train)


def load(assets: Assets, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(assets.model, dtype=torch.float32, attn_implementation=attention)
    return model.eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_equals_separate_losses(store: TokenStore, assets: Assets, attention: str) -> None:
    model = load(assets, attention)
    rows = Rows(store, pack_rows(store.lengths, 120), packed=True)
    alone = Rows(store, single_rows(len(store)), packed=False)
    chosen = [row for row in range(len(rows)) if len(rows.samples[row]) > 1][:3]
    assert len(chosen) == 3
    with torch.no_grad():
        packed = loss_sum(model, rows.batch(chosen), CPU).item()
        separate = sum(loss_sum(model, alone.batch([int(s)]), CPU).item() for row in chosen for s in rows.samples[row])
        # The same tokens as one text are something else: the test would notice samples that see each other.
        batch = rows.batch(chosen)
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
        mixed = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum"
        ).item()
    assert packed == pytest.approx(separate, rel=2e-6)
    assert abs(mixed - separate) > 1e-4 * separate


def padded(store: TokenStore, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first samples as transformers wants them: ids, unshifted labels and attention mask, each (samples, tokens)."""
    lengths = store.lengths[:count].tolist()
    ids = torch.full((count, max(lengths)), 2)
    labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        part = slice(int(store.offsets[row]), int(store.offsets[row + 1]))
        ids[row, :length] = torch.tensor(store.ids[part])
        mask[row, :length] = 1
        labels[row, :length] = torch.where(torch.tensor(store.targets[part]), ids[row, :length], IGNORE)
    return ids, labels, mask


def test_loss_is_that_of_plain_transformers(store: TokenStore, assets: Assets) -> None:
    """Padding, masks and the shift, against the library's own way: attention mask and unshifted labels."""
    model = load(assets, "sdpa")
    rows = Rows(store, single_rows(len(store)), packed=False)
    ids, labels, mask = padded(store, 6)
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
        ours = loss_sum(model, rows.batch(list(range(6))), CPU).item() / rows.targets_in(list(range(6)))
    assert ours == pytest.approx(theirs, rel=1e-6)


def journal(pod: jobs.Pod) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in pod.journal if "loss" in line]


FULL_FP32: dict[str, Any] = {"method": "Full", "adapter": None, "training__precision": "FP32", "training__maxSteps": 8}
SPLITS: dict[str, dict[str, Any]] = {
    "accumulated": {"training__microBatchSize": 1},
    "2-ranks-zero0": {"numProcPerNode": 2},
    "2-ranks-zero2": {"numProcPerNode": 2, "training__microBatchSize": 1, "deepspeed__zeroStage": 2},
    "2-ranks-zero3": {"numProcPerNode": 2, "training__microBatchSize": 1, "deepspeed__zeroStage": 3},
}


@pytest.mark.parametrize("epochs", [None, 1], ids=["steps", "one-epoch-with-a-short-last-step"])
def test_any_split_of_a_batch_gives_the_same_run(start: StartPod, tmp_path: Path, epochs: int | None) -> None:
    """Rows have different numbers of targets, so a mean of means would be off by percents."""
    length = {"training__epochs": epochs, "training__maxSteps": None} if epochs else {}
    changes = {**FULL_FP32, **length, "training__globalBatchSize": 6 if epochs else 4}
    whole = start(tmp_path / "whole", **{**changes, "training__microBatchSize": changes["training__globalBatchSize"]})
    splits = SPLITS if epochs is None else {"2-ranks-zero2": {**SPLITS["2-ranks-zero2"], "training__microBatchSize": 3}}
    defaults = {"training__microBatchSize": 2}
    others = {name: start(tmp_path / name, **{**changes, **defaults, **split}) for name, split in splits.items()}
    expected = whole.done()
    assert expected["totalSteps"] == (8 if epochs is None else 7)
    for name, pod in others.items():
        report = pod.done()
        assert report["evalLoss"] == pytest.approx(expected["evalLoss"], rel=2e-5), name
        assert report["baseEvalLoss"] == pytest.approx(expected["baseEvalLoss"], rel=1e-6), name
        for ours, theirs in zip(journal(pod), journal(whole), strict=True):
            assert ours == pytest.approx(theirs, rel=2e-4), name


LOADER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, full, data = sys.argv[1:]
torch.set_num_threads(1)

def loss(model, tokenizer):
    total, count = 0.0, 0
    for line in open(data):
        turns = json.loads(line)["messages"]
        ids = tokenizer.apply_chat_template(turns, return_dict=False)
        labels = [-100] * len(ids)
        for index, turn in enumerate(turns):
            if turn["role"] == "assistant":
                start = len(tokenizer.apply_chat_template(turns[:index], add_generation_prompt=True, return_dict=False))
                end = len(tokenizer.apply_chat_template(turns[:index + 1], return_dict=False)) - 1  # without the line break
                labels[start:end] = ids[start:end]
        ids, labels = torch.tensor([ids[:64]]), torch.tensor([labels[:64]])
        targets = int((labels[:, 1:] != -100).sum())
        if targets:
            with torch.no_grad():
                total += model(input_ids=ids, labels=labels).loss.item() * targets
            count += targets
    return total / count

from peft import PeftModel
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
whole = AutoModelForCausalLM.from_pretrained(full, dtype=torch.float32)
print(json.dumps([loss(model.eval(), AutoTokenizer.from_pretrained(adapter)),
                  loss(whole.eval(), AutoTokenizer.from_pretrained(full))]))
"""


def test_export_loads_in_plain_libraries_with_the_same_loss(start: StartPod, assets: Assets, tmp_path: Path) -> None:
    lora = start(tmp_path / "lora", training__precision="FP32")
    full = start(tmp_path / "full", **FULL_FP32, deepspeed__zeroStage=3)
    reports = [lora.done(), full.done()]
    outputs = [str(tmp_path / name / "output") for name in ("lora", "full")]
    command = [sys.executable, "-c", LOADER, str(assets.model), *outputs, str(assets.evaluation)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    losses = json.loads(result.stdout.splitlines()[-1])
    assert losses == pytest.approx([report["evalLoss"] for report in reports], rel=1e-5)
    assert all(report["evalLoss"] < report["baseEvalLoss"] for report in reports)

    assert {path.stat().st_mode & 0o777 for path in Path(outputs[0]).iterdir()} == {0o644}, "others can read it"
    config = json.loads((Path(outputs[0]) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(assets.model)
    assert json.loads((Path(outputs[0]) / "finetunejob.json").read_text())["name"] == "tiny"
    summary = json.loads((Path(outputs[1]) / "train_result.json").read_text())
    assert summary["step"] == 8 and summary["eval_loss"] == reports[1]["evalLoss"] and "torch" in summary["versions"]
