"""The frame of every attention function for variable lengths: checks and flattening.

A backend is a function of flat tensors, (tokens, heads, head size), and says nothing about batches. Registered with
transformers' `AttentionInterface`, so models call it with what they know: sliding window, soft cap, scale.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from finetune_trainer.errors import ConfigError


@dataclass(frozen=True)
class Sequences:
    """What a kernel is told beside the tensors."""

    boundaries: torch.Tensor
    """int32, (sequences + 1); on the tensors' device."""
    longest: int
    scale: float | None
    window: int | None
    """Tokens that a token sees, itself included; None: all of its sequence."""
    softcap: float | None
    dropout: float


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequences], torch.Tensor]


def attention_function(name: str, kernel: Kernel) -> Callable[..., tuple[torch.Tensor, None]]:
    """The function that transformers calls in every layer.

    Args:
        name: of the backend, for messages.
        kernel: gets flat tensors.
    """

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        if cu_seq_lens_q is None or max_length_q is None or attention_mask is not None:
            raise RuntimeError(
                f"{name} attention needs the batch's layout; use `plain_attention` for other forward passes"
            )
        for unknown in ("s_aux", "position_bias"):
            if others.get(unknown) is not None:
                raise ConfigError(f"training.attention: {name} cannot do this model's `{unknown}`; use Eager")
        if others.get("is_causal") is False or not getattr(module, "is_causal", True):
            raise ConfigError(
                f"training.attention: {name} is for causal attention only, which this model's is not; use SDPA"
            )
        rows, heads, width, _ = query.shape
        q, k, v = (x.transpose(1, 2).reshape(rows * width, x.shape[1], x.shape[3]) for x in (query, key, value))
        sequences = Sequences(cu_seq_lens_q, max_length_q, scaling, sliding_window, softcap, dropout)
        return kernel(q, k, v, sequences).reshape(rows, width, heads, value.shape[-1]), None

    return attend
