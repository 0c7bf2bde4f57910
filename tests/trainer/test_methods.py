"""What is trained and with what: adapters, layers, quantised bases, optimizers, kept activations. In this process, no pods."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.launch import LaunchFreeze, LaunchSpec
from finetune_api.spec import ActivationCheckpointing, AdapterVariant
from finetune_trainer import engine, lora_linear
from finetune_trainer.activation_checkpointing import checkpoint_activations, is_kept
from finetune_trainer.adapters import freeze
from finetune_trainer.deepspeed_block import check_block, merged
from finetune_trainer.errors import ConfigError
from finetune_trainer.model import load_model
from finetune_trainer.optimizers import build_optimizer
from finetune_trainer.quirks import tame_deepspeed
from tests.trainer import jobs, tiny
from tests.trainer.conftest import Assets, StartPod
from tests.trainer.jobs import FULL, QLORA

EIGHT: dict[str, Any] = {"method": "QLoRA", "quantization": {"bits": 8, "doubleQuantization": True}}


def spec_of(assets: Assets, **changes: Any) -> LaunchSpec:
    return LaunchSpec.model_validate(jobs.launch(Path("/nowhere"), assets.model, assets.train, **changes))


def load(assets: Assets, **changes: Any) -> Any:
    tame_deepspeed()
    return load_model(assets.model, spec_of(assets, **changes), {})


def plain(layers: int = 4, tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).train()


FROZEN: dict[str, tuple[dict[str, Any], set[str]]] = {
    "last two": ({"trainableLayers": 2}, {"layers.2", "layers.3"}),
    "first": ({"trainableLayers": -1}, {"layers.0"}),
    "one module": ({"trainableLayers": 1, "trainableModules": ["down_proj"]}, {"layers.3.mlp.down_proj"}),
    "extra": ({"trainableLayers": 0, "extraModules": ["norm", "lm_head"]}, {"model.norm", "lm_head"}),
}


@pytest.mark.parametrize(("block", "trained"), FROZEN.values(), ids=FROZEN.keys())
def test_freeze_trains_what_it_says_and_nothing_else(block: dict[str, Any], trained: set[str]) -> None:
    model = plain()
    values = {"trainableModules": ["All"], "extraModules": [], **block}
    freeze(model, LaunchFreeze.model_validate(values), "x")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {n for n, _ in model.named_parameters() if any(part in n for part in trained)}
    assert names == expected


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"trainableLayers": 5}, "trainableLayers: 5 is more than the 4 layers"),
        ({"trainableModules": ["mlpp"]}, "trainableModules: x has no module `mlpp` there; it has .*mlp.*q_proj"),
        ({"extraModules": ["mlp"]}, "extraModules: x has no module `mlp` there; it has .*lm_head"),
    ],
)
def test_freeze_names_what_there_is(block: dict[str, Any], says: str) -> None:
    values = {"trainableLayers": 1, "trainableModules": ["All"], "extraModules": [], **block}
    with pytest.raises(ConfigError, match=says):
        freeze(plain(), LaunchFreeze.model_validate(values), "x")


def run(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    ids = torch.randint(0, 64, (2, 12))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


RECOMPUTED: dict[ActivationCheckpointing, list[int]] = {
    ActivationCheckpointing.NONE: [1, 1, 1, 1],
    ActivationCheckpointing.FULL: [2, 2, 2, 2],
    ActivationCheckpointing.FULL_OFFLOAD: [2, 2, 2, 2],
    ActivationCheckpointing.SELECTIVE_LAYER: [2, 1, 2, 1],
    ActivationCheckpointing.SELECTIVE_OP: [2, 2, 2, 2],
}


@pytest.mark.parametrize("mode", list(ActivationCheckpointing))
def test_activation_checkpointing_recomputes_what_it_says(mode: ActivationCheckpointing) -> None:
    """Gradients stay what they are; layers run again where they should, and matrix products where nothing keeps them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Products.count += str(function).startswith(("aten.mm", "aten.addmm", "aten._scaled_dot_product"))
            return function(*args, **(kwargs or {}))

    expected = run(plain())
    model = plain()
    calls = [0] * 4
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_a, i=index: calls.__setitem__(i, calls[i] + 1))
    checkpoint_activations(model, mode, reentrant=False)
    with Products():
        found = run(model)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())
    assert calls == RECOMPUTED[mode]
    once = 4 * 7 + 1 + 4  # products of the forward pass: 7 a layer, the head, and an attention for each layer
    backward = 2 * (4 * 7 + 1) + 4
    again = {ActivationCheckpointing.FULL: 1.0, ActivationCheckpointing.FULL_OFFLOAD: 1.0}
    again[ActivationCheckpointing.SELECTIVE_LAYER] = 0.5
    recomputed = Products.count - once - backward
    assert recomputed >= again.get(mode, 0.0) * 4 * 7 * 0.8
    assert mode in again or recomputed == 0


def test_selective_op_knows_attention_by_its_name() -> None:
    kept = ["aten.mm.default", "aten._scaled_dot_product_flash_attention.default", "torch_attn._varlen_attn.default"]
    assert all(map(is_kept, kept))
    assert not any(map(is_kept, ["aten.mul.Tensor", "aten.silu.default", "aten.native_dropout.default"]))


@pytest.mark.parametrize("changes", [{}, FULL, QLORA], ids=["LoRA", "Full", "QLoRA"])
def test_every_module_is_in_training_mode(assets: Assets, changes: dict[str, Any]) -> None:
    """Else dropout and recomputation would begin with the first evaluation, at another step in a resumed run."""
    assert all(module.training for module in load(assets, **changes).modules())


def test_quantised_base_keeps_the_precision_of_what_is_not_quantised(assets: Assets) -> None:
    model = load(assets, **QLORA)
    kinds = {type(m).__name__ for n, m in model.named_modules() if n.endswith("q_proj.base_layer")}
    assert kinds == {"Linear4bit"}
    frozen = {n: p.dtype for n, p in model.named_parameters() if "norm" in n or "embed" in n}
    assert set(frozen.values()) == {torch.bfloat16}
    assert {n.rsplit(".", 3)[-3] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_quantised_forward_is_near_the_plain_one(assets: Assets) -> None:
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        plain_, four, eight = (
            load(assets, **changes).eval()(input_ids=ids).logits.float() for changes in ({}, QLORA, EIGHT)
        )
    errors = [((other - plain_).norm() / plain_.norm()).item() for other in (four, eight)]
    assert 0 < errors[1] < errors[0] < 0.3


@pytest.mark.parametrize("changes", [QLORA, EIGHT], ids=["4 bits", "8 bits"])
def test_which_share_is_quantised_is_told(
    assets: Assets, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Of 94,528: 73,728 of the linear layers, not 20,480 of the embedding and 320 of the norms."""
    with caplog.at_level("INFO", "finetune_trainer"):
        load(assets, **changes)
    assert "quantised: 78.0 % of the weights" in caplog.messages


@pytest.mark.parametrize("changes", [QLORA, EIGHT], ids=["4 bits", "8 bits"])
def test_a_model_of_which_nothing_is_quantised_is_refused(
    assets: Assets, tmp_path: Path, changes: dict[str, Any]
) -> None:
    falcon = replace(assets, model=tiny.make_other(tmp_path, "falcon"))
    with pytest.raises(ConfigError, match=r"method: QLoRA: no weight of FalconForCausalLM .* can be quantised"):
        load(falcon, **changes)


@pytest.mark.parametrize(
    ("targets", "lost"),
    [
        (["q_proj", "v_porj"], "v_porj"),
        (["All", "lm_head"], "All"),
        (["1.mlp.up_proj", "2.mlp.up_proj"], "2.mlp.up_proj"),
    ],
)
def test_a_target_that_is_not_there_is_told(assets: Assets, targets: list[str], lost: str) -> None:
    says = rf"adapter\.targetModules: {lost} does not fit .*; its linear layers are .*lm_head.* v_proj"
    with pytest.raises(ConfigError, match=says):
        load(assets, adapter__targetModules=targets)


def test_targets_of_experts_are_those_of_the_models_files(assets: Assets, tmp_path: Path) -> None:
    mixtral = replace(assets, model=tiny.make_other(tmp_path, "mixtral", num_local_experts=4, num_experts_per_tok=2))
    model = load(mixtral, adapter__targetModules=["q_proj", "w1", "w2", "w3"])
    assert any("experts" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    with pytest.raises(ConfigError, match=r"adapter\.targetModules: w4 does not fit"):
        load(mixtral, adapter__targetModules=["q_proj", "w1", "w3", "w4"])
    with pytest.raises(ConfigError, match="without also targeting w3"):
        load(mixtral, adapter__targetModules=["w1"])


ROUTED: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 4": ("llama4_text", {"intermediate_size_mlp": 128, "head_dim": 16}),
    "Phi-MoE": ("phimoe", {}),
}


@pytest.mark.parametrize("changes", [{}, QLORA], ids=["LoRA", "QLoRA"])
@pytest.mark.parametrize(("kind", "sizes"), ROUTED.values(), ids=ROUTED)
def test_adapters_leave_out_routers(
    assets: Assets, tmp_path: Path, kind: str, sizes: dict[str, Any], changes: dict[str, Any]
) -> None:
    """They are linear layers of a class of their own, whose forward pass returns several tensors."""
    made = tiny.make_other(tmp_path, kind, num_local_experts=4, num_experts_per_tok=1 + (kind == "phimoe"), **sizes)
    routed = replace(assets, model=made)
    model = load(routed, **changes)
    _, gradients = run(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients.keys() == trained
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained} >= {"q_proj", "o_proj"}
    assert not any("router" in name for name in trained)
    with pytest.raises(ConfigError, match=r": router does not fit [^;]*; its linear layers are (?!.*router).*q_proj"):
        load(routed, **changes, adapter__targetModules=["q_proj", "router"])


EVALUATED: dict[str, dict[str, Any]] = {
    "some layers": {"adapter__targetModules": ["q_proj", "v_proj"]},
    "dora": {"adapter__variant": "DoRA"},
}


@pytest.mark.parametrize("changes", EVALUATED.values(), ids=EVALUATED)
def test_gradients_after_an_evaluation_are_those_of_plain_peft(
    assets: Assets, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 4 bits, on a CPU of the kind for which bitsandbytes lays weights out anew."""
    import bitsandbytes
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    spec = spec_of(assets, **QLORA, **changes, training__precision="FP32")
    adapter = spec.adapter
    assert adapter is not None
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(assets.model, dtype=torch.float32, quantization_config=four)
    every = adapter.target_modules == ["All"]
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules="all-linear" if every else adapter.target_modules,
        use_dora=adapter.variant is AdapterVariant.DORA,
    )
    torch.manual_seed(spec.training.seed)
    expected = run(get_peft_model(base, config).train())
    model = load(assets, **QLORA, **changes, training__precision="FP32")
    lora_linear.install(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(3, 40).reshape(1, -1))
    found = run(model.train())
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    norms = [{name: gradient.norm().item() for name, gradient in each[1].items()} for each in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "PagedAdamW", "PagedAdamW8bit"])
def test_lora_plus_and_betas_reach_every_optimizer(assets: Assets, name: str) -> None:
    changes = {"adapter__loraPlusRatio": 4.0, "training__optimizer": name, "training__adamBeta2": 0.95}
    model = load(assets, **changes, training__adamEpsilon=1e-6)
    optimizer = build_optimizer(model, spec_of(assets, **changes, training__adamEpsilon=1e-6))

    class Engine:
        pass

    fake = Engine()
    fake.optimizer = optimizer  # type: ignore[attr-defined]
    engine.set_learning_rate(fake, 0.001)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (0.004 if ".lora_B." in parameter_name else 0.001), parameter_name
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.9, 0.95), 1e-6)}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.01}
    assert type(optimizer).__name__ == name


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_clipping_is_by_the_norm_in_float32_and_leaves_short_gradients(dtype: torch.dtype, fused: bool) -> None:
    """Over the step that is taken: AdamW's first moment after it is a tenth of the clipped gradient."""
    torch.manual_seed(0)
    gradients = [torch.randn(n).to(dtype) for n in (10_000, 3)]
    exact = torch.cat(gradients).float().norm().item()
    for max_norm in (2 * exact, float("inf"), 1.0):
        parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer = torch.optim.AdamW(parameters, fused=fused)
        assert engine._clip_gradients(optimizer, max_norm).item() == pytest.approx(exact, rel=1e-6)
        optimizer.step()
        moments = [optimizer.state[parameter]["exp_avg"] for parameter in parameters]
        if max_norm > exact:
            assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients, strict=True) if p.grad is not None)
        assert 10 * torch.cat(moments).float().norm().item() == pytest.approx(min(exact, max_norm), rel=5e-3)
        for moment, gradient in zip(moments, gradients, strict=True):
            expected = (gradient.double() * min(1.0, max_norm / exact) * 0.1).to(dtype)
            torch.testing.assert_close(moment, expected, rtol=1e-5 if dtype is torch.float32 else 1.6e-2, atol=1e-7)


BLOCKS: dict[str, tuple[int, dict[str, Any], str]] = {
    "unknown top level": (
        0,
        {"zero": {}},
        r"deepspeed.config.zero: is not taken here; allowed are .*zero_optimization",
    ),
    "unknown ZeRO key": (0, {"zero_optimization": {"partition_weights": True}}, "partition_weights: Extra inputs"),
    "wrong type": (0, {"zero_optimization": {"reduce_bucket_size": "big"}}, "reduce_bucket_size: .*integer"),
    "needs a GPU": (0, {"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights: needs GPUs"),
    "offload without its field": (
        0,
        {"zero_optimization": {"offload_optimizer": {"pin_memory": False}}},
        "offload_optimizer: needs `deepspeed.offloadOptimizer: CPU`",
    ),
    "no number of steps": (0, {"steps_per_print": "a"}, "steps_per_print: must be a positive integer or null, got `a`"),
    "every zeroth step": (0, {"steps_per_print": 0}, "steps_per_print: must be a positive integer or null, got `0`"),
    "divided by nothing": (1, {"gradient_predivide_factor": 0}, "must be a positive number, got `0`"),
    "divided twice": (3, {"gradient_predivide_factor": 2}, "must be 1 with zeroStage 3"),
    "divided before it is scattered": (2, {"gradient_predivide_factor": 2}, "must be 1 with zeroStage 2, unless"),
    "scaled before it is scattered": (
        2,
        {"prescale_gradients": True},
        "prescale_gradients: must be false with zeroStage 2",
    ),
    "scaled before it is scattered, 3": (3, {"prescale_gradients": True}, "must be false with zeroStage 3, unless"),
    "another unit": (
        3,
        {"zero_optimization": {"stage3_module_granularity_threshold": 100}},
        "stage3_module_granularity_threshold: must be 0",
    ),
}


@pytest.mark.parametrize(("stage", "block", "says"), BLOCKS.values(), ids=BLOCKS.keys())
def test_a_raw_block_is_checked_before_the_model_is_loaded(
    assets: Assets, stage: int, block: dict[str, Any], says: str
) -> None:
    spec = spec_of(assets, deepspeed__config=block, deepspeed__zeroStage=stage)
    with pytest.raises(ConfigError, match=says):
        check_block(block, engine.deepspeed_config(spec), cuda=False)


@pytest.mark.parametrize(
    ("stage", "block"),
    [
        (1, {"gradient_predivide_factor": 2.0, "prescale_gradients": True}),
        (2, {"gradient_predivide_factor": 2.0, "zero_optimization": {"reduce_scatter": False}}),
        (3, {"prescale_gradients": False, "steps_per_print": 10}),
        (3, {"zero_optimization": {"stage3_module_granularity_threshold": 0}, "steps_per_print": None}),
    ],
)
def test_a_raw_block_that_works_is_taken(assets: Assets, stage: int, block: dict[str, Any]) -> None:
    spec = spec_of(assets, deepspeed__config=block, deepspeed__zeroStage=stage)
    check_block(block, engine.deepspeed_config(spec), cuda=False)


def test_a_raw_block_is_merged_last_and_deep(assets: Assets) -> None:
    block = {"zero_optimization": {"reduce_bucket_size": 1000, "offload_optimizer": {"buffer_count": 5}}}
    spec = spec_of(assets, deepspeed__zeroStage=2, deepspeed__offloadOptimizer="CPU", deepspeed__config=block)
    config = engine.deepspeed_config(spec)
    check_block(block, config, cuda=False)
    zero = config["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"]) == (2, 1000)
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False, "buffer_count": 5}
    assert merged({"a": {"b": 1}}, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}


EXPORTED: dict[str, dict[str, Any]] = {
    "dora": {"adapter__variant": "DoRA", "adapter__loraPlusRatio": 4.0, "training__precision": "FP32"},
    "rslora": {"adapter__variant": "RSLoRA", "training__precision": "FP32"},
    "qlora": {**QLORA, "training__precision": "FP32"},
}


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_adapters_load_in_plain_peft_with_the_same_loss(
    name: str, start: StartPod, assets: Assets, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from finetune_trainer.data.batches import Rows
    from finetune_trainer.data.packing import single_rows
    from finetune_trainer.step import loss_sum
    from tests.trainer.test_numbers import store_of

    report = start(**EXPORTED[name], training__maxSteps=3).done()
    config = json.loads((tmp_path / "output" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["use_rslora"]) == (name == "dora", name == "rslora")
    assert config["base_model_name_or_path"] == str(assets.model)
    quantized: dict[str, Any] = {}
    if name == "qlora":
        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        quantized = {"quantization_config": four}
    base = AutoModelForCausalLM.from_pretrained(assets.model, dtype=torch.float32, **quantized)
    model = PeftModel.from_pretrained(base, str(tmp_path / "output")).eval()
    store = store_of(assets.evaluation)
    rows = Rows(store, single_rows(len(store)), packed=False)
    everything = list(range(len(rows)))
    with torch.no_grad():
        loss = loss_sum(model, rows.batch(everything), torch.device("cpu")).item() / rows.targets_in(everything)
    assert loss == pytest.approx(report["evalLoss"], rel=1e-5)
    assert report["evalLoss"] < report["baseEvalLoss"]
