"""What must fit before anything is loaded: the formula, what is refused, and with which words."""

import json
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_api.launch import LaunchSpec
from finetune_trainer.memory import (
    GIB,
    Capacity,
    host_memory,
    needed,
    num_trained,
    obstacle,
    read_shapes,
    shapes_of_config,
)
from tests.trainer import jobs, tiny
from tests.trainer.conftest import Assets, StartPod
from tests.trainer.hub import Hub
from tests.trainer.test_methods import FULL, load

HIDDEN, FFN, LAYERS, KV, VOCABULARY = 8192, 28672, 80, 1024, 32000
LAYER = {
    "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.k_proj.weight": (KV, HIDDEN),
    "self_attn.v_proj.weight": (KV, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "mlp.gate_proj.weight": (FFN, HIDDEN),
    "mlp.up_proj.weight": (FFN, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, FFN),
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
}
LLAMA_2_70B: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    **{f"model.layers.{n}.{name}": shape for n in range(LAYERS) for name, shape in LAYER.items()},
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (VOCABULARY, HIDDEN),
}
PSI = 68_976_648_192
"""Parameters of Llama-2-70B."""
EIGHT_H100 = Capacity(gpu=int(79.1 * GIB), host=2000 * GIB)


def launch(**changes: Any) -> LaunchSpec:
    settings = {"numProcPerNode": 8, "training__globalBatchSize": 128, **changes}
    return LaunchSpec.model_validate(jobs.launch(Path("/x"), Path("/x/model"), Path("/x/data"), **settings))


def lora(rank: int, targets: list[str]) -> dict[str, Any]:
    return {"adapter__rank": rank, "adapter__targetModules": targets}


CASES: dict[str, tuple[dict[str, Any], tuple[float, float, float, float]]] = {
    "full": (FULL, (2, 2, 12 / 8, 0)),
    "full-zero2": ({**FULL, "deepspeed__zeroStage": 2}, (2, 2 / 8, 12 / 8, 0)),
    "full-zero3": ({**FULL, "deepspeed__zeroStage": 3}, (2 / 8, 2 / 8, 12 / 8, 0)),
    "full-zero3-offloaded": (
        {
            **FULL,
            "deepspeed__zeroStage": 3,
            "deepspeed__offloadOptimizer": "CPU",
            "deepspeed__offloadParameters": "CPU",
        },
        (0, 0, 0, 14 / 8),
    ),
    "full-pure-bf16": ({**FULL, "training__precision": "PureBF16"}, (2, 2, 4, 0)),
    "full-fp32-zero1": ({**FULL, "training__precision": "FP32", "deepspeed__zeroStage": 1}, (4, 4, 1, 0)),
    "full-8bit": ({**FULL, "training__optimizer": "AdamW8bit"}, (2, 2, 6 / 8, 0)),
    "full-paged": ({**FULL, "training__optimizer": "PagedAdamW"}, (2, 2, 4 / 8, 0)),
}
"""Changes, and bytes for each of Llama-2-70B's parameters: weights, gradients, optimizer, host."""


@pytest.mark.parametrize(("changes", "expected"), CASES.values(), ids=CASES)
def test_bytes_are_those_of_the_zero_paper(changes: dict[str, Any], expected: tuple[float, ...]) -> None:
    assert sum(map(prod, LLAMA_2_70B.values())) == PSI
    need = needed(LLAMA_2_70B, launch(**changes))
    assert [need.weights, need.gradients, need.optimizer, need.host] == pytest.approx([PSI * byte for byte in expected])


def test_adapters_and_quantised_weights() -> None:
    plain = launch(**lora(8, ["q_proj", "v_proj"]))
    trained = LAYERS * 8 * (2 * HIDDEN + HIDDEN + KV)
    assert num_trained(LLAMA_2_70B, plain) == trained
    need = needed(LLAMA_2_70B, plain)
    assert (need.weights, need.gradients, need.optimizer) == (2 * PSI + 4 * trained, 4 * trained, 8 * trained)
    linear = PSI - 2 * VOCABULARY * HIDDEN - (2 * LAYERS + 1) * HIDDEN
    quantised = launch(method="QLoRA", quantization={"bits": 4, "doubleQuantization": True}, **lora(8, ["q_proj"]))
    adapters = LAYERS * 8 * 2 * HIDDEN
    assert needed(LLAMA_2_70B, quantised).weights == linear / 2 + 2 * (PSI - linear) + 4 * adapters


@pytest.mark.parametrize(
    "changes",
    [
        FULL,
        lora(4, ["All"]),
        lora(4, ["q_proj", "mlp.down_proj"]),
        {
            "method": "Freeze",
            "adapter": None,
            "freeze": {"trainableLayers": 1, "trainableModules": ["All"], "extraModules": []},
        },
        {
            "method": "Freeze",
            "adapter": None,
            "freeze": {"trainableLayers": -1, "trainableModules": ["mlp"], "extraModules": ["norm"]},
        },
    ],
    ids=["full", "all", "some", "last-layer", "first-layers-mlp-and-norm"],
)
def test_as_many_are_counted_as_the_trainer_trains(assets: Assets, changes: dict[str, Any]) -> None:
    model = load(assets, **changes)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    spec = LaunchSpec.model_validate(jobs.launch(Path("/x"), assets.model, assets.train, **changes))
    assert num_trained(read_shapes(assets.model), spec) == trained


@pytest.mark.parametrize("bits", [4, 8])
def test_experts_are_not_counted_as_quantised(assets: Assets, tmp_path: Path, bits: int) -> None:
    """transformers fuses them into one weight, which bitsandbytes does not replace; the files hold each by itself."""
    model = tiny.make_other(tmp_path, "mixtral", num_local_experts=4, num_experts_per_tok=2)
    quantised = {"method": "QLoRA", "quantization": {"bits": bits, "doubleQuantization": True}, **lora(4, ["q_proj"])}
    loaded = load(replace(assets, model=model), **quantised)
    held = sum(p.numel() * p.element_size() for p in loaded.parameters())
    need = needed(read_shapes(model), launch(**quantised)).weights
    assert 0.99 * held < need <= held
    from_config = needed(shapes_of_config(model), launch(**quantised)).weights
    assert 0.99 * held < from_config <= held


REFUSED: dict[str, tuple[dict[str, Any], Capacity, list[str]]] = {
    "70b-full": (
        FULL,
        EIGHT_H100,
        [
            "model.uri: file:///x/model: 68.98 billion parameters, 68.98 billion of them trained, cannot fit on 8 ranks; each "
            "needs at least 353.3 GiB (weights 128.5, gradients 128.5, optimizer 96.4), activations not counted, and its GPU has "
            "79.1 GiB. By the same count these fit: ",
            "`deepspeed: {zeroStage: 3, offloadOptimizer: CPU}` (16.1 GiB of each GPU and 770.9 GiB of a node's memory)",
            "`trainer.numNodes: 2` with `deepspeed.zeroStage: 3` (64.2 GiB of each GPU)",
            "`method: LoRA` with `deepspeed.zeroStage: 3` (16.3 GiB of each GPU)",
            "`method: QLoRA` with `deepspeed.zeroStage: 0` (34.4",
        ],
    ),
    "70b-full-small-host": (
        FULL,
        Capacity(EIGHT_H100.gpu, 500 * GIB),
        ["fit: `trainer.numNodes: 2` with `deepspeed.zeroStage: 3` (64.2 GiB of each GPU); or `method: LoRA`"],
    ),
    "70b-lora-r8": (
        lora(8, ["q_proj", "v_proj"]),
        EIGHT_H100,
        ["0.02 billion of them trained", "fit: `deepspeed.zeroStage: 3` (16.1 GiB of each GPU); or `method: QLoRA`"],
    ),
    "offloaded-to-too-small-a-host": (
        {**FULL, "deepspeed__zeroStage": 3, "deepspeed__offloadOptimizer": "CPU"},
        Capacity(EIGHT_H100.gpu, 500 * GIB),
        ["a node with 8 of them needs at least 770.9 GiB of memory (what is offloaded), and this one has 500.0 GiB"],
    ),
    "on-a-cpu": (
        lora(8, ["q_proj", "v_proj"]),
        Capacity(None, 24 * GIB),
        [
            "a node with 8 of them needs at least",
            "of memory (a rank's weights 128.5, gradients 0.1, optimizer 0.1, activations not counted), and this one has 24.0",
        ],
    ),
}


@pytest.mark.parametrize(("changes", "there", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_fit_is_told_with_what_would(changes: dict[str, Any], there: Capacity, says: list[str]) -> None:
    message = obstacle(LLAMA_2_70B, launch(**changes), there)
    assert message is not None
    for part in says:
        assert part in message
    assert len(message) < 1000


def test_what_may_fit_is_not_refused() -> None:
    zero3 = {**lora(64, ["All"]), "deepspeed__zeroStage": 3, "deepspeed__offloadOptimizer": "CPU"}
    assert obstacle(LLAMA_2_70B, launch(**zero3), EIGHT_H100) is None
    nothing = obstacle(LLAMA_2_70B, launch(**zero3), Capacity(GIB, GIB))
    assert nothing is not None and nothing.endswith(
        "No setting makes it fit: use more or larger machines, or a smaller model"
    )


def test_weights_that_are_not_loaded_are_not_counted(assets: Assets, tmp_path: Path) -> None:
    expected, folder = read_shapes(assets.model), tmp_path / "model"
    shutil.copytree(assets.model, folder)
    tensors = load_file(folder / "model.safetensors")
    shards = {"model-1.safetensors": tensors, "model-2.safetensors": {"lm_head.weight": torch.zeros(512, 64)}}
    for file, held in shards.items():
        save_file(held, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    save_file({"layers.0.wq": torch.zeros(8, 8)}, folder / "consolidated.00.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert read_shapes(folder) == expected, "the head is the embedding"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert read_shapes(folder) == expected | {"lm_head.weight": (512, 64)}


def llama_2_70b(folder: Path, small: Path) -> Path:
    """Llama-2-70B's configuration beside a small model's other files."""
    folder.mkdir()
    for file in small.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((small / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": 64}
    config |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_configuration_says_the_same_as_the_files(assets: Assets, tmp_path: Path) -> None:
    assert shapes_of_config(llama_2_70b(tmp_path / "large", assets.model)) == LLAMA_2_70B
    assert shapes_of_config(assets.model) == read_shapes(assets.model)
    (tmp_path / "config.json").write_text('{"model_type": "never heard of"}')
    assert shapes_of_config(tmp_path) == {}


def test_a_model_that_cannot_fit_is_not_downloaded(assets: Assets, tmp_path: Path, hub: Hub, start: StartPod) -> None:
    hub.repositories["models/team/large"] = llama_2_70b(tmp_path / "large", assets.model)
    source = {"kind": "Hub", "repoId": "team/large", "repoType": "model", "revision": "main", "path": ""}
    model = {"uri": "hf://team/large", "source": {**source, "tokenFile": None}, "chatTemplate": None}
    pod = start(tmp_path / "run", model=model, **FULL)
    assert pod.wait() == 88 and pod.report["reason"] == "ConfigError"
    message = pod.report["message"]
    assert message.startswith("model.uri: hf://team/large: 68.98 billion parameters, 68.98 billion of them trained")
    assert f"has {host_memory() / GIB:.1f} GiB" in message
    assert [asked for asked in hub.asked if "team/large" in asked and asked.endswith(".safetensors")] == []
