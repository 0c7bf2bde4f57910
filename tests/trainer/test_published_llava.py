"""The published LLaVA-1.5-13B configuration converts and trains: every key of its LLaMA-Factory file has its effect.

`finetune convert`, then `finetune run` on two ranks with ZeRO-3, on a small random model of the same architecture and on
easy-VQA's images.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer import vision
from finetune_trainer.errors import ConfigError
from tests import easy_vqa
from tests.trainer import jobs, tiny
from tests.trainer.conftest import Assets
from tests.trainer.hub import COMMIT, Hub
from tests.trainer.published import change, convert, source
from tests.trainer.published_run import Published, Result

CASE = "llava-13b"
OPTIONS = ("--data-uri", "pvc://data/sets", "--output-uri", "pvc://data/runs", "--num-proc-per-node", "2")
SAMPLES = 34
"""Of the data's records, for the file's 100,000; the first one is too long."""
SMALLER: dict[str, Any] = {
    "deepspeed.zeroStage": 3,
    "training.attention": "SDPA",  # FlashAttention 2 is for GPUs
    "training.globalBatchSize": 16,
    "checkpoint.everySteps": 1,
}
"""All that the run changes in the converted job, beside `maxSamples`: accumulation of 2 instead of 4 micro-batches."""
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
RANKS = 2


@dataclass(frozen=True)
class Seen:
    result: Result
    model: Path

    @property
    def facts(self) -> list[dict[str, Any]]:
        return self.result.ranks

    def whole(self, part: str) -> set[str]:
        """Parameters of a part that are trained whole."""
        return {name for name in self.facts[0]["trained"] if vision.part_of(name) == part and ".lora_" not in name}


@pytest.fixture(scope="module")
def run(hub: Hub, server: jobs.ForkServer, assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("llava")
    model = tiny.make_llava(folder / "model", template=None, max_positions=4096)
    hub.repositories["models/llava-hf/llava-1.5-13b-hf"] = model
    body = change(convert(CASE, *OPTIONS), SMALLER)
    assert body["spec"]["datasets"]["train"][0]["maxSamples"] == source(CASE)["max_samples"]
    body["spec"]["datasets"]["train"][0]["maxSamples"] = SAMPLES
    machine = Published(folder / "run", server, assets, body, "tests.trainer.facts_hook")
    sets = easy_vqa.write(machine.folder / "sets", train=40, held_out=1)
    asked = [json.loads(line) for line in (sets / "train.jsonl").read_text().splitlines()]
    mixed = [one for pair in zip(asked, asked[1:], tiny.chats(len(asked), seed=4), strict=False) for one in pair]
    mixed[0]["messages"][1]["content"] = " ".join(tiny.WORDS * 100)
    (sets / "llava_mix.json").write_text(json.dumps(mixed[: SAMPLES + 9]))
    assert machine.run() == 0, machine.log
    return Seen(machine.result(), model)


Check = Callable[[Seen, Any], None]


def hub_model(run: Seen, value: Any) -> None:
    result = json.loads((run.result.machine.output / "train_result.json").read_text())
    assert result["model_uri"] == f"hf://{value}" and result["model_revision"] == COMMIT
    assert run.result.adapter["base_model_name_or_path"] == value


def supervised(run: Seen, _: Any) -> None:
    """Answers are learnt, and nothing else."""
    for text, learnt in list(run.result.samples())[1:]:
        assert learnt and "ASSISTANT" not in learnt and "<image>" not in learnt
        assert text.replace("<|im_end|>", "").endswith(learnt.split("<|im_end|>")[-2].strip())


def trains(run: Seen, _: Any) -> None:
    assert [line["step"] for line in run.result.steps] == list(range(1, len(run.result.steps) + 1))
    assert all(float(tensor.abs().max()) > 0 for name, tensor in run.result.tensors().items() if "lora_B" in name)


def adapters(run: Seen, _: Any) -> None:
    """Of the language model nothing but adapters is trained."""
    language = [name for name in run.facts[0]["trained"] if vision.part_of(name) is None]
    assert language and all(".lora_A." in name or ".lora_B." in name for name in language)


def vicuna_turns(run: Seen, _: Any) -> None:
    text, learnt = list(run.result.samples())[1]
    assert text.startswith("<|im_start|>A chat between a curious user and an artificial intelligence assistant.")
    assert " USER: <image>" in text and text.endswith(f" ASSISTANT:{learnt}") and learnt.endswith("<|im_end|>")


def data(run: Seen, _: Any) -> None:
    """Questions, answers and pictures of the file, in its order."""
    sets = run.result.machine.folder / "sets"
    mixed = json.loads((sets / "llava_mix.json").read_text())
    store = run.result.store()
    for sample, (text, _learnt) in enumerate(run.result.samples()):
        images = [image.path for image in store.images.of(sample)]
        assert images == [sets / name for name in mixed[sample].get("images", [])]
        assert text.count("<image>") == 16 * len(images)
        if sample:
            assert mixed[sample]["messages"][1]["content"] in text


def samples(run: Seen, value: Any) -> None:
    """The first so many; 100,000 in the file, see the fixture."""
    assert value == 100_000
    assert (
        len(run.result.store())
        == SAMPLES
        < len(json.loads((run.result.machine.folder / "sets" / "llava_mix.json").read_text()))
    )


def length(run: Seen, value: Any) -> None:
    widths = [width for facts in run.facts for _, width in facts["batches"]]
    assert int(run.result.store().lengths.max()) == value == max(widths)
    assert "(truncated 1, split 0)" in run.result.machine.log


def tower(run: Seen, value: Any) -> None:
    assert value is False
    trained = run.whole(vision.TOWER)
    layers = {name.split(".layers.")[1].split(".")[0] for name in trained if ".layers." in name}
    assert layers == {"0", "1"}, "all but the last layer, of which LLaVA takes nothing"
    before, after = base(run), run.result.tensors()
    matrices = [name for name in trained if after[name].dim() > 1]  # of norms bf16 shows no step so small
    assert len(matrices) == 2 + 6 * 2
    for name in matrices:
        assert not torch.equal(after[name], before[name.removeprefix("base_model.model.")]), name


def projector(run: Seen, value: Any) -> None:
    assert len(run.whole(vision.PROJECTOR)) == 4
    own = run.facts[0]["rates"][0::2]
    assert max(own) == pytest.approx(float(value), rel=1e-12)
    others = run.facts[0]["rates"][1::2]
    assert [a / b for a, b in zip(own, others, strict=True)] == pytest.approx([0.1] * len(own))


def base(run: Seen) -> dict[str, torch.Tensor]:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(run.model).state_dict()  # type: ignore[no-any-return]


def rank(run: Seen, value: Any) -> None:
    assert run.result.adapter["r"] == value
    shapes = {name: tensor.shape for name, tensor in run.result.tensors().items()}
    assert {shape[0] for name, shape in shapes.items() if "lora_A" in name} == {value}


def alpha(run: Seen, value: Any) -> None:
    assert run.result.adapter["lora_alpha"] == value
    assert run.facts[0]["scaling"] == [value / run.result.adapter["r"]]


def seven_projections(run: Seen, value: Any) -> None:
    """The tower has layers of three of these names too, which get no adapter."""
    adapted = {name for name in run.result.tensors() if ".lora_" in name}
    assert {name.split(".")[-3] for name in adapted} == LINEAR == set(value.split(","))
    assert not [name for name in adapted if vision.part_of(name)]


def place(run: Seen, value: Any) -> None:
    assert run.result.machine.output == run.result.machine.folder / "runs" / value
    assert (run.result.machine.output / "adapter_model.safetensors").is_file()


def micro_batch(run: Seen, value: Any) -> None:
    assert {rows for facts in run.facts for rows, _ in facts["batches"]} == {value}


def accumulation(run: Seen, value: Any) -> None:
    converted = convert(CASE, *OPTIONS)["spec"]["training"]
    assert converted["globalBatchSize"] == value * converted["microBatchSize"] * RANKS
    assert [len(facts["batches"]) for facts in run.facts] == [2 * len(run.result.steps)] * RANKS


def peak_rate(run: Seen, value: Any) -> None:
    assert max(run.facts[0]["rates"]) == float(value) and f"lr {float(value):.2e}" in run.result.machine.log


def epochs(run: Seen, value: Any) -> None:
    assert len(run.result.steps) == math.ceil(value * SAMPLES / 16)


def cosine(run: Seen, _: Any) -> None:
    """One step of warm-up, see `warmup`; then the first half of a cosine."""
    rates = run.facts[0]["rates"][1::2]
    left = len(rates) - 1
    assert rates[1:] == pytest.approx([2e-4 * (1 + math.cos(math.pi * n / left)) / 2 for n in range(left)])


def warmup(run: Seen, value: Any) -> None:
    """A share of three steps, rounded up: without warm-up the second step would be lower than the first."""
    rates = run.facts[0]["rates"][1::2]
    assert math.ceil(value * len(rates)) == 1 and rates[0] == rates[1] == 2e-4


def attention(run: Seen, _: Any) -> None:
    """What was asked for is refused on a CPU; the run was changed to SDPA."""
    from finetune_api.spec import Attention
    from finetune_trainer.attention import choose

    assert convert(CASE, *OPTIONS)["spec"]["training"]["attention"] == "FlashAttention2"
    assert run.facts[0]["attention"] == "sdpa"
    with pytest.raises(ConfigError, match=r"training\.attention: FlashAttention2 .*possible here: Auto"):
        choose(Attention.FLASH_ATTENTION_2, _model(run), torch.device("cpu"), torch.bfloat16)


def _model(run: Seen) -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(run.model)


def recomputation(run: Seen, value: Any) -> None:
    """Each micro-batch goes through a layer of the language model, or of the tower, once more in the backward pass."""
    assert value is True
    assert [facts["layer_calls"] for facts in run.facts] == [2 * len(facts["batches"]) for facts in run.facts]


def mixed_precision(run: Seen, _: Any) -> None:
    assert run.facts[0]["dtypes"] == ["torch.bfloat16"]
    assert {kind for kind, _, _ in run.facts[0]["masters"]} == {"torch.float32"} == set(run.facts[0]["moments"])


def workers(run: Seen, value: Any) -> None:
    assert run.result.launch["training"]["loaderWorkers"] == value
    assert {facts["loader_workers"] for facts in run.facts} == {value}


def kept(run: Seen, value: Any) -> None:
    assert len(list(run.result.checkpoints.glob("step-*"))) == value < len(run.result.steps)


CHECKS: dict[str, Check] = {
    "model_name_or_path": hub_model,
    "stage": supervised,
    "do_train": trains,
    "finetuning_type": adapters,
    "template": vicuna_turns,
    "dataset": data,
    "max_samples": samples,
    "cutoff_len": length,
    "freeze_vision_tower": tower,
    "mm_projector_lr": projector,
    "lora_rank": rank,
    "lora_alpha": alpha,
    "lora_target": seven_projections,
    "output_dir": place,
    "per_device_train_batch_size": micro_batch,
    "gradient_accumulation_steps": accumulation,
    "learning_rate": peak_rate,
    "num_train_epochs": epochs,
    "lr_scheduler_type": cosine,
    "warmup_ratio": warmup,
    "flash_attn": attention,
    "gradient_checkpointing": recomputation,
    "bf16": mixed_precision,
    "dataloader_num_workers": workers,
    "save_total_limit": kept,
}


def test_every_key_has_a_check() -> None:
    assert CHECKS.keys() == source(CASE).keys()


@pytest.mark.parametrize("key", CHECKS)
def test_every_key_has_its_effect(run: Seen, key: str) -> None:
    CHECKS[key](run, source(CASE)[key])


def test_the_result_is_what_zero_3_on_two_ranks_trained(run: Seen) -> None:
    assert {facts["zero_stage"] for facts in run.facts} == {3}
    for facts in run.facts:
        assert facts["held"] == {name: math.ceil(size / RANKS) for name, size in facts["whole"].items()}
