"""Attention: every implementation that runs here isolates packed samples, and what cannot be exact is refused with words."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_api.launch import LaunchDataset
from finetune_api.reasons import FAILURES, Reason
from finetune_api.spec import Attention
from finetune_trainer import kernels
from finetune_trainer.attention import (
    Choice,
    choose,
    flash,
    keeps_apart,
    layout_arguments,
    plain_attention,
    use,
    varlen,
)
from finetune_trainer.compile import compile_layers
from finetune_trainer.data.batches import Rows
from finetune_trainer.data.packing import SampleRows, pack_rows, single_rows
from finetune_trainer.data.store import TokenStore, build_store
from finetune_trainer.data.tokenize import Encoder
from finetune_trainer.errors import ConfigError
from finetune_trainer.step import loss_sum
from tests.trainer import jobs, tiny
from tests.trainer.conftest import Assets, StartPod
from tests.trainer.test_numbers import padded

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ON_CPU = [Attention.SDPA, Attention.EAGER, Attention.VARLEN]


@pytest.fixture(scope="module")
def store(assets: Assets) -> TokenStore:
    dataset = LaunchDataset.model_validate(jobs.dataset(assets.train))
    return build_store([(dataset, assets.train)], Encoder(tiny.make_tokenizer(), "x"), 64, lambda: None)


def model_with(assets: Assets, attention: Attention, **config: Any) -> Any:
    kind = AutoConfig.for_model(config.pop("model_type"), **config) if "model_type" in config else None
    if kind is None:
        model = AutoModelForCausalLM.from_pretrained(assets.model, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind)
    choice = choose(attention, model, CPU, torch.float32)
    use(model, choice)
    model.finetune_kernels = kernels.Kernels(choice)
    return model.eval()


def sliding(assets: Assets, attention: Attention) -> Any:
    """A model whose tokens see 8 tokens: less than a sample."""
    return model_with(
        assets,
        attention,
        model_type="mistral",
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )


@pytest.mark.parametrize("make", [model_with, sliding], ids=["llama", "sliding-window"])
@pytest.mark.parametrize("attention", ON_CPU)
def test_packed_loss_equals_separate_losses(store: TokenStore, assets: Assets, attention: Attention, make: Any) -> None:
    model = make(assets, attention)
    rows = Rows(store, pack_rows(store.lengths, 120), packed=True)
    padded = Rows(store, rows.samples, packed=True, pad_to=160)
    alone = Rows(store, single_rows(len(store)), packed=False)
    chosen = [row for row in range(len(rows)) if len(rows.samples[row]) > 1][:3]
    with torch.no_grad():
        packed = loss_sum(model, rows.batch(chosen), CPU).item()
        wide = loss_sum(model, padded.batch([*chosen, None]), CPU).item()
        separate = sum(loss_sum(model, alone.batch([int(s)]), CPU).item() for row in chosen for s in rows.samples[row])
        together = loss_sum(model, alone.batch([int(s) for row in chosen for s in rows.samples[row]]), CPU).item()
    reference = make(assets, Attention.SDPA)
    with torch.no_grad():
        theirs = sum(
            loss_sum(reference, alone.batch([int(s)]), CPU).item() for row in chosen for s in rows.samples[row]
        )
    assert [packed, wide, together, separate] == pytest.approx([theirs] * 4, rel=2e-6)


@pytest.mark.parametrize("attention", ON_CPU)
def test_loss_and_gradient_are_those_of_transformers(store: TokenStore, assets: Assets, attention: Attention) -> None:
    """A padded batch, against the library's own way: its default attention, an attention mask and unshifted labels."""
    from transformers import AutoModelForCausalLM

    rows = Rows(store, single_rows(len(store)), packed=False)
    ids, labels, mask = padded(store, 4)
    theirs = AutoModelForCausalLM.from_pretrained(assets.model, dtype=torch.float32)
    ours = model_with(assets, attention)
    expected = theirs(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss = loss_sum(ours, rows.batch(list(range(4))), CPU) / rows.targets_in(list(range(4)))
    expected.backward()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_compiled_layers_are_compiled_once_for_all_layouts(assets: Assets) -> None:
    contents = [[40, 30, 20], [8] * 20, [100, 60], [160]]
    lengths = np.concatenate(contents)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.random.default_rng(0).integers(5, 300, size=int(offsets[-1]), dtype=np.int32)
    samples = SampleRows(np.arange(len(lengths)), np.cumsum([0, *map(len, contents)]))
    rows = Rows(TokenStore(ids, np.ones(len(ids), dtype=bool), offsets), samples, packed=True, pad_to=160)
    batches = [rows.batch([row]) for row in range(4)]
    layouts = [layout_arguments(batch.sequence_lengths) for batch in batches]
    assert {(len(a["cu_seq_lens_q"]), a["max_length_q"]) for a in layouts} == {(16, 40), (32, 8), (16, 100), (16, 160)}
    model = model_with(assets, Attention.VARLEN).train()
    expected = [loss_sum(model, batch, CPU).item() for batch in batches]
    torch._dynamo.reset()
    graphs: list[Any] = []

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compile_layers(model, whole=True, backend=compiler)
    for batch, value in zip(batches, expected, strict=True):
        loss = loss_sum(model, batch, CPU)
        loss.backward()
        assert loss.item() == pytest.approx(value, rel=1e-6)
    assert len(graphs) == 1


def test_layout_covers_the_batch_and_its_longest_is_true() -> None:
    arguments = layout_arguments(np.array([3, 5, 1]))
    assert arguments["cu_seq_lens_q"].tolist() == [0, 3, 8, *[9] * 13]
    assert arguments["cu_seq_lens_q"] is arguments["cu_seq_lens_k"] and arguments["cu_seq_lens_q"].dtype == torch.int32
    assert arguments["max_length_q"] == arguments["max_length_k"] == 5
    assert len(layout_arguments(np.ones(16, dtype=np.int64))["cu_seq_lens_q"]) == 32


SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}  # fmt: skip
TOGETHER: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
                         "mamba_d_state": 8, "num_local_experts": 0, "shared_intermediate_size": 32},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32},
}  # fmt: skip
"""Models that do not keep samples of a row apart: by convolutions, by a state, by positions."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mixtral", "qwen3_moe", *TOGETHER])
def test_a_model_that_shows_samples_to_each_other_is_found_out(kind: str, dtype: torch.dtype) -> None:
    known = vars(AutoConfig.for_model(kind))
    sizes = {name: value for name, value in SMALL.items() if name in known} | TOGETHER.get(kind, {})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), attn_implementation="sdpa")
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # as different from each other as trained ones are
    apart = keeps_apart(model.to(dtype), 64, torch.device("cpu"), by_layout=False)
    assert apart is (kind not in TOGETHER) and model.training


def test_packing_is_refused_where_samples_would_see_each_other(start: StartPod, assets: Assets, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(assets.model, model)
    (model / "model.safetensors").unlink()
    sizes = {**SMALL, **TOGETHER["lfm2"], "vocab_size": 512, "initializer_range": 0.2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("lfm2", **sizes)).save_pretrained(model)
    changes = {
        "model__source": {"kind": "Path", "path": str(model)},
        "adapter__targetModules": ["w1"],
        "training__precision": "FP32",
        "training__maxSteps": 1,
    }
    plain, packed = (start(tmp_path / str(packing), **changes, training__packing=packing) for packing in (False, True))
    plain.done()
    assert packed.wait() == FAILURES[Reason.CONFIG_ERROR].exit_code, packed.log
    assert "training.packing: samples of one row would see each other in Lfm2ForCausalLM" in packed.report["message"]


def test_a_forward_pass_without_layout_is_refused_but_generation_has_a_way(assets: Assets) -> None:
    model = model_with(assets, Attention.VARLEN)
    ids = torch.arange(5, 11).unsqueeze(0)
    with pytest.raises(RuntimeError, match="plain_attention"):
        model(input_ids=ids)
    with plain_attention(model):
        made = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=2)
    assert made.shape == (1, 9)
    assert model.config._attn_implementation == "finetune_varlen"


GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 1, "vocab_size": 64}
GEMMA2: dict[str, Any] = {"model_type": "gemma2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32,
                          "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "config", "says"),
    [
        (
            Attention.FLASH_ATTENTION_2,
            {},
            "FlashAttention2 needs an NVIDIA GPU; possible here: Auto, Varlen, SDPA, Eager",
        ),
        (Attention.FLASH_ATTENTION_3, {}, "FlashAttention3 needs an NVIDIA GPU"),
        (Attention.FLEX, {}, "Flex trains on GPUs only"),
        (Attention.VARLEN, GEMMA2, "cannot cap attention scores"),
        (Attention.SDPA, GEMMA2, "is not known to this model; possible here: Auto, Eager"),
        (Attention.VARLEN, {"attention_dropout": 0.1}, "the model's attention_dropout is 0.1"),
        (Attention.VARLEN, GPT2, "the model's attn_pdrop is 0.1"),
        (Attention.VARLEN, {"attention_chunk_size": 4}, "chunked attention"),
    ],
)
def test_what_would_be_wrong_is_refused(assets: Assets, wanted: Attention, config: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"training.attention: .*{says}"):
        model_with(assets, wanted, **(config if "model_type" in config else {"model_type": "llama", "hidden_size": 32,
                   "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 64, **config}))  # fmt: skip


def test_auto_takes_the_first_that_is_exact_and_says_why(assets: Assets, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(assets.model, dtype=torch.bfloat16)
    auto = Attention.AUTO
    assert choose(auto, model, CPU, torch.float32).name is Attention.SDPA
    monkeypatch.setattr(flash, "why_not", lambda version: f"needs {version}")
    monkeypatch.setattr(varlen, "why_not", lambda: None)
    on_gpu = choose(auto, model, CUDA, torch.bfloat16)
    assert on_gpu.name is Attention.VARLEN and on_gpu.by_layout
    assert str(on_gpu) == (
        "attention: Varlen (Auto: the fastest that is exact here; FlashAttention3 needs 3; FlashAttention2 needs 2)"
    )
    assert choose(auto, model, CUDA, torch.float32).name is Attention.SDPA, "kernels of layouts compute in BF16"
    monkeypatch.setattr(flash, "why_not", lambda version: None if version == 2 else "is missing")
    assert choose(auto, model, CUDA, torch.bfloat16).name is Attention.FLASH_ATTENTION_2
    assert (
        choose(auto, model_with(assets, Attention.EAGER, **GEMMA2), CUDA, torch.bfloat16).name
        is Attention.FLASH_ATTENTION_2
    )


def call_of_kernel(monkeypatch: pytest.MonkeyPatch, kernel: Any, window: int | None) -> dict[str, Any]:
    """What a kernel's library function is called with."""
    seen: dict[str, Any] = {}

    def record(*tensors: Any, **options: Any) -> torch.Tensor:
        seen.update(options, positional=tensors)
        return torch.zeros(6, 4, 8)

    monkeypatch.setattr(flash, "_FUNCTIONS", {2: record, 3: record})
    from finetune_trainer.attention.sequences import Sequences

    boundaries = torch.tensor([0, 2, 6, 6], dtype=torch.int32)
    query, key = torch.zeros(6, 4, 8), torch.zeros(6, 2, 8)
    kernel(query, key, key, Sequences(boundaries, 4, 0.25, window, None, 0.0))
    return seen


def test_varlen_calls_operators_as_the_installed_torch_has_them() -> None:
    """Their shapes, without a GPU; and the setting that makes the backward pass deterministic is only on within it."""
    query, key = (torch.empty(6, heads, 8, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    boundaries = torch.empty(3, dtype=torch.int32, device="meta")
    out, lse = varlen._attention._init_fn(query, key, key, boundaries, 4, 0.25, 2)
    assert out.shape == (6, 4, 8) and lse.shape == (4, 6) and lse.dtype == torch.float32
    grads = varlen._attention_backward._init_fn(out, query, key, key, out, lse, boundaries, 4, 0.25, 2)
    assert [grad.shape for grad in grads] == [query.shape, key.shape, key.shape]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with varlen._in_fixed_order():
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("window", [-1, 2])
def test_varlen_is_a_proper_operator(window: int) -> None:
    query, key = (torch.randn(6, heads, 8, requires_grad=True) for heads in (4, 2))
    boundaries = torch.tensor([0, 2, 6, 6], dtype=torch.int32)
    torch.library.opcheck(varlen._attention, (query, key, key.detach(), boundaries, 4, 0.25, window))


@pytest.mark.parametrize("kernel", [flash.kernel_2, flash.kernel_3])
def test_flash_attention_is_causal_and_deterministic(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    seen = call_of_kernel(monkeypatch, kernel, 3)
    assert seen["causal"] is True and seen["deterministic"] is True and seen["window_size"] == (2, 0)
    assert seen["max_seqlen_q"] == 4 and seen["softmax_scale"] == 0.25 and "softcap" not in seen


def test_a_job_with_varlen_trains_as_with_sdpa(start: StartPod, tmp_path: Path) -> None:
    packed = {"training__precision": "FP32", "training__packing": True, "training__maxLength": 128}
    pods = [start(tmp_path / name, **packed, training__attention=name) for name in ("Varlen", "Auto")]
    reports = [pod.done() for pod in pods]
    assert reports[0]["evalLoss"] == pytest.approx(reports[1]["evalLoss"], rel=1e-4)
    assert "attention: Varlen (as the job says)" in pods[0].log
    assert "attention: SDPA (Auto: the fastest that is exact here)" in pods[1].log
    assert "cross-entropy: fused with the head" in pods[0].log


def test_an_attention_that_is_not_there_ends_the_job_with_words(start: StartPod) -> None:
    pod = start(training__attention="FlashAttention2")
    assert pod.wait() != 0
    assert pod.report["reason"] == "ConfigError"
    assert "training.attention: FlashAttention2 needs an NVIDIA GPU; possible here: Auto" in pod.report["message"]


def test_choice_names_are_registered(assets: Assets) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model_with(assets, Attention.VARLEN)
    for name in (
        Attention.VARLEN,
        Attention.FLASH_ATTENTION_2,
        Attention.FLASH_ATTENTION_3,
        Attention.SDPA,
        Attention.FLEX,
    ):
        assert Choice(name, "").implementation in ALL_ATTENTION_FUNCTIONS
