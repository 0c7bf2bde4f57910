"""Imported by a test's ranks (`TEST_HOOK`): with ZeRO-3 a step fails that keeps a gathered weight for its backward pass.

Kept may be a parameter itself, which is empty once it has been released, but no view of one. Layers are compiled without
generating code, and autograd's graph is divided as it is with it.
"""

from functools import partial
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from finetune_trainer import adapters, kernels
from finetune_trainer.layer_units import decoder_layers

kernels.compile_layers = partial(kernels.compile_layers, backend="aot_eager_decomp_partition")
forward = DeepSpeedEngine.forward


def forward_and_look(self: Any, *args: Any, **kwargs: Any) -> Any:
    weights = [p for layer in decoder_layers(adapters.unwrap(self)) for p in layer.parameters() if hasattr(p, "ds_id")]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept = {tensor.untyped_storage().data_ptr()} if not isinstance(tensor, torch.nn.Parameter) else set()
        assert not kept & {p.untyped_storage().data_ptr() for p in weights if p.numel()}, "a weight is kept"
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return forward(self, *args, **kwargs)


DeepSpeedEngine.forward = forward_and_look  # type: ignore[method-assign]
