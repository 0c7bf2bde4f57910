"""The frame of every attention function for variable lengths: checks, flattening, and the plain way on the CPU.

A backend is a function of flat tensors, (tokens, heads, head size), and says nothing about batches. Registered with
transformers' `AttentionInterface`, so models call it with what they know: sliding window, soft cap, scale.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

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
        kernel: gets flat tensors; on the CPU `reference` is used in its place.
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
        run = reference if query.device.type == "cpu" else kernel
        return run(q, k, v, sequences).reshape(rows, width, heads, value.shape[-1]), None

    return attend


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """One sequence after the other with PyTorch's own attention: what the kernels compute, on any device."""
    if sequences.softcap is not None:
        raise ConfigError("training.attention: Varlen cannot do this model's soft cap; use Eager")
    ends = sequences.boundaries.tolist()
    parts = []
    for start, end in pairwise(ends):
        if end == start:
            continue
        q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        length, window = end - start, sequences.window
        mask = None
        if window is not None and window < length:
            distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
            mask = (distance >= 0) & (distance < window)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=sequences.dropout,
            is_causal=mask is None,
            scale=sequences.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        parts.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(parts)
