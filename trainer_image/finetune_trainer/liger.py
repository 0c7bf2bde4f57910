"""Liger's Triton kernels for norms, rotary embedding and SwiGLU, on a loaded model. Its cross-entropy is in `losses`."""

import inspect
import logging
from typing import Any

import torch

from finetune_trainer.errors import ConfigError

log = logging.getLogger("finetune_trainer")


def apply(causal_lm: Any, device: torch.device, *, compiled: bool, rotary: bool = True) -> None:
    """Replaces what Liger has for this kind of model.

    Args:
        causal_lm: the causal language model of transformers.
        device: on a CPU there is nothing to do.
        compiled: its modules interrupt `torch.compile`, which fuses the same operations by itself.
        rotary: whether its rotary embedding may be used, which turns queries and keys in place: with SelectiveOp those are
            kept, and would be turned once more in the backward pass.

    Raises:
        ConfigError: liger-kernel is not installed.
    """
    if device.type != "cuda":
        log.info("ligerKernel: Liger's kernels are for GPUs; the same numbers are computed without them")
        return
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError as error:
        raise ConfigError(
            f"training.ligerKernel: liger-kernel is not in the trainer image ({error}); set ligerKernel: false"
        ) from error
    if compiled:
        log.info("ligerKernel: cross-entropy only, since compiled layers fuse the rest")
        return
    kind = causal_lm.config.get_text_config().model_type
    function = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(kind)
    if function is None:
        log.info("ligerKernel: cross-entropy only, Liger has no other kernels for models of type %s", kind)
        return
    known = inspect.signature(function).parameters
    wanted = {"cross_entropy": False, "fused_linear_cross_entropy": False, "rope": rotary}
    function(
        model=causal_lm if kind == causal_lm.config.model_type else causal_lm.get_decoder(),
        **{name: value for name, value in wanted.items() if name in known},
    )
    log.info("ligerKernel: %s of %s", "norms, rotary embedding and MLPs" if rotary else "norms and MLPs", kind)
