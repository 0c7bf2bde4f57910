"""LoRA's matrix products with what they need and no more, for layers of peft that are plain LoRA.

peft's own forward pass makes three tensors of the output's size for each layer and keeps its input twice. Here the update is
added in place, and of a group of layers with the same input (query, key and value; gate and up) the adapters' first matrices
are applied as one. Saved for the backward pass are the input, once a group, and the small product with A.

Parameters and their names are peft's: checkpoints and exports do not change, nor does the result beyond rounding.
"""

import logging
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

log = logging.getLogger("finetune_trainer")
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of neighbours that are applied to the same input."""
Tensors = list[torch.Tensor]


def _forward(
    x: torch.Tensor, weights: Tensors, biases: Tensors, a: Tensors, b: Tensors, scales: list[float]
) -> Tensors:
    """Outputs of a group for x of (tokens, inputs), and the product with all A as the last."""
    inner = x.to(a[0].dtype) @ _stacked(a).t()
    outputs, at = [], 0
    for index, (weight, update, scale) in enumerate(zip(weights, b, scales, strict=True)):
        out = F.linear(x, weight, biases[index] if biases else None)
        part = inner[:, at : at + update.shape[1]]
        at += update.shape[1]
        if update.dtype == out.dtype:
            out.addmm_(part, update.t(), alpha=scale)
        else:  # float32 adapters on a bfloat16 model: the sum is rounded once, as in peft
            out = torch.add(out, part @ update.t(), alpha=scale).to(out.dtype)
        outputs.append(out)
    return [*outputs, inner]


def _backward(
    grads: Tensors,
    x: torch.Tensor,
    inner: torch.Tensor,
    weights: Tensors,
    a: Tensors,
    b: Tensors,
    scales: list[float],
    need_x: bool,
) -> Tensors:
    """Gradients of x (empty if not needed), all A and all B."""
    dtype, at = a[0].dtype, 0
    inner_grads, b_grads = [], []
    for grad, update, scale in zip(grads, b, scales, strict=True):
        own = grad.to(dtype)
        inner_grads.append((own @ update).mul_(scale))
        b_grads.append((own.t() @ inner[:, at : at + update.shape[1]]).mul_(scale))
        at += update.shape[1]
    inner_grad = torch.cat(inner_grads, dim=1) if len(inner_grads) > 1 else inner_grads[0]
    stacked_grad = inner_grad.t() @ x.to(dtype)
    # Copies: an operator's results must not share memory. They are a few kilobytes.
    a_grads = [part.clone() for part in torch.split(stacked_grad, [m.shape[0] for m in a])]
    if not need_x:
        return [x.new_empty(0), *a_grads, *b_grads]
    x_grad = grads[0] @ weights[0]
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        x_grad.addmm_(grad, weight)
    if dtype == x_grad.dtype:
        x_grad.addmm_(inner_grad, _stacked(a))
    else:
        x_grad = torch.add(x_grad, inner_grad @ _stacked(a)).to(x_grad.dtype)
    return [x_grad, *a_grads, *b_grads]


def _stacked(matrices: Tensors) -> torch.Tensor:
    return torch.cat(matrices) if len(matrices) > 1 else matrices[0]


lora_group = torch.library.custom_op("finetune::lora_group", _forward, mutates_args=())
lora_group_backward = torch.library.custom_op("finetune::lora_group_backward", _backward, mutates_args=())
"""Both as operators, so that compiled code keeps their in-place sums."""


@lora_group.register_fake
def _(x: torch.Tensor, weights: Tensors, biases: Tensors, a: Tensors, b: Tensors, scales: list[float]) -> Tensors:
    outputs = [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
    return [*outputs, a[0].new_empty(x.shape[0], sum(m.shape[0] for m in a))]


@lora_group_backward.register_fake
def _(
    grads: Tensors,
    x: torch.Tensor,
    inner: torch.Tensor,
    weights: Tensors,
    a: Tensors,
    b: Tensors,
    scales: list[float],
    need_x: bool,
) -> Tensors:
    first = torch.empty_like(x) if need_x else x.new_empty(0)
    return [first, *(torch.empty_like(m) for m in a), *(torch.empty_like(m) for m in b)]


def _setup(ctx: Any, inputs: Any, output: Tensors) -> None:
    x, weights, biases, a, b, scales = inputs
    ctx.save_for_backward(x, output[-1], *weights, *a, *b)
    ctx.count, ctx.num_biases, ctx.scales, ctx.need_x = len(weights), len(biases), scales, ctx.needs_input_grad[0]


def _differentiate(ctx: Any, grads: list[torch.Tensor | None]) -> Any:
    n = ctx.count
    x, inner, *rest = ctx.saved_tensors
    weights, a, b = rest[:n], rest[n : 2 * n], rest[2 * n :]
    given = [
        x.new_zeros(x.shape[0], weight.shape[0]) if grad is None else grad.contiguous()
        for grad, weight in zip(grads, weights, strict=False)
    ]
    x_grad, *others = lora_group_backward(given, x, inner, weights, a, b, ctx.scales, ctx.need_x)
    return x_grad if ctx.need_x else None, [None] * n, [None] * ctx.num_biases, others[:n], others[n:], None


lora_group.register_autograd(_differentiate, setup_context=_setup)


class _Group(torch.autograd.Function):
    """The same without the operator's cost of dispatch, for code that is not compiled."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scales: list[float], count: int, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        weights, a, b = (list(tensors[i * count : (i + 1) * count]) for i in range(3))
        *outputs, inner = _forward(x, weights, list(tensors[3 * count :]), a, b, scales)
        ctx.save_for_backward(x, inner, *weights, *a, *b)
        ctx.count, ctx.scales, ctx.num_tensors = count, scales, len(tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        n = ctx.count
        x, inner, *rest = ctx.saved_tensors
        need_x = ctx.needs_input_grad[0]
        x_grad, *others = _backward(
            [grad.contiguous() for grad in grads],
            x,
            inner,
            rest[:n],
            rest[n : 2 * n],
            rest[2 * n :],
            ctx.scales,
            need_x,
        )
        padding = [None] * (ctx.num_tensors - 3 * n)
        return (x_grad if need_x else None, None, None, *[None] * n, *others, *padding)


class LoraGroup:
    """Layers of peft that are applied to the same input; the first that is called computes for all.

    Results wait until they are asked for with that very input, so at most the group's own outputs are held.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
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
        if torch.compiler.is_compiling():
            outputs = lora_group(flat, weights, biases, a, b, scales)[:-1]
        else:
            outputs = list(_Group.apply(flat, scales, len(weights), *weights, *a, *b, *biases))
        return [out.view(*x.shape[:-1], out.shape[-1]) for out in outputs]


@lru_cache(maxsize=1)
def _in_place() -> Any:
    """The class of layers that compute in a group.

    A class and not a function set on each layer: compiled code is then the same for all layers of a model, while a function
    would be told by its identity, and every layer compiled by itself.
    """
    from peft.tuners.lora.layer import Linear

    class InPlaceLinear(Linear):  # type: ignore[misc]
        lora_group: LoraGroup
        lora_index: int

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.disable_adapters or self.merged or args or kwargs:
                result: torch.Tensor = super().forward(x, *args, **kwargs)
                return result
            return self.lora_group.output(self.lora_index, x)

    return InPlaceLinear


def install(model: Any) -> bool:
    """Replaces the forward pass of every plain LoRA layer of a peft model.

    Returns:
        Whether all adapters are of that kind; the others keep peft's way.
    """
    from peft.tuners.lora import LoraLayer

    grouped: set[int] = set()
    groups = 0
    for parent in model.modules():
        for names in GROUPS:
            members = [getattr(parent, name, None) for name in names]
            if all(_is_plain(m) for m in members) and _alike(members):
                _install(members)
                grouped.update(map(id, members))
                groups += 1
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    single = [layer for layer in layers if id(layer) not in grouped and _is_plain(layer)]
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
        layer.__class__ = _in_place()
        layer.lora_group, layer.lora_index = group, index


def _is_plain(layer: Any) -> bool:
    """Whether a layer is a linear one with one LoRA adapter and nothing else about it."""
    from peft.tuners.lora.layer import Linear

    if type(layer) is not Linear or type(layer.base_layer) is not torch.nn.Linear or layer.fan_in_fan_out:
        return False
    names = list(layer.lora_A)
    if len(names) != 1 or list(layer.active_adapters) != names or layer.merged:
        return False
    (name,) = names
    frozen = all(not p.requires_grad for p in layer.base_layer.parameters())
    no_dropout = isinstance(layer.lora_dropout[name], torch.nn.Identity)
    variant = name in layer.lora_variant or layer.lora_bias.get(name, False)
    same = layer.lora_A[name].weight.dtype == layer.lora_B[name].weight.dtype
    return frozen and no_dropout and not variant and same


def _alike(layers: list[Any]) -> bool:
    """Whether layers can be one group: inputs, bias or not, precision."""
    first = layers[0]
    return all(
        layer.in_features == first.in_features
        and (layer.base_layer.bias is None) == (first.base_layer.bias is None)
        and layer.lora_A[layer.active_adapters[0]].weight.dtype == first.lora_A[first.active_adapters[0]].weight.dtype
        for layer in layers
    )
