"""FlashAttention 2 (`flash_attn`) and 3 (`flash_attn_interface`), where the trainer image has them.

Both are asked for their deterministic backward pass: a resumed run then is the same run to the bit.
"""

import importlib
from typing import Any

import torch

from finetune_trainer.attention.sequences import Sequences

_MODULES = {2: "flash_attn", 3: "flash_attn_interface"}
_PACKAGES = {2: "flash-attn", 3: "FlashAttention 3 (flash_attn_interface)"}
_FUNCTIONS: dict[int, Any] = {}
"""Imported by `why_not`, not in a layer's forward pass: compiled code cannot import."""


def why_not(version: int) -> str | None:
    """Why this version cannot be used on this machine; None if it can."""
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    if version == 3 and capability[0] != 9:
        return f"needs a Hopper GPU (compute capability 9.x, this one has {capability[0]}.{capability[1]})"
    if capability < (8, 0):
        return "needs an NVIDIA GPU of compute capability 8.0 or newer"
    try:
        _FUNCTIONS[version] = importlib.import_module(_MODULES[version]).flash_attn_varlen_func
    except (ImportError, AttributeError, OSError) as error:
        return f"needs {_PACKAGES[version]} in the trainer image ({error})"
    return None


def kernel_2(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """FlashAttention 2 of flat tensors, see `sequences.Kernel`."""
    return _call(2, query, key, value, sequences, {"dropout_p": sequences.dropout})


def kernel_3(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """FlashAttention 3 of flat tensors, see `sequences.Kernel`; it has no dropout."""
    return _call(3, query, key, value, sequences, {})


def _call(
    version: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    options: dict[str, Any],
) -> torch.Tensor:
    window = sequences.window
    if window is not None and window < sequences.longest:
        options["window_size"] = (window - 1, 0)
    if sequences.softcap is not None:
        options["softcap"] = sequences.softcap
    out = _FUNCTIONS[version](
        query,
        key,
        value,
        cu_seqlens_q=sequences.boundaries,
        cu_seqlens_k=sequences.boundaries,
        max_seqlen_q=sequences.longest,
        max_seqlen_k=sequences.longest,
        softmax_scale=sequences.scale,
        causal=True,
        deterministic=True,
        **options,
    )
    result: torch.Tensor = (
        out[0] if isinstance(out, tuple) else out
    )  # early releases of 3 return the log-sum-exp as well
    return result
