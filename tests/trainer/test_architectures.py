"""Models that are unlike Llama: what they need of the trainer, and what is refused for them. In this process, no pods."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from liger_kernel.transformers import monkey_patch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_api.spec import ActivationCheckpointing, Attention
from finetune_trainer import kernels
from finetune_trainer.activation_checkpointing import check_recomputation, checkpoint_activations
from finetune_trainer.attention import Choice, plain_attention, use
from finetune_trainer.data.batches import Rows
from finetune_trainer.data.packing import single_rows
from finetune_trainer.errors import ConfigError
from finetune_trainer.model import load_model
from finetune_trainer.optimizers import build_optimizer, parameter_groups
from finetune_trainer.quirks import tame_deepspeed
from finetune_trainer.step import loss_sum
from tests.trainer.conftest import Assets
from tests.trainer.jobs import FULL
from tests.trainer.test_methods import load, plain, run, spec_of
from tests.trainer.test_numbers import store_of

CPU = torch.device("cpu")

SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
}
SHARED: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 16,
}
"""The last two layers take keys and values of the first two."""
KINDS: dict[str, dict[str, Any]] = {
    "gemma3n_text": {**SHARED, "laurel_rank": 8, "activation_sparsity_pattern": None},
    "gemma4_text": {**SHARED, "global_head_dim": 16},
    "gemma2": {"attn_logit_softcapping": 0.5},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "bloom": {"n_layer": 2, "n_head": 2},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 2},
}


def small(kind: str) -> Any:
    """A random model of transformers' type `kind`."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(kind))


def config_of(kind: str, **others: Any) -> Any:
    return AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind], **others})


def recomputed(kind: str, mode: ActivationCheckpointing, *, reentrant: bool = False) -> dict[str, torch.Tensor]:
    model = small(kind).train()
    checkpoint_activations(model, mode, reentrant=reentrant)
    return run(model)[1]


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> set[str]:
    """Names of gradients that are not those expected."""
    assert found.keys() == expected.keys()
    return {name for name in found if (found[name] - expected[name]).norm() > 1e-4 * expected[name].norm()}


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_reentrant_recomputation_loses_gradients_of_shared_keys_and_values(kind: str) -> None:
    """Why it is refused. If this fails, transformers or torch has learnt it, and `check_recomputation` can go."""
    none, full = ActivationCheckpointing.NONE, ActivationCheckpointing.FULL
    expected = recomputed(kind, none)
    assert not differing(recomputed(kind, full), expected)
    wrong = differing(recomputed(kind, full, reentrant=True), expected)
    assert "model.layers.0.self_attn.k_proj.weight" in wrong


@pytest.mark.parametrize("mode", list(ActivationCheckpointing))
@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_recomputation_of_shared_keys_and_values_is_refused_under_zero_3(
    kind: str, mode: ActivationCheckpointing
) -> None:
    config = config_of(kind)
    check_recomputation(config, mode, reentrant=False)
    check_recomputation(config_of(kind, num_kv_shared_layers=0), mode, reentrant=True)
    if mode is ActivationCheckpointing.NONE:
        check_recomputation(config, mode, reentrant=True)
        return
    with pytest.raises(ConfigError, match=f"{mode} with .*zeroStage: 3.* use `training.activationCheckpointing: None`"):
        check_recomputation(config, mode, reentrant=True)


def test_the_refusal_comes_before_the_weights_are_read(assets: Assets, tmp_path: Path) -> None:
    tame_deepspeed()
    config_of("gemma3n_text").save_pretrained(tmp_path)
    spec = spec_of(assets, deepspeed__zeroStage=3, training__activationCheckpointing="SelectiveLayer")
    with pytest.raises(ConfigError, match="layers of a gemma3n_text share keys and values"):
        load_model(tmp_path, spec, {})


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_selective_op_leaves_gradients_what_they_are(kind: str) -> None:
    """Gemma 3n adds in place to products of batches of matrices."""
    expected = recomputed(kind, ActivationCheckpointing.NONE)
    assert not differing(recomputed(kind, ActivationCheckpointing.SELECTIVE_OP), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_selective_op_refuses_a_model_that_changes_what_is_kept(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would add to the kept product once more in the backward pass, without a word."""
    model = plain()
    mlp = model.model.layers[0].mlp
    mlp.down_proj = torch.nn.Linear(48, 32, bias=bias)
    forward = type(mlp).forward
    monkeypatch.setattr(type(mlp), "forward", lambda self, x: forward(self, x).add_(x))
    run(model)
    checkpoint_activations(model, ActivationCheckpointing.SELECTIVE_OP, reentrant=False)
    with pytest.raises(
        ConfigError, match=r"SelectiveOp cannot be used .* aten.add_.Tensor .* use `SelectiveLayer` or `Full`"
    ):
        run(model)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "bloom", "mpt"])
def test_a_model_without_sdpa_is_loaded_and_learns(kind: str, assets: Assets, tmp_path: Path) -> None:
    tame_deepspeed()
    small(kind).save_pretrained(tmp_path)
    spec = spec_of(assets, **FULL, training__precision="FP32")
    model = load_model(tmp_path, spec, {})
    kernels.prepare(model, spec, CPU)
    assert kernels.kernels_of(model).attention.name is Attention.EAGER
    optimizer = build_optimizer(model, spec)
    store = store_of(assets.train)
    batch = Rows(store, single_rows(len(store)), packed=False).batch([0, 1])
    losses = []
    for _ in range(2):
        loss = loss_sum(model, batch, CPU)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]


@pytest.mark.parametrize("said", [{}, {"attn_implementation": "flash_attention_2"}], ids=["nothing", "flash-attention"])
def test_a_model_with_sdpa_is_loaded_with_it_whatever_its_file_says(
    said: dict[str, Any], assets: Assets, tmp_path: Path
) -> None:
    tame_deepspeed()
    shutil.copytree(assets.model, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **said}))
    assert load_model(tmp_path, spec_of(assets), {}).config._attn_implementation == "sdpa"


def test_plain_attention_keeps_the_cap_of_scores() -> None:
    model = small("gemma2").eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5 if "norm" not in name else 0.0)
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        use(model, Choice(Attention.FLASH_ATTENTION_2, "as the job says"))
        with plain_attention(model):
            found = model(input_ids=ids).logits
    assert torch.equal(found, expected)
    assert model.config._attn_implementation == "finetune_fa2"


def test_biases_of_experts_have_no_weight_decay(assets: Assets) -> None:
    model = small("gpt_oss")
    groups = parameter_groups(model, spec_of(assets, **FULL))
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    decays = {name: decay[id(parameter)] > 0 for name, parameter in model.named_parameters()}
    experts = "model.layers.0.mlp.experts."
    assert {name: decays[experts + name] for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj_bias")} == {
        "gate_up_proj": True,
        "gate_up_proj_bias": False,
        "down_proj_bias": False,
    }
    assert not any(value for name, value in decays.items() if name.endswith(("bias", "norm.weight")))


@pytest.mark.parametrize("mode", ["SelectiveOp", "Full", "None"])
def test_ligers_rotary_embedding_is_left_out_where_its_inputs_are_kept(
    mode: str, assets: Assets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It works in place, and unseen by the policy of SelectiveOp: its kernel is no operator of torch."""
    seen: list[bool] = []

    def patch(rope: bool = True, cross_entropy: bool = True, model: Any = None) -> None:
        seen.append(rope)

    monkeypatch.setitem(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN, "llama", patch)
    monkeypatch.setattr(kernels, "choose", lambda *_: Choice(Attention.SDPA, "as the job says"))
    changes = {"training__ligerKernel": True, "training__activationCheckpointing": mode}
    kernels.prepare(load(assets, **changes), spec_of(assets, **changes), torch.device("cuda"))
    assert seen == [mode != "SelectiveOp"]
