"""Exported folders, against what transformers and peft write and read themselves."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_api.launch import LaunchSpec
from finetune_api.reasons import FAILURES, Reason
from finetune_trainer.errors import ConfigError
from finetune_trainer.export import set_ends
from finetune_trainer.shards import check_mergeable, plan_pieces, write_model
from tests.trainer import jobs, tiny
from tests.trainer.conftest import Assets, StartPod

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
IDS = torch.arange(12).reshape(1, 12)


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, **changes)).eval()


def mixtral() -> Any:
    """Its experts are single matrices in the files and fused in memory."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4)).eval()


def with_adapter(model: Any, **changes: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**{**settings, **changes})).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data += 0.1 * torch.rand_like(parameter)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits.float()
        return result


MODELS: dict[str, Any] = {
    "tied": lambda: llama(tie_word_embeddings=True),
    "untied": lambda: llama(tie_word_embeddings=False),
    "bf16": lambda: llama().to(torch.bfloat16),
    "fused-experts": mixtral,
    "lora": lambda: with_adapter(llama()),
    "rslora": lambda: with_adapter(llama(), use_rslora=True),
    "dora": lambda: with_adapter(llama(), use_dora=True),
    "lora-beside-fused-experts": lambda: with_adapter(mixtral(), target_modules=["q_proj", "o_proj"]),
    "lora-on-fused-experts": lambda: with_adapter(mixtral()),
}


@pytest.mark.parametrize("max_bytes", [10**9, 3000], ids=["one-file", "shards"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_a_model_is_what_transformers_would_have_saved(make: Any, max_bytes: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = make()
    expected = logits(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ours = tmp_path / "ours"
    ours.mkdir()
    write_model(model, ours, max_bytes, first=True)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())

    plain = deepcopy(model).merge_and_unload(safe_merge=True) if hasattr(model, "peft_config") else model
    plain.save_pretrained(tmp_path / "theirs", max_shard_size=max_bytes)
    written, reference = tensors(ours), tensors(tmp_path / "theirs")
    assert written.keys() == reference.keys()
    assert all(torch.equal(written[name], reference[name]) for name in reference)
    files = sorted(ours.glob("model-*.safetensors"))
    assert bool(files) == (max_bytes == 3000)
    if files:
        index = json.loads((ours / "model.safetensors.index.json").read_text())
        theirs = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
        assert index["metadata"] == theirs["metadata"]
        assert set(index["weight_map"].values()) == {file.name for file in files}

    plain.config.save_pretrained(ours)
    loaded = AutoModelForCausalLM.from_pretrained(ours, dtype=model.dtype).eval()
    # `to(bfloat16)` above has also rounded the frequencies of the positions, which loading does not.
    assert logits(loaded) == pytest.approx(expected, abs=2e-6 if model.dtype is torch.float32 else 5e-3)


def test_pieces_are_single_tensors_where_nothing_is_fused_and_layers_where_something_is() -> None:
    assert max(len(piece.sources) for piece in plan_pieces(llama())) == 1
    layers = [len(piece.sources) for piece in plan_pieces(mixtral())]
    assert max(layers) < sum(layers) / 2


def test_an_adapter_on_a_shared_weight_is_refused() -> None:
    check_mergeable(with_adapter(llama(tie_word_embeddings=True)))
    with pytest.raises(ConfigError, match=r"output\.mergeAdapter: .*lm_head"):
        check_mergeable(with_adapter(llama(tie_word_embeddings=True), target_modules=["q_proj", "lm_head"]))


LORA: dict[str, Any] = {
    "numProcPerNode": 2,
    "training__microBatchSize": 1,
    "training__precision": "FP32",
    "deepspeed__zeroStage": 3,
    "output__mergeAdapter": True,
    "output__maxShardBytes": 100_000,
}


def test_a_merged_export_of_two_ranks_with_partitioned_weights(start: StartPod, assets: Assets, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pod = start(**LORA)
    pod.done()
    output, merged = tmp_path / "output", tmp_path / "output" / "merged"
    assert {path.stat().st_mode & 0o777 for path in output.rglob("*") if path.is_file()} == {0o644}
    assert len(list(merged.glob("model-*-of-*.safetensors"))) > 2
    base = AutoModelForCausalLM.from_pretrained(assets.model, dtype=torch.float32)
    plain = logits(base.eval())
    adapted = logits(PeftModel.from_pretrained(base, output).eval())
    alone = logits(AutoModelForCausalLM.from_pretrained(merged).eval())
    assert (adapted - plain).abs().max() > 1e-3, "training has changed something"
    assert alone == pytest.approx(adapted, abs=1e-5)
    assert AutoTokenizer.from_pretrained(merged).chat_template == AutoTokenizer.from_pretrained(output).chat_template
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["use_cache"]


@pytest.mark.parametrize(
    ("template", "end", "ids", "eos"),
    [
        ("chatml", "<|im_end|>", [0, 2], "<|im_end|>"),
        (tiny.CHATML, "<|im_end|>", [0, 2], "<|endoftext|>"),
        (None, "<|endoftext|>", 0, "<|endoftext|>"),
        ("chatml", None, 0, "<|endoftext|>"),
    ],
    ids=["named", "own", "same", "texts"],
)
def test_generation_with_the_result_stops_where_answers_end(
    template: str | None, end: str | None, ids: int | list[int], eos: str, assets: Assets, tmp_path: Path
) -> None:
    """As for a base model whose end of text is another token than the end of a turn."""
    changes = {"model__chatTemplate": template}
    spec = LaunchSpec.model_validate(jobs.launch(tmp_path, assets.model, assets.train, **changes))
    tokenizer = tiny.make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    model = with_adapter(llama(eos_token_id=0))
    set_ends(model, tokenizer, spec, end)
    assert model.get_base_model().generation_config.eos_token_id == ids and tokenizer.eos_token == eos


def test_an_export_of_a_named_template_stops_at_its_end_of_turn(
    start: StartPod, assets: Assets, tmp_path: Path
) -> None:
    base = tiny.make_model(tmp_path / "base")
    tokenizer = tiny.make_tokenizer(template=None)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(base)
    (base / "generation_config.json").write_text('{"eos_token_id": 0}')
    model = {"uri": f"file://{base}", "source": {"kind": "Path", "path": str(base)}, "chatTemplate": "chatml"}
    start(**jobs.FULL, model=model, training__maxSteps=1, checkpoint__everySteps=1).done()
    output = tmp_path / "output"
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    assert json.loads((output / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


def test_merging_a_full_model_is_refused(start: StartPod) -> None:
    pod = start(method="Full", adapter=None, output__mergeAdapter=True)
    assert pod.wait() == FAILURES[Reason.CONFIG_ERROR].exit_code
    assert pod.report["message"].startswith("output.mergeAdapter")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_full_output_volume_is_no_error_of_the_code(
    start: StartPod, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """Python writes some of the files, safetensors and tokenizers, which have exceptions of their own, the others."""
    monkeypatch.setenv("TEST_HOOK", "tests.trainer.volume_hook")
    monkeypatch.setenv("TEST_FULL_OUTPUT", file)
    pod = start(training__maxSteps=1, evaluation=[])
    assert pod.wait() == FAILURES[Reason.STORAGE_ERROR].exit_code, pod.log
    assert pod.report["message"].startswith(f"output.uri: {pod.spec['outputDir']} cannot be written: ")
    assert "No space left on device" in pod.report["message"]


@pytest.mark.parametrize("in_place", [False, True], ids=["beside", "in-place"])
def test_what_earlier_attempts_left_of_an_export_is_removed(start: StartPod, tmp_path: Path, in_place: bool) -> None:
    output = tmp_path / "[out]"
    checkpoints = (output if in_place else tmp_path) / "checkpoints" / "tiny"
    output.mkdir()
    (output / "finetunejob.json").write_text('{"namespace": "team", "name": "tiny", "uid": "uid-1"}')
    parent = output if in_place else tmp_path
    left = [parent / f".[out].tmp-uid-1-{attempt}" for attempt in (0, 1)]
    others = parent / ".[out].tmp-uid-2-0"
    for folder in (*left, others):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x")
    changes = {"outputDir": str(output), "checkpoint__dir": str(checkpoints)}
    start(attempt=2, training__maxSteps=1, evaluation=[], **changes).done()
    assert not [folder for folder in left if folder.exists()] and others.exists()
    assert sorted(path.name for path in parent.glob(".*")) == [others.name]


def test_a_newer_attempt_that_comes_during_the_export_keeps_the_output(
    start: StartPod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_HOOK", "tests.trainer.volume_hook")
    monkeypatch.setenv("TEST_CLAIM", str(tmp_path / "checkpoints" / "attempt.json"))
    pod = start(training__maxSteps=1, evaluation=[])
    assert pod.wait() == FAILURES[Reason.SUPERSEDED].exit_code, pod.log
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["finetunejob.json"]


def test_an_output_folder_in_a_closed_one_is_filled_in_place(
    start: StartPod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its claim can be written, so the job trains; beside it nothing can."""
    monkeypatch.setenv("TEST_HOOK", "tests.trainer.closed_hook")
    output = tmp_path / "closed" / "out"
    output.mkdir(parents=True)
    output.parent.chmod(0o555)
    try:
        start(outputDir=str(output), training__maxSteps=1, evaluation=[]).done()
        assert (output / "adapter_model.safetensors").is_file() and not list(output.glob(".*"))
    finally:
        output.parent.chmod(0o755)


def test_a_whole_model_in_the_place_of_an_adapter_is_no_adapter(start: StartPod, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    output = tmp_path / "out"
    for number, method in enumerate(({}, jobs.FULL)):
        start(
            tmp_path / str(number),
            **method,
            job={"namespace": "team", "name": "tiny", "uid": f"uid-{number}"},
            outputDir=str(output),
            checkpoint__dir=str(output / "checkpoints" / f"tiny-{number}"),
            training__maxSteps=1,
            evaluation=[],
        ).done()
    assert not (output / "adapter_config.json").exists()
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(output).get_input_embeddings().weight,
        load_file(output / "model.safetensors")["model.embed_tokens.weight"],
    )
