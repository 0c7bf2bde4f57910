"""The decoder layer as the unit of communication, which then hides behind the computation of the next layer.

A layer's gradients are reduced together. ZeRO-1 and 2 wait at each bucket for the one before, and a compiled layer has all its
gradients at once: with several buckets for each, only the last is hidden.

Under ZeRO-3 a layer's weights are gathered together too, while the layer before it is computed. DeepSpeed's own unit is the
module, with hooks between the operations of a layer: they keep out the compiler and what computes with the weights of several
modules at once (`lora_linear`), and every module waits for its weights.
"""

from collections.abc import Iterable
from typing import Any

import torch

BUCKET_ELEMENTS = 10_000_000, 500_000_000
"""Of gradients in a bucket at least and at most. As many as adapters of some layers have, so that not all are reduced after the
backward pass; and DeepSpeed's default, which a layer of experts exceeds. There are two buckets."""
ADAPTERS_SHARE = 0.25
"""Of a layer's elements: what learns is called adapters below that."""
LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's default of gathered elements, above which it gathers nothing in advance."""


def decoder_layers(model: Any) -> list[Any]:
    """Of a causal language model of transformers, adapters around it or not; none where the model has no list of them."""
    return list(getattr(model.get_decoder(), "layers", None) or [])


def gather_whole(layers: list[Any], config: dict[str, Any]) -> None:
    """Lets ZeRO-3 gather each layer at once, which DeepSpeed calls a leaf; to be called before the engine is built.

    The gradients of a leaf are reduced when that of its input is there, or at once where the input needs none, which is too
    early. The first layer that learns therefore gets an input that needs one.

    Args:
        layers: of the model.
        config: the job's own settings for DeepSpeed. With second parts on each node (hpZ) the work is done as DeepSpeed does it.
    """
    from deepspeed.utils import set_z3_leaf_module

    from finetune_trainer import gathering

    if config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1) <= 1:
        gathering.install()
    for layer in layers:
        set_z3_leaf_module(layer, True)
    learning = (layer for layer in layers if any(p.requires_grad for p in layer.parameters()))
    if first := next(learning, None):
        first.register_forward_pre_hook(_need_gradient, with_kwargs=True)


def sizes(model: Any, stage: int, ranks: int) -> dict[str, int]:
    """DeepSpeed's settings of how much is communicated at once.

    Args:
        model: with its adapters; partitioned or not.
        stage: of ZeRO.
        ranks: of the job; one alone has nobody to tell its gradients to.
    """
    layers = decoder_layers(model)
    trained = max((_elements(p for p in layer.parameters() if p.requires_grad) for layer in layers), default=0)
    reduced = trained if ranks > 1 else 0
    least, most = BUCKET_ELEMENTS
    bucket = {"reduce_bucket_size": min(max(least, reduced), most)}
    if stage < 3 or not layers:
        return bucket
    elements = max(_elements(layer.parameters()) for layer in layers)
    learning = max((_elements([p]) for layer in layers for p in layer.parameters() if p.requires_grad), default=0)
    return {
        **bucket,
        # Adapters, and what is as small, stay whole: most of a layer's parameters, and almost nothing of its memory.
        "stage3_param_persistence_threshold": learning if trained < ADAPTERS_SHARE * elements else 0,
        "stage3_prefetch_bucket_size": elements,
        "stage3_max_live_parameters": max(LIVE_ELEMENTS, 3 * elements),
    }


def _elements(parameters: Iterable[Any]) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


def _need_gradient(_layer: Any, inputs: tuple[torch.Tensor, ...], named: dict[str, Any]) -> None:
    if torch.is_grad_enabled():
        (inputs[0] if inputs else named["hidden_states"]).requires_grad_()
