"""PyTorch's own attention for variable lengths, `torch.nn.attention.varlen`: FlashAttention 2's kernels without a package.

Its signature has changed between versions: causality was a flag, scale and grouped heads were implicit. What the installed
version takes is read once.
"""

import inspect
from typing import Any

import torch

from finetune_trainer.attention.sequences import Sequences

try:
    from torch.nn.attention import varlen as _varlen

    _varlen_attn: Any = _varlen.varlen_attn
    PARAMETERS = frozenset(inspect.signature(_varlen_attn).parameters)
except ImportError:  # before torch 2.10
    _varlen_attn, PARAMETERS = None, frozenset()

HAS_WINDOW = "window_size" in PARAMETERS
_HAS_SCALE = "scale" in PARAMETERS
_HAS_GROUPS = "enable_gqa" in PARAMETERS


def why_not() -> str | None:
    """Why it cannot be used on this machine; None if it can."""
    if _varlen_attn is None:
        return f"needs torch 2.10 or newer, this is {torch.__version__}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "needs an NVIDIA GPU of compute capability 8.0 or newer"
    return None


def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """Attention of flat tensors, see `sequences.Kernel`."""
    options: dict[str, Any] = {}
    if HAS_WINDOW:
        window = sequences.window
        # Bounds are inclusive: a window of 4 tokens is the token itself and 3 before it.
        limited = window is not None and window < sequences.longest
        options["window_size"] = (window - 1, 0) if limited and window is not None else (-1, 0)
    else:
        options["is_causal"] = True
    if _HAS_SCALE:
        options["scale"] = sequences.scale
    elif sequences.scale is not None:
        query = query * (sequences.scale * query.shape[-1] ** 0.5)
    if _HAS_GROUPS:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    # The same object twice: that queries and keys have the same boundaries is told by identity.
    ends, longest = sequences.boundaries, sequences.longest
    out: torch.Tensor = _varlen_attn(query, key, value, ends, ends, longest, longest, **options)
    return out
