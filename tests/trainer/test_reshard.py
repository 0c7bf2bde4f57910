"""A checkpoint is resumed on another number of ranks: the same state to the bit, and from there the same run within rounding."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from finetune_api.reasons import FAILURES, Reason
from finetune_trainer.reshard import Layout, ReshardError, read_part
from tests.trainer import jobs
from tests.trainer.conftest import StartPod
from tests.trainer.test_best import STOPPING
from tests.trainer.test_resume import CPU, DROPOUT, FULL, losses, weights

State = dict[str, torch.Tensor]
TOTAL = 6


def joined(parts: Sequence[State], blocks: Sequence[int], multiple: int) -> State:
    """What all ranks hold together: of each kind the numbers of all blocks without their padding, and single values."""
    whole: State = {}
    for name in {key.split(".")[1] for key in parts[0]}:
        if parts[0][f"0.{name}"].numel() == 1:
            singles = [value for part in parts for key, value in part.items() if key.endswith(f".{name}")]
            assert all(torch.equal(single, singles[0]) for single in singles)
            whole[name] = singles[0]
            continue
        lengths = [ceil(numel / multiple / len(parts)) * multiple for numel in blocks]
        vectors = []
        for part in parts:
            partitions = sorted(
                (key for key in part if key.endswith(f".{name}")), key=lambda key: int(key.split(".")[0])
            )
            vectors.append(torch.cat([part[key] for key in partitions]).split(lengths))
        whole[name] = torch.cat(
            [torch.cat(pieces)[:n] for n, pieces in zip(blocks, zip(*vectors, strict=True), strict=True)]
        )
    return whole


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rank-*.safetensors"))


@st.composite
def spreads(draw: st.DrawFn) -> tuple[Layout, int, int]:
    blocks = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    return Layout(tuple(blocks), draw(st.integers(1, 4))), draw(st.integers(1, 7)), draw(st.integers(1, 7))


def cut(numbers: Sequence[int], at: Sequence[int]) -> list[int]:
    """Lengths of the partitions if a vector of all these numbers is cut behind some of its pieces."""
    borders = sorted({sum(numbers[: i + 1]) for i in at if i < len(numbers)} | {sum(numbers)})
    return [end - begin for begin, end in zip([0, *borders], borders, strict=False)]


@settings(deadline=None, max_examples=150)
@given(spreads(), st.lists(st.integers(0, 5), max_size=3), st.lists(st.integers(0, 5), max_size=3))
def test_cut_and_cut_again_is_cut_at_once(
    tmp_path_factory: pytest.TempPathFactory, spread: tuple[Layout, int, int], old_cuts: list[int], new_cuts: list[int]
) -> None:
    """Every number is where it belongs, whatever the padding and wherever the partitions' borders lie."""
    layout, old, new = spread
    folder = tmp_path_factory.mktemp("parts")
    value = iter(range(1, 1 + sum(layout.blocks)))
    blocks = [[next(value) for _ in range(numel)] for numel in layout.blocks]

    def part(rank: int, num_ranks: int, cuts: list[int], padding: int) -> State:
        lengths = layout.pieces(num_ranks)
        padded = [b + [padding] * (n * num_ranks - len(b)) for b, n in zip(blocks, lengths, strict=True)]
        vector = [x for b, n in zip(padded, lengths, strict=True) for x in b[rank * n : (rank + 1) * n]]
        partitions = list(enumerate(torch.tensor(vector).split(cut(lengths, cuts))))
        masters = {f"{i}.master": x.to(torch.bfloat16) for i, x in partitions}
        moments = {f"{i}.exp_avg": x.float() for i, x in partitions}
        return masters | moments | {f"{i}.step": torch.tensor(3.0) for i, _ in partitions}

    names = [folder / f"rank-{rank}" for rank in range(old)]
    for rank, name in enumerate(names):
        save_file({k: v.clone() for k, v in part(rank, old, old_cuts, padding=-1).items()}, name)
    sizes = cut(layout.pieces(new), new_cuts)
    for rank in range(new):
        got, wanted = read_part(names, layout, sizes, rank, new), part(rank, new, new_cuts, padding=0)
        assert got.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert got[key].dtype == tensor.dtype and torch.equal(got[key], tensor), key
        assert len({tensor.data_ptr() for tensor in got.values()}) == len(got), "optimizers write into each of them"


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (
            {"0.state1": torch.zeros(6, dtype=torch.uint8), "0.absmax1": torch.zeros(2)},
            "`absmax1` does not have one value",
        ),
        ({"1.master": torch.zeros(2), "1.qmap1": torch.zeros(256)}, "`qmap1` does not have one value"),
        ({"1.master": torch.zeros(2)}, "in a way that is not known"),
    ],
    ids=["scales", "in-one-partition", "longer-than-the-layout"],
)
def test_what_cannot_be_cut_is_refused(tmp_path: Path, state: State, says: str) -> None:
    save_file({"0.master": torch.zeros(6), **state}, tmp_path / "part")
    with pytest.raises(ReshardError, match=says):
        read_part([tmp_path / "part"], Layout((6,)), [3], 0, 2)


@dataclass(frozen=True)
class Case:
    changes: dict[str, Any]
    old: int
    new: int
    tolerance: float
    """Largest relative difference of a step's loss."""


FP32, BF16 = 2e-7, 2e-4
"""Of float32 the last bit or two. Gradients in bf16 have 8 bits, and other shares are rounded elsewhere: unbroken runs of one job
on 1, 2 and 3 ranks were up to 4e-5 apart."""
SUB_GROUPS = {"zero_optimization": {"sub_group_size": 3000}}
FULL_PURE: dict[str, Any] = {**FULL, "training__precision": "PureBF16"}
FULL_FP32: dict[str, Any] = {**FULL, "training__precision": "FP32"}
CASES = {
    "lora-fp32-zero0-dropout": Case({**DROPOUT, "training__precision": "FP32"}, 3, 2, FP32),
    "lora-bf16-zero0": Case({}, 1, 2, BF16),
    "lora-bf16-zero2-loraplus": Case({"adapter__loraPlusRatio": 4.0, "deepspeed__zeroStage": 2}, 2, 1, BF16),
    "lora-bf16-zero3-dropout": Case({**DROPOUT, "deepspeed__zeroStage": 3}, 1, 2, BF16),
    "full-bf16-zero1": Case({**FULL, "deepspeed__zeroStage": 1}, 3, 2, BF16),
    "full-pure-bf16-zero2": Case({**FULL_PURE, "deepspeed__zeroStage": 2}, 2, 1, BF16),
    "full-fp32-zero2-paged": Case(
        {**FULL_FP32, "training__optimizer": "PagedAdamW", "deepspeed__zeroStage": 2}, 1, 2, FP32
    ),
    "full-fp32-zero3-offload-all-sub-groups": Case(
        {
            **FULL_FP32,
            **CPU,
            "deepspeed__zeroStage": 3,
            "deepspeed__offloadParameters": "CPU",
            "deepspeed__config": SUB_GROUPS,
        },
        3,
        2,
        FP32,
    ),
}


def ranks(number: int) -> dict[str, Any]:
    return {"numProcPerNode": number, "training__microBatchSize": 1}


def go_on(pod: jobs.Pod, number: int, **changes: Any) -> jobs.Pod:
    """The next attempt, on so many ranks."""
    training = pod.spec["training"]
    again = training["globalBatchSize"] // (training["microBatchSize"] * number)
    training = {**training, "gradientAccumulationSteps": again}
    return jobs.Pod(
        pod.folder, jobs.next_attempt(pod.spec, numProcPerNode=number, training=training, **changes), pod.server
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_same_state_and_the_same_run(
    case: Case, start: StartPod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"training__maxSteps": TOTAL, "training__globalBatchSize": 6, "training__learningRate": 0.001}
    whole = start(tmp_path, **case.changes, **more, **ranks(case.old), checkpoint__keep=9, evaluation=[])
    whole.done()
    unbroken, checkpoints = losses(tmp_path), tmp_path / "checkpoints"
    for step in range(4, TOTAL + 1, 2):
        shutil.rmtree(checkpoints / f"step-{step:08d}")
    (checkpoints / "journal.jsonl").unlink()

    facts = tmp_path / "facts"
    facts.mkdir()
    monkeypatch.setenv("TEST_HOOK", "tests.trainer.restored_hook")
    monkeypatch.setenv("TEST_FACTS", str(facts))
    report = go_on(whole, case.new).done()
    assert report["resumedFromStep"] == 2
    old, new = ([load_file(file) for file in files(folder)] for folder in (checkpoints / "step-00000002", facts))
    assert len(new) == case.new
    if (facts / "layout.json").exists():
        layout = json.loads((facts / "layout.json").read_text())
        assert len(old) == case.old
        old, new = ([joined(parts, **layout)] for parts in (old, new))
    for state in new:
        assert state.keys() == old[0].keys()
        for name, tensor in old[0].items():
            assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name

    again = losses(tmp_path)
    assert again.keys() == set(range(3, TOTAL + 1))
    apart = [abs(float.fromhex(again[step][0]) / float.fromhex(unbroken[step][0]) - 1) for step in again]
    assert apart[0] == 0, "the same rows, dropout and weights"
    assert max(apart) <= case.tolerance


def test_the_result_says_so(start: StartPod, tmp_path: Path) -> None:
    """From an older trainer's checkpoint, which named the number of ranks; and the attempt that finishes is a third one."""
    stopped = start(**ranks(2), training__maxSteps=30, checkpoint__everySteps=1000, evaluation=[])
    stopped.wait_for_step(3)
    stopped.terminate()
    assert stopped.wait(20) == 143, stopped.log
    step = stopped.report["step"]
    file = tmp_path / "checkpoints" / f"step-{step:08d}" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["progress"]["note"]
    manifest["fingerprint"] |= {"trainer.numNodes x numProcPerNode": 2, "training.gradientAccumulationSteps": 2}
    file.write_text(json.dumps(manifest))

    other = go_on(stopped, 1)
    said = f"Resumed from step-{step:08d} of 2 ranks on 1 rank: the same rows in the same order, sums in another order."
    state = other.wait_for_step(step + 1)
    assert state.note == said and said in other.log
    other.terminate()
    assert other.wait(20) == 143, other.log
    report = go_on(other, 1).done()
    assert report["resumedFromStep"] == other.report["step"]
    assert report["message"] == said
    assert json.loads((tmp_path / "output" / "train_result.json").read_text())["note"] == said


def test_the_best_checkpoint_of_another_number_is_exported(start: StartPod, tmp_path: Path) -> None:
    pod = start(**STOPPING, **ranks(2), deepspeed__zeroStage=2)
    before = pod.done()["message"]
    exported = weights(tmp_path)
    (tmp_path / "output" / "adapter_model.safetensors").unlink()
    report = go_on(pod, 1).done()
    assert report["message"].startswith(before) and "the best by EvalLoss" in before
    assert weights(tmp_path) == exported


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {**FULL, "training__optimizer": "AdamW8bit", "deepspeed__zeroStage": 2},
            "does not have one value for each weight",
        ),
        (
            {"deepspeed__config": {"zero_optimization": {"round_robin_gradients": True}}, "deepspeed__zeroStage": 2},
            "`deepspeed.config.zero_optimization.round_robin_gradients` spreads it in another way",
        ),
    ],
    ids=["8-bit", "round-robin"],
)
def test_what_can_only_be_resumed_as_it_was_is_refused(
    changes: dict[str, Any], says: str, start: StartPod, tmp_path: Path
) -> None:
    pod = start(**changes, **ranks(2), training__maxSteps=2, evaluation=[])
    pod.done()
    other = go_on(pod, 1)
    assert other.wait() == FAILURES[Reason.CONFIG_ERROR].exit_code, other.log
    message, folder = other.report["message"], tmp_path / "checkpoints" / "step-00000002"
    assert message.startswith(f"checkpoint.uri: {folder} is of 2 ranks and cannot be resumed on 1 rank: ")
    assert says in message and message.endswith("; resume with 2 ranks")
    assert go_on(other, 2).done()["resumedFromStep"] == 2
