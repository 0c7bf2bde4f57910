"""The decoder layer as the unit of communication, and ZeRO-3 by whole layers: the same run as with stage 2."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from finetune_trainer.layer_units import BUCKET_ELEMENTS, sizes
from tests.trainer.conftest import StartPod
from tests.trainer.jobs import FULL, HPZ, Pod

PURE: dict[str, Any] = {"training__precision": "PureBF16"}
LAST_LAYER = {"trainableLayers": 1, "trainableModules": ["All"], "extraModules": []}
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora-dropout": {"adapter__dropout": 0.1},
    "lora-recomputed": {"training__activationCheckpointing": "Full"},
    "lora-every-second-recomputed": {"training__activationCheckpointing": "SelectiveLayer"},
    "lora-compiled": {"training__compile": True, "training__packing": True},
    "lora-hpz": HPZ,
    "full": {**FULL, **PURE},
    "full-compiled": {**FULL, **PURE, "training__compile": True, "training__packing": True},
    "last-layer": {**PURE, "method": "Freeze", "adapter": None, "freeze": LAST_LAYER},
}


def steps(pod: Pod) -> list[tuple[str, float]]:
    """Of each step the loss, every bit of it, and the gradient's norm."""
    return [(line["loss_hex"], line["grad_norm"]) for line in pod.journal if "loss_hex" in line]


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_stage_3_is_the_run_of_stage_2(
    changes: dict[str, Any], start: StartPod, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_HOOK", "tests.trainer.saved_hook")
    two = {"numProcPerNode": 2, "training__microBatchSize": 1, **changes}
    pods = [start(tmp_path / str(stage), **two, deepspeed__zeroStage=stage) for stage in (3, 2)]
    monkeypatch.delenv("TEST_HOOK")
    reports = [pod.done() for pod in pods]
    assert reports[0]["evalLoss"] == reports[1]["evalLoss"]
    (third, second) = map(steps, pods)
    assert [loss for loss, _ in third] == [loss for loss, _ in second] and len(third) == 6
    assert [norm for _, norm in third] == pytest.approx([norm for _, norm in second], rel=1e-5)
    for pod in pods:
        assert ("each as one graph" in pod.log) is changes.get("training__compile", False), pod.log


def test_what_is_communicated_at_once_is_a_layer() -> None:
    least, most = BUCKET_ELEMENTS
    model, layer = _wide_llama(intermediate_size=14336), 218_112_000
    assert sizes(model, 2, 2) == {"reduce_bucket_size": layer}
    assert sizes(model, 2, 1) == {"reduce_bucket_size": least}, "one rank reduces nothing"
    assert sizes(model, 3, 2) == {
        "reduce_bucket_size": layer,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": layer,
        "stage3_max_live_parameters": 1_000_000_000,
    }
    assert sizes(_wide_llama(intermediate_size=100_000), 2, 2) == {"reduce_bucket_size": most}
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "k_proj"]))
    assert sizes(adapted, 2, 2) == {"reduce_bucket_size": least}
    with_adapters = sizes(adapted, 3, 2)
    assert with_adapters["stage3_param_persistence_threshold"] == 16 * 4096, "adapters stay whole"
    assert with_adapters["stage3_prefetch_bucket_size"] > layer
    without_a_list = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
    assert sizes(without_a_list, 3, 2) == {"reduce_bucket_size": least}, "modules stay the unit"


def _wide_llama(intermediate_size: int) -> LlamaForCausalLM:
    """One layer as wide as Llama-3.1-8B's, without memory."""
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=4096,
                intermediate_size=intermediate_size,
                num_attention_heads=32,
                num_key_value_heads=8,
                num_hidden_layers=1,
                vocab_size=16,
            )
        )
