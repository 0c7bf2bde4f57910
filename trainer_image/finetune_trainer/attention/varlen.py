"""PyTorch's own attention for variable lengths: FlashAttention 2's kernels without a package.

`torch.nn.attention.varlen` calls the same operators, but leaves it to a global setting whether the backward pass adds up in a
fixed order, and that setting cannot be on for this pass alone. Here it can, so a resumed run is the same run to the bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from finetune_trainer.attention.sequences import Sequences


def why_not() -> str | None:
    """Why it cannot be used on this machine; None if it can."""
    if not torch.cuda.is_available():
        return None  # the CPU has a way of its own, see `_on_cpu`
    if not torch.backends.cuda.is_flash_attention_available():
        return "is not part of this build of PyTorch"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs an NVIDIA GPU of compute capability 8.0 or newer"
    return None


def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """Attention of flat tensors, see `sequences.Kernel`."""
    window = -1 if sequences.window is None or sequences.window >= sequences.longest else sequences.window - 1
    scale = query.shape[-1] ** -0.5 if sequences.scale is None else sequences.scale
    out: torch.Tensor = _attention(query, key, value, sequences.boundaries, sequences.longest, scale, window)[0]
    return out


@torch.library.custom_op("finetune::varlen_attention", mutates_args=())
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and the log-sum-exp of (heads, tokens). `window`: tokens seen before a token; -1 for all."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        boundaries,
        boundaries,
        longest,
        longest,
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=window,
        window_size_right=0,
    )
    return out, lse


@_attention.register_fake
def _(query: torch.Tensor, *_others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


@torch.library.custom_op("finetune::varlen_attention_backward", mutates_args=())
def _attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    unused = torch.empty(2, dtype=torch.uint64, device=query.device)  # the state of dropout, which there is none of
    with _in_fixed_order():
        q, k, v = torch.ops.aten._flash_attention_backward(
            grad,
            query,
            key,
            value,
            out,
            lse,
            boundaries,
            boundaries,
            longest,
            longest,
            0.0,
            True,
            unused,
            unused,
            scale=scale,
            window_size_left=window,
            window_size_right=0,
        )
    return q, k, v


@_attention_backward.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, boundaries, *ctx.numbers = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, boundaries)


def _differentiate(ctx: Any, grad: torch.Tensor, _lse_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grads = _attention_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.numbers)
    return (*grads, None, None, None, None)


_attention.register_autograd(_differentiate, setup_context=_setup)


@_attention.register_kernel("cpu")
def _on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(query)
    for part in _sequences(boundaries):
        q, k, v = (_heads_first(x[part], query.shape[1]) for x in (query, key, value))
        out[part] = (_weights(q, k, scale, window) @ v).transpose(0, 1).to(out.dtype)
    return out, query.new_zeros((query.shape[1], query.shape[0]), dtype=torch.float32)


@_attention_backward.register_kernel("cpu")
def _backward_on_cpu(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for part in _sequences(boundaries):
        q, k, v, g = (_heads_first(x[part], query.shape[1]) for x in (query, key, value, grad))
        weights = _weights(q, k, scale, window)
        scores = g @ v.transpose(1, 2)
        scores = weights * (scores - (scores * weights).sum(dim=-1, keepdim=True)) * scale
        for target, whole in zip(
            grads, (scores @ k, scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ g), strict=True
        ):
            grouped = whole.view(target.shape[1], -1, *whole.shape[1:]).sum(dim=1)  # heads that share keys and values
            target[part] = grouped.transpose(0, 1).to(target.dtype)
    return grads


def _sequences(boundaries: torch.Tensor) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(boundaries.tolist()) if end > start]


def _heads_first(flat: torch.Tensor, heads: int) -> torch.Tensor:
    """(heads, tokens, head size) in float32; heads that are shared are repeated."""
    return flat.float().repeat_interleave(heads // flat.shape[1], dim=1).transpose(0, 1)


def _weights(query: torch.Tensor, key: torch.Tensor, scale: float, window: int) -> torch.Tensor:
    """Attention of one sequence, (heads, tokens, tokens)."""
    positions = torch.arange(query.shape[1], device=query.device)
    distance = positions[:, None] - positions
    seen = (distance >= 0) & ((distance <= window) | (window < 0))
    scores = query @ key.transpose(1, 2) * scale
    return scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)


@contextmanager
def _in_fixed_order() -> Iterator[None]:
    """The kernel looks at the global setting, and is deterministic only where that refuses all else.

    With it on for the whole process, operators without a deterministic form would end a run that can do without.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
