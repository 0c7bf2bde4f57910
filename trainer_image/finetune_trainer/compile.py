"""Regional compilation: each decoder layer by `torch.compile`. All layers share the same code, so one is compiled.

Recomputation of activations stays outside the compiled code: the inner forward function of a layer is compiled, and what
transformers wraps around it is done here as it does.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from finetune_trainer.errors import ConfigError
from finetune_trainer.layer_units import decoder_layers

log = logging.getLogger("finetune_trainer")
DYNAMIC = r"L\['kwargs'\]\['(cu_seq_lens|max_length)_[qk]'\].*"
"""What differs from batch to batch, as the compiler names it: else code is made for the first batch's, and again."""
RECOMPILE_LIMIT = 64
"""Widths, training and evaluation, first and later layers each compile once; torch gives up at 8 by default."""


def compile_layers(causal_lm: Any, *, whole: bool, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compiles the decoder layers of a model in place; they are compiled when they first run.

    Args:
        causal_lm: the causal language model of transformers.
        whole: refuse interruptions of the graph, which would cost silently.
        backend: torch's name of the compiler, or a function that is one.

    Returns:
        The number of layers.

    Raises:
        ConfigError: the model has no list of decoder layers.
    """
    layers = decoder_layers(causal_lm)
    if not layers:
        raise ConfigError(
            f"training.compile: {type(causal_lm).__name__} has no decoder layers known here; leave it out"
        )
    torch.compiler.config.dynamic_sources = DYNAMIC
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 256)
    compiled: dict[type, Any] = {}  # one function for all layers of a kind, else each would be compiled by itself
    for layer in layers:
        kind = type(layer)
        outside = kind.__call__ is torch.nn.Module.__call__  # older transformers recompute around `__call__`
        inner = getattr(kind.forward, "__wrapped__", kind.forward) if outside else kind.forward
        if kind not in compiled:
            compiled[kind] = torch.compile(inner, fullgraph=whole, backend=backend)
        layer.forward = partial(_forward if outside else _call, layer, compiled[kind])
    log.info("compile: %d decoder layers, each as %s", len(layers), "one graph" if whole else "one or more graphs")
    return len(layers)


def _call(layer: Any, compiled: Any, *args: Any, **kwargs: Any) -> Any:
    return compiled(layer, *args, **kwargs)


def _forward(layer: Any, compiled: Any, *args: Any, **kwargs: Any) -> Any:
    """What transformers' `GradientCheckpointingLayer` does, around the compiled function."""
    if getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled():
        return layer._gradient_checkpointing_func(partial(compiled, layer, **kwargs), *args)
    return compiled(layer, *args, **kwargs)
