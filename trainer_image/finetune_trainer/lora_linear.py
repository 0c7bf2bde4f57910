"""LoRA's matrix products with what they need and no more, for layers of peft that are plain LoRA.

peft's own forward pass makes three tensors of the output's size for each layer and keeps its input twice. Here the update is
added in place, and of a group of layers with the same input (query, key and value; gate and up) the adapters' first matrices
are applied as one. Saved for the backward pass are the input, once a group, and the small product with A. With dropout each
adapter has an input of its own.

The matrices of a base in 4 bits (QLoRA) are made out of them inside, for one product at a time.

Adapters in float32 on a model in bfloat16 are rounded for the products and get float32 gradients: they are their own master
weights.

Parameters and their names are peft's: checkpoints and exports do not change, nor does the result beyond rounding.
"""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

log = logging.getLogger("finetune_trainer")
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of neighbours that are applied to the same input."""
Tensors = list[torch.Tensor]


def _forward(
    x: torch.Tensor,
    dropped: Tensors,
    weights: Tensors,
    biases: Tensors,
    a: Tensors,
    b: Tensors,
    scales: list[float],
    packing: Tensors,
    block: int,
    outer_block: int,
) -> Tensors:
    """Outputs of a group for x of (tokens, inputs), and the product with all A as the last.

    `dropped`: with dropout, x as each adapter gets it; else empty. `packing`: of quantised weights the `Packing`s, one after the
    other; empty for plain ones.
    """
    if dropped:
        inner = torch.cat([part @ m.to(x.dtype).t() for part, m in zip(dropped, a, strict=True)], dim=1)
    else:
        inner = x @ _stacked(a, x.dtype).t()
    outputs, at = [], 0
    for index, (update, scale) in enumerate(zip(b, scales, strict=True)):
        out = F.linear(
            x, _dense(index, weights, a, b, packing, block, outer_block, x.dtype), biases[index] if biases else None
        )
        part = inner[:, at : at + update.shape[1]]
        at += update.shape[1]
        outputs.append(out.addmm_(part, update.to(x.dtype).t(), alpha=scale))
    return [*outputs, inner]


def _backward(
    grads: Tensors,
    inputs: Tensors,
    inner: torch.Tensor,
    weights: Tensors,
    a: Tensors,
    b: Tensors,
    scales: list[float],
    packing: Tensors,
    block: int,
    outer_block: int,
    dropped: bool,
    need_x: bool,
) -> Tensors:
    """Gradients of x and of what dropout made of it (empty if not needed), all A and all B.

    `inputs`: of the adapters: x, or with dropout (`dropped`) as each gets it.
    """
    kind, dtype = a[0].dtype, inputs[0].dtype
    ranks = [m.shape[0] for m in a]
    inner_grad = inner.new_empty(inner.shape)
    inner_grads, b_grads = torch.split(inner_grad, ranks, dim=1), []
    # With beta=0 what was in memory is not read, and the scale costs no operation of its own.
    for grad, part, update, scale, hidden in zip(
        grads, inner_grads, b, scales, torch.split(inner, ranks, dim=1), strict=True
    ):
        part.addmm_(grad, update.to(dtype), beta=0, alpha=scale)
        b_grads.append(inner.new_empty(update.shape).addmm_(grad.t(), hidden, beta=0, alpha=scale).to(kind))
    if dropped:
        a_grads = [(grad.t() @ part).to(kind) for grad, part in zip(inner_grads, inputs, strict=True)]
    elif len(a) == 1:
        a_grads = [(inner_grad.t() @ inputs[0]).to(kind)]
    else:
        # Copies: an operator's results must not share memory. They are a few kilobytes.
        a_grads = [part.to(kind, copy=True) for part in torch.split(inner_grad.t() @ inputs[0], ranks)]
    if not need_x:
        return [part.new_empty(0) for part in _differentiated(inputs, dropped)] + [*a_grads, *b_grads]
    x_grad = grads[0] @ _dense(0, weights, a, b, packing, block, outer_block, dtype)
    for index, grad in enumerate(grads[1:], start=1):
        x_grad.addmm_(grad, _dense(index, weights, a, b, packing, block, outer_block, dtype))
    if dropped:
        part_grads = [grad @ m.to(dtype) for grad, m in zip(inner_grads, a, strict=True)]
        return [x_grad, *part_grads, *a_grads, *b_grads]
    x_grad.addmm_(inner_grad, _stacked(a, dtype))
    return [x_grad, *a_grads, *b_grads]


def _differentiated(inputs: Tensors, dropped: bool) -> Tensors:
    """Something of the shape of x and, with dropout, of each adapter's input."""
    return [inputs[0], *inputs] if dropped else inputs


def _stacked(matrices: Tensors, dtype: torch.dtype) -> torch.Tensor:
    return (torch.cat(matrices) if len(matrices) > 1 else matrices[0]).to(dtype)


def _dense(
    index: int,
    weights: Tensors,
    a: Tensors,
    b: Tensors,
    packing: Tensors,
    block: int,
    outer_block: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """A weight of the group as a matrix of (outputs, inputs): itself, or out of its four bits for as long as it is needed."""
    weight = weights[index]
    if not packing:
        return weight
    count = len(packing) // len(weights)
    absmax, *nested = packing[index * count : (index + 1) * count]
    if nested:
        code, outer, offset = nested
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(absmax, outer, code, outer_block, torch.float32) + offset
    shape = [b[index].shape[0], a[index].shape[1]]
    result: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(weight, absmax, block, "nf4", shape, dtype)
    return result


lora_group = torch.library.custom_op("finetune::lora_group", _forward, mutates_args=())
lora_group_backward = torch.library.custom_op("finetune::lora_group_backward", _backward, mutates_args=())
"""Both as operators, so that compiled code keeps their in-place sums."""


@lora_group.register_fake
def _(
    x: torch.Tensor, dropped: Tensors, weights: Tensors, biases: Tensors, a: Tensors, b: Tensors, *_others: Any
) -> Tensors:
    outputs = [x.new_empty(x.shape[0], update.shape[0]) for update in b]
    return [*outputs, x.new_empty(x.shape[0], sum(m.shape[0] for m in a))]


@lora_group_backward.register_fake
def _(
    grads: Tensors, inputs: Tensors, inner: torch.Tensor, weights: Tensors, a: Tensors, b: Tensors, *others: Any
) -> Tensors:
    *_, dropped, need_x = others
    first = [torch.empty_like(m) if need_x else m.new_empty(0) for m in _differentiated(inputs, dropped)]
    return [*first, *(torch.empty_like(m) for m in a), *(torch.empty_like(m) for m in b)]


def _setup(ctx: Any, inputs: Any, output: Tensors) -> None:
    x, dropped, weights, biases, a, b, scales, packing, *blocks = inputs
    ctx.save_for_backward(*(dropped or [x]), output[-1], *weights, *a, *b, *packing)
    ctx.num_dropped = len(dropped)
    ctx.count, ctx.scales, ctx.blocks, ctx.need_x = len(weights), scales, blocks, ctx.needs_input_grad[0]
    ctx.num_biases, ctx.num_packing = len(biases), len(packing)


def _differentiate(ctx: Any, grads: list[torch.Tensor | None]) -> Any:
    n, drops = ctx.count, ctx.num_dropped
    num_inputs = drops or 1
    saved = list(ctx.saved_tensors)  # once: recomputed activations can be asked for no second time
    inputs, (inner, *rest) = saved[:num_inputs], saved[num_inputs:]
    weights, a, b, packing = rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n], rest[3 * n :]
    given = [
        inner.new_zeros(inner.shape[0], update.shape[0]) if grad is None else grad.contiguous()
        for grad, update in zip(grads, b, strict=False)
    ]
    x_grad, *others = lora_group_backward(
        given, inputs, inner, weights, a, b, ctx.scales, packing, *ctx.blocks, drops > 0, ctx.need_x
    )
    part_grads, others = others[:drops], others[drops:]
    return (
        x_grad if ctx.need_x else None,
        part_grads if ctx.need_x else [None] * drops,
        [None] * n,
        [None] * ctx.num_biases,
        others[:n],
        others[n:],
        None,
        [None] * ctx.num_packing,
        None,
        None,
    )


lora_group.register_autograd(_differentiate, setup_context=_setup)


@dataclass(frozen=True)
class Packing:
    """What makes a matrix out of the four bits of a quantised weight; empty for a plain one."""

    tensors: Tensors
    """absmax of each block; with double quantisation as uint8, followed by its code, its own absmax and offset."""
    block: int
    """Weights that share an absmax."""
    outer_block: int
    """With double quantisation: numbers of absmax that share theirs."""

    @classmethod
    def of(cls, weight: Any) -> "Packing":
        state = getattr(weight, "quant_state", None)
        if state is None:
            return cls([], 0, 0)
        if not state.nested:
            return cls([state.absmax], state.blocksize, 0)
        outer = state.state2
        return cls([state.absmax, outer.code, outer.absmax, state.offset], state.blocksize, outer.blocksize)


class LoraGroup:
    """Layers of peft that are applied to the same input; the first that is called computes for all.

    Results wait until they are asked for with that very input, so at most the group's own outputs are held.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        packings = [Packing.of(layer.base_layer.weight) for layer in layers]
        self._packing = [tensor for packing in packings for tensor in packing.tensors]
        self._blocks = packings[0].block, packings[0].outer_block
        self._x: torch.Tensor | None = None
        self._waiting: dict[int, torch.Tensor] = {}

    def output(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What layer `index` gives for x of (..., inputs)."""
        if x is self._x and index in self._waiting:
            result = self._waiting.pop(index)
            if not self._waiting:
                self._x = None
            return result
        outputs = self._compute(x)
        result = outputs[index]
        self._waiting = {at: out for at, out in enumerate(outputs) if at != index}
        self._x = x if self._waiting else None
        return result

    def _compute(self, x: torch.Tensor) -> list[torch.Tensor]:
        bases = [layer.base_layer for layer in self.layers]
        names = [layer.active_adapters[0] for layer in self.layers]
        pairs = list(zip(self.layers, names, strict=True))
        weights = [base.weight for base in bases]
        biases = [base.bias for base in bases] if bases[0].bias is not None else []
        a = [layer.lora_A[name].weight for layer, name in pairs]
        b = [layer.lora_B[name].weight for layer, name in pairs]
        scales = [float(layer.scaling[name]) for layer, name in pairs]
        flat = x.reshape(-1, x.shape[-1])
        dropouts = [layer.lora_dropout[name] for layer, name in pairs if layer.training]
        dropped = [dropout(flat) for dropout in dropouts if isinstance(dropout, torch.nn.Dropout)]
        outputs = lora_group(flat, dropped, weights, biases, a, b, scales, self._packing, *self._blocks)[:-1]
        return [out.view(*x.shape[:-1], out.shape[-1]) for out in outputs]


@cache
def _in_place(kind: type) -> Any:
    """The class of layers that compute in a group, made of one of peft's.

    A class and not a function set on each layer: compiled code is then the same for all layers of a model, while a function
    would be told by its identity, and every layer compiled by itself.
    """

    class InPlaceLinear(kind):  # type: ignore[misc]
        lora_group: LoraGroup
        lora_index: int

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.disable_adapters or self.merged or args or kwargs:
                result: torch.Tensor = super().forward(x, *args, **kwargs)
                return result
            return self.lora_group.output(self.lora_index, x)

    return InPlaceLinear


def install(model: Any, together: list[Any] | None = None) -> bool:
    """Replaces the forward pass of every plain LoRA layer of a peft model.

    Args:
        model: peft's.
        together: the modules within which all weights are there at the same time; None: the whole model is one.

    Returns:
        Whether all adapters are of that kind; the others keep peft's way.
    """
    from peft.tuners.lora import LoraLayer

    grouped: set[int] = set()
    groups = 0
    inside = [module for root in ([model] if together is None else together) for module in root.modules()]
    for parent in inside:
        for names in GROUPS:
            members = [getattr(parent, name, None) for name in names]
            if all(_is_plain(m) for m in members) and _alike(members):
                _install(members)
                grouped.update(map(id, members))
                groups += 1
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    single = [m for m in inside if isinstance(m, LoraLayer) and id(m) not in grouped and _is_plain(m)]
    for layer in single:
        _install([layer])
    others = len(layers) - len(grouped) - len(single)
    log.info(
        "adapters: %d layers in %d groups and %d single ones in place, %d as peft does it",
        len(grouped),
        groups,
        len(single),
        others,
    )
    return others == 0


def _install(layers: list[Any]) -> None:
    group = LoraGroup(layers)
    for index, layer in enumerate(layers):
        kind: Any = type(layer)
        layer.__class__ = _in_place(kind)
        layer.lora_group, layer.lora_index = group, index


def _is_plain(layer: Any) -> bool:
    """Whether a layer is a linear one, or one of 4 bits, with one LoRA adapter and nothing else about it."""
    from peft.tuners.lora.layer import Linear

    if type(layer) is Linear:
        if type(layer.base_layer) is not torch.nn.Linear or layer.fan_in_fan_out:
            return False
    elif not _is_4bit(layer):
        return False
    names = list(layer.lora_A)
    if len(names) != 1 or list(layer.active_adapters) != names or layer.merged:
        return False
    (name,) = names
    frozen = all(not p.requires_grad for p in layer.base_layer.parameters())
    dropout = isinstance(layer.lora_dropout[name], torch.nn.Identity | torch.nn.Dropout)
    variant = name in layer.lora_variant or layer.lora_bias.get(name, False)
    same = layer.lora_A[name].weight.dtype == layer.lora_B[name].weight.dtype
    return frozen and dropout and not variant and same


def _is_4bit(layer: Any) -> bool:
    """Told by its parts: peft's class for it is only there where bitsandbytes is."""
    state = getattr(getattr(getattr(layer, "base_layer", None), "weight", None), "quant_state", None)
    return type(layer).__name__ == "Linear4bit" and state is not None and state.quant_type == "nf4"


def _alike(layers: list[Any]) -> bool:
    """Whether layers can be one group: inputs, bias or not, precision."""
    first = layers[0]
    return all(
        layer.in_features == first.in_features
        and type(layer) is type(first)
        and (layer.base_layer.bias is None) == (first.base_layer.bias is None)
        and layer.lora_A[layer.active_adapters[0]].weight.dtype == first.lora_A[first.active_adapters[0]].weight.dtype
        for layer in layers
    )
