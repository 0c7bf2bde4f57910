"""How a job computes: which attention, loss, adapters and compilation. Chosen once, before and after the engine is built.

Owns the order in which these are put on a model. Nothing here changes what is computed, beyond rounding.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from finetune_api.launch import LaunchSpec
from finetune_api.spec import ActivationCheckpointing, Attention, Precision
from finetune_trainer import liger, lora_linear, losses
from finetune_trainer.adapters import unwrap
from finetune_trainer.attention import Choice, choose, keeps_apart, layout_arguments, use
from finetune_trainer.compile import compile_layers
from finetune_trainer.errors import ConfigError
from finetune_trainer.layer_units import decoder_layers, gather_whole

log = logging.getLogger("finetune_trainer")
_ATTRIBUTE = "finetune_kernels"
MIN_PAD = 64
FLEX_BLOCK = 128
"""Flex masks whole blocks, and takes shorter rows for decoding, which it cannot do for every head size."""


@dataclass
class Kernels:
    attention: Choice
    head: losses.FusedHead | None = None
    """None: the loss is computed from the model's logits."""


PLAIN = Kernels(Choice(Attention.SDPA, "nothing chosen"))
"""Of a model that was not prepared."""


def kernels_of(model: Any) -> Kernels:
    """What `prepare` and `finish` have put on the model."""
    kernels: Kernels = getattr(unwrap(model), _ATTRIBUTE, PLAIN)
    return kernels


def prepare(model: Any, spec: LaunchSpec, device: torch.device) -> None:
    """Puts attention, Liger's modules, adapters' arithmetic and compilation on a loaded model, before the engine.

    Raises:
        ConfigError: what the job asks for is not there.
    """
    causal_lm, training = unwrap(model), spec.training
    dtype = torch.float32 if training.precision is Precision.FP32 else torch.bfloat16
    choice = choose(training.attention, causal_lm, device, dtype)
    use(causal_lm, choice)
    log.info("%s", choice)
    if training.liger_kernel:
        rotary = training.activation_checkpointing is not ActivationCheckpointing.SELECTIVE_OP
        liger.apply(causal_lm, device, compiled=training.compile, rotary=rotary)
    together = decoder_layers(causal_lm) if spec.deepspeed.zero_stage == 3 else None
    if together is not None:
        gather_whole(together, spec.deepspeed.config or {})
    plain = True
    if spec.adapter is not None:
        plain = lora_linear.install(model, together)
    if training.compile:
        own = choice.name in (Attention.FLASH_ATTENTION_2, Attention.FLASH_ATTENTION_3)
        compile_layers(causal_lm, whole=plain and not own)
    setattr(causal_lm, _ATTRIBUTE, Kernels(choice))


def finish(engine: Any, spec: LaunchSpec, device: torch.device) -> None:
    """Lets the head compute the loss, once the engine is there; all ranks call it.

    Raises:
        ConfigError: the model does not keep packed samples apart.
    """
    causal_lm = unwrap(engine)
    kernels = kernels_of(engine)
    if spec.training.packing:
        vocabulary = causal_lm.config.get_text_config().vocab_size
        if not keeps_apart(engine, vocabulary, device, by_layout=kernels.attention.by_layout):
            raise ConfigError(
                f"training.packing: samples of one row would see each other in {type(causal_lm).__name__} with attention "
                f"{kernels.attention.name}; leave it out (`training.groupByLength: true` keeps padding low)"
            )
    zeros = torch.zeros((1, 2), dtype=torch.int64, device=device)
    arguments = {"input_ids": zeros, "use_cache": False, "logits_to_keep": torch.tensor([0, 1], device=device)}
    if kernels.attention.by_layout:
        import numpy as np

        layout = layout_arguments(np.array([2]))
        arguments |= {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in layout.items()}
    kernels.head = losses.install(engine, causal_lm, arguments, zeros, liger=spec.training.liger_kernel)


def pad_to(spec: LaunchSpec, device: torch.device) -> int:
    """To a multiple of how many tokens rows are padded.

    Packed rows are nearly full, so one width costs little and spares CUDA's allocator and the compiler all others. Other
    rows get at most eight widths when compiled.
    """
    training = spec.training
    if training.packing and (training.compile or device.type == "cuda"):
        return training.max_length
    if training.attention is Attention.FLEX:
        return FLEX_BLOCK
    if training.compile:
        return min(training.max_length, max(MIN_PAD, -(-training.max_length // 8)))
    return 1
