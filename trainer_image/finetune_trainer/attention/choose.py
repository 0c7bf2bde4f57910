"""Which attention a job gets: a decision from the spec, the model's configuration and the device, with its reasons."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from finetune_api.spec import Attention
from finetune_trainer.attention import flash, varlen
from finetune_trainer.errors import ConfigError

IMPLEMENTATIONS = {
    Attention.FLASH_ATTENTION_3: "finetune_fa3",
    Attention.FLASH_ATTENTION_2: "finetune_fa2",
    Attention.VARLEN: "finetune_varlen",
    Attention.SDPA: "sdpa",
    Attention.FLEX: "flex_attention",
    Attention.EAGER: "eager",
}
"""Names in transformers' registry."""
BY_LAYOUT = (Attention.FLASH_ATTENTION_3, Attention.FLASH_ATTENTION_2, Attention.VARLEN)
"""Those that are told where sequences begin; the others take it from `position_ids`."""
_ORDER = {
    "cuda": (*BY_LAYOUT, Attention.SDPA, Attention.EAGER),
    "cpu": (Attention.SDPA, Attention.EAGER),
}
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_LARGEST_HEAD = 256


@dataclass(frozen=True)
class Choice:
    name: Attention
    why: str

    @property
    def implementation(self) -> str:
        """The name in transformers' registry."""
        return IMPLEMENTATIONS[self.name]

    @property
    def by_layout(self) -> bool:
        """Whether batches come with `layout_arguments`."""
        return self.name in BY_LAYOUT

    def __str__(self) -> str:
        return f"attention: {self.name} ({self.why})"


def choose(wanted: Attention, model: Any, device: torch.device, dtype: torch.dtype) -> Choice:
    """The attention to use.

    Args:
        wanted: `training.attention`.
        model: a causal language model of transformers, without adapters; its flags and configuration count.
        device: where it will compute.
        dtype: of its computation.

    Raises:
        ConfigError: what was asked for is not there, or would be wrong for this model.
    """
    if wanted is not Attention.AUTO:
        obstacle = why_not(wanted, model, device, dtype)
        if obstacle is not None:
            others = [str(name) for name in IMPLEMENTATIONS if why_not(name, model, device, dtype) is None]
            raise ConfigError(f"training.attention: {wanted} {obstacle}; possible here: Auto, {', '.join(others)}")
        return Choice(wanted, "as the job says")
    passed: list[str] = []
    for name in _ORDER[device.type]:
        obstacle = why_not(name, model, device, dtype)
        if obstacle is None:
            return Choice(name, "; ".join(["Auto: the fastest that is exact here", *passed]))
        passed.append(f"{name} {obstacle}")
    raise ConfigError(f"training.attention: none fits {type(model).__name__}: {'; '.join(passed)}")


def why_not(name: Attention, model: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an implementation cannot be used; None if it can."""
    obstacles: dict[Attention, Callable[[], str | None]] = {
        Attention.FLASH_ATTENTION_3: lambda: flash.why_not(3) or _dropout(model),
        Attention.FLASH_ATTENTION_2: lambda: flash.why_not(2),
        Attention.VARLEN: lambda: varlen.why_not() or _dropout(model) or _softcap(model),
        Attention.SDPA: lambda: _softcap(model) if model._supports_sdpa else "is not known to this model",
        Attention.FLEX: lambda: _flex(model, device),
        Attention.EAGER: lambda: None,
    }
    by_layout = _layout(model, device, dtype) if name in BY_LAYOUT else None
    return by_layout or obstacles[name]()


def _layout(model: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """These run without a mask, so whatever a model says through its mask would be lost silently."""
    config = model.config.get_text_config()
    if not (getattr(model, "_supports_attention_backend", False) and getattr(model, "_supports_flash_attn", False)):
        return f"is not known to work with {type(model).__name__}"
    kinds = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if kinds or getattr(config, "attention_chunk_size", None):
        return f"cannot do this model's layers ({', '.join(sorted(kinds)) or 'chunked attention'})"
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        return "is for causal attention only"
    if config.model_type == "gpt_oss":
        return "cannot do attention sinks"
    if device.type == "cuda" and dtype not in (torch.bfloat16, torch.float16):
        return "computes in BF16 only (`training.precision`)"
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return f"cannot do heads of {size}" if size > _LARGEST_HEAD or size % 8 else None


def _dropout(model: Any) -> str | None:
    config = model.config.get_text_config()
    rates = {name: getattr(config, name, 0.0) for name in ("attention_dropout", "attn_pdrop")}
    return next((f"has no dropout, and the model's {name} is {rate}" for name, rate in rates.items() if rate), None)


def _softcap(model: Any) -> str | None:
    cap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return f"cannot cap attention scores (attn_logit_softcapping {cap})" if cap is not None else None


def _flex(model: Any, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "trains on GPUs only"
    if not getattr(model, "_supports_flex_attn", False):
        return f"is not known to work with {type(model).__name__}"
    return _dropout(model)
