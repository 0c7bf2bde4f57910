"""What a job must hold in memory, worked out from the shapes of the model's weights before any of them is loaded.

Owns a lower bound: weights, gradients and optimizer states, as S. Rajbhandari et al. count them in "ZeRO: Memory Optimizations
Toward Training Trillion Parameter Models" (arXiv:1910.02054, section 3.1 and figure 1). A parameter that is trained in mixed
precision takes 2 bytes of weight, 2 of gradient and 12 of optimizer (float32 master, momentum, variance); stage 1 divides the
optimizer by the number of ranks, stage 2 the gradients too, stage 3 the weights too. Activations, buffers and fragmentation come
on top: what is refused here could not have run, and what is not refused may still be too large.
"""

import json
import logging
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from finetune_api.combinations import check
from finetune_api.launch import LaunchAdapter, LaunchFreeze, LaunchQuantization, LaunchSpec
from finetune_api.spec import AdapterVariant, Method, Offload, Optimizer, Precision, ZeroStage
from finetune_api.words import say_ranks
from finetune_trainer import vision
from finetune_trainer.adapters import trains_masters
from finetune_trainer.config import combination
from finetune_trainer.container import memory_limit
from finetune_trainer.engine import copies_masters, zero_stage
from finetune_trainer.errors import ConfigError
from finetune_trainer.weights import weight_files

Shapes = Mapping[str, tuple[int, ...]]
"""Of each weight, by its name in the files."""
GIB = 2**30
_MOMENTS = {Optimizer.ADAMW: 2.0, Optimizer.ADAMW_8BIT: 0.5}
"""Bytes that momentum and variance take for each byte of a float32 or bf16 state; paged ones can leave the GPU."""
_NO_LAYER = re.compile(r"(^|\.)(embed\w*|lm_head|wte|wpe)\.")
_HEAD = re.compile(r"(^|\.)lm_head\.weight$")
_LAYER = re.compile(r"\.(\d+)\.")
_MOST_NODES = 16
_ADAPTER = LaunchAdapter(
    rank=8, alpha=16, dropout=0.0, target_modules=["All"], variant=AdapterVariant.LORA, lora_plus_ratio=None
)
log = logging.getLogger("finetune_trainer")


@dataclass(frozen=True)
class Needed:
    """Bytes of one rank, at least; those of what is offloaded are the host's."""

    weights: float
    gradients: float
    optimizer: float
    host: float

    @property
    def device(self) -> float:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Capacity:
    """Bytes that there are."""

    gpu: int | None
    """Of one rank's GPU; None: ranks compute on the CPU, in the host's memory."""
    host: int
    """Of the node, for all its ranks."""


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's weights, from the headers of its safetensors files, as they are in memory; no weight is read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
        shapes |= {name: tuple(kind["shape"]) for name, kind in header.items() if name != "__metadata__"}
    if _is_tied(json.loads((folder / "config.json").read_text(encoding="utf-8"))):
        return {name: shape for name, shape in shapes.items() if not _HEAD.search(name)}
    return shapes


def _is_tied(config: dict[str, Any]) -> bool:
    """Whether the head is the embedding; some files hold it twice all the same."""
    return any(part.get("tie_word_embeddings") for part in (config, config.get("text_config") or {}))


def shapes_of_config(folder: Path) -> dict[str, tuple[int, ...]]:
    """The same from config.json alone, before the weights are there: the model is built without memory.

    Empty where transformers cannot do that; what is wrong is told when the model is loaded.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        with torch.device("meta"):
            model = vision.model_class(config.to_dict()).from_config(config)
    except Exception as error:  # whatever a configuration makes of it
        log.info("memory: not known before the download (%s: %s)", type(error).__name__, str(error).split("\n")[0])
        return {}
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def num_trained(shapes: Shapes, spec: LaunchSpec) -> int:
    """How many parameters the job trains: its method of the language model, and a vision tower or projector whole."""
    parts = vision.trained_parts(spec.vision or vision.NOTHING_TRAINED)
    seeing = sum(prod(shape) for name, shape in shapes.items() if parts.get(vision.part_of(name)))
    return seeing + _by_method({n: s for n, s in shapes.items() if vision.part_of(n) is None}, spec)


def _by_method(shapes: Shapes, spec: LaunchSpec) -> int:
    if spec.freeze is not None:
        return sum(prod(shapes[name]) for name in _unfrozen(shapes, spec.freeze))
    if spec.adapter is None:
        return sum(map(prod, shapes.values()))
    linear = _linear(shapes)
    targets = spec.adapter.target_modules
    if targets != ["All"]:
        linear = [n for n in linear if any(f".{n.removesuffix('.weight')}".endswith(f".{t}") for t in targets)]
    return sum(spec.adapter.rank * sum(shapes[name]) for name in linear)


def _linear(shapes: Shapes) -> list[str]:
    """The weights of the language model's linear layers: adapters are put on these."""
    matrices = (n for n, shape in shapes.items() if len(shape) == 2 and n.endswith(".weight"))
    return [n for n in matrices if not _NO_LAYER.search(n) and vision.part_of(n) is None]


def _quantisable(shapes: Shapes) -> list[str]:
    """Those of them that are linear layers in memory too: transformers fuses a mixture's experts, which stay as they are."""
    return [name for name in _linear(shapes) if ".experts." not in name]


def _unfrozen(shapes: Shapes, chosen: LaunchFreeze) -> Iterator[str]:
    layers = {name: int(found[1]) for name in shapes if (found := _LAYER.search(name))}
    first, end = max(layers.values(), default=-1) + 1 - chosen.trainable_layers, -chosen.trainable_layers
    for name in shapes:
        parts = name.split(".")
        wanted = chosen.trainable_modules if name in layers else chosen.extra_modules
        inside = name not in layers or (layers[name] < end if end > 0 else layers[name] >= first)
        if inside and (wanted == ["All"] or any(part in wanted for part in parts)):
            yield name


def needed(shapes: Shapes, spec: LaunchSpec) -> Needed:
    """What one rank must at least hold; the formula is the module's.

    Args:
        shapes: of the model's weights.
        spec: the launch: method, precision, optimizer, stage, offloading and number of ranks.
    """
    stage, ranks = int(spec.deepspeed.zero_stage), spec.world_size
    precision, trained = spec.training.precision, num_trained(shapes, spec)
    size = 4 if precision is Precision.FP32 else 2
    weights = float(size * sum(map(prod, shapes.values())))
    if spec.quantization is not None:
        weights -= (size - spec.quantization.bits / 8) * sum(prod(shapes[name]) for name in _quantisable(shapes))
    masters = trains_masters(spec)  # float32 themselves
    if spec.adapter is not None:
        weights += (4 if masters else size) * trained
    gradients = float((4 if masters else size) * trained)
    master = 4 if copies_masters(spec) else 0
    state = 2 if precision is Precision.PURE_BF16 else 4
    optimizer = trained * (master + _MOMENTS.get(spec.training.optimizer, 0.0) * state)
    optimizer /= ranks if zero_stage(spec) >= 1 else 1
    gradients /= ranks if stage >= 2 else 1
    weights /= ranks if stage == 3 else 1
    host = 0.0
    if spec.deepspeed.offload_optimizer is Offload.CPU:
        host, gradients, optimizer = host + optimizer, 0.0, 0.0
    if spec.deepspeed.offload_parameters is Offload.CPU:
        host, weights = host + weights, 0.0
    return Needed(weights, gradients, optimizer, host)


def _node_host(need: Needed, spec: LaunchSpec, *, cuda: bool) -> float:
    """Bytes of a node's memory. On CPUs ranks map the same files, so whole weights are there once."""
    if cuda:
        return need.host * spec.num_proc_per_node
    copies = spec.num_proc_per_node if spec.deepspeed.zero_stage == 3 else 1
    return need.weights * copies + (need.gradients + need.optimizer + need.host) * spec.num_proc_per_node


def _fits(need: Needed, spec: LaunchSpec, there: Capacity) -> bool:
    on_host = _node_host(need, spec, cuda=there.gpu is not None) <= there.host
    return on_host and (there.gpu is None or need.device <= there.gpu)


def obstacle(shapes: Shapes, spec: LaunchSpec, there: Capacity) -> str | None:
    """Why a job cannot fit, with what would; None if it may."""
    need = needed(shapes, spec)
    if _fits(need, spec, there):
        return None
    total, trained = sum(map(prod, shapes.values())), num_trained(shapes, spec)
    parts = f"weights {_gib(need.weights)}, gradients {_gib(need.gradients)}, optimizer {_gib(need.optimizer)}"
    facts = [
        f"{total / 1e9:.2f} billion parameters, {trained / 1e9:.2f} billion of them trained, cannot fit on "
        f"{say_ranks(spec.world_size)}"
    ]
    if there.gpu is not None and need.device > there.gpu:
        facts.append(
            f"each needs at least {_gib(need.device)} GiB ({parts}), activations not counted, and its GPU has "
            f"{_gib(there.gpu)} GiB"
        )
    else:
        node = _node_host(need, spec, cuda=there.gpu is not None)
        what = f"a rank's {parts}, activations not counted" if there.gpu is None else "what is offloaded"
        facts.append(
            f"a node with {spec.num_proc_per_node} of them needs at least {_gib(node)} GiB of memory ({what}), and this one "
            f"has {_gib(there.host)} GiB"
        )
    return f"model.uri: {spec.model.uri}: {'; '.join(facts)}. {_remedy(shapes, spec, there)}"


def _remedy(shapes: Shapes, spec: LaunchSpec, there: Capacity) -> str:
    def first(kind: Kind) -> list[str]:
        return [fit for words, other in kind if (fit := _if_it_fits(words, shapes, other, there))][:1]

    same = first(_stages(spec)) or [*first(_offloaded(spec)), *first(_more_nodes(spec))]
    fitting = [*same, *first(_adapters(spec)), *first(_quantised(spec))]
    if not fitting:
        return "No setting makes it fit: use more or larger machines, or a smaller model"
    return f"By the same count these fit: {'; or '.join(fitting)}"


def _if_it_fits(words: str, shapes: Shapes, spec: LaunchSpec, there: Capacity) -> str | None:
    """The words with what is then needed; None if it would not fit, or is refused."""
    need = needed(shapes, spec)
    if check(combination(spec)) is not None or not _fits(need, spec, there):
        return None
    node = _node_host(need, spec, cuda=there.gpu is not None)
    places = [f"{_gib(need.device)} GiB of each GPU"] if there.gpu is not None else []
    places += [f"{_gib(node)} GiB of a node's memory"] if node else []
    return f"{words} ({' and '.join(places)})"


Kind = list[tuple[str, LaunchSpec]]
"""Other ways to run a job and the words for them, the one that changes least first."""


def _stages(spec: LaunchSpec) -> Kind:
    stages = range(spec.deepspeed.zero_stage + 1, 4) if spec.world_size > 1 else ()
    return [(f"`deepspeed.zeroStage: {stage}`", _partitioned(spec, stage)) for stage in stages]


def _offloaded(spec: LaunchSpec) -> Kind:
    words, cpu = "`deepspeed: {zeroStage: 3, offloadOptimizer: CPU", Offload.CPU
    return [
        (f"{words}}}`", _partitioned(spec, 3, offload_optimizer=cpu)),
        (f"{words}, offloadParameters: CPU}}`", _partitioned(spec, 3, offload_optimizer=cpu, offload_parameters=cpu)),
    ]


def _more_nodes(spec: LaunchSpec) -> Kind:
    whole = _partitioned(spec, 3)
    return [
        (f"`trainer.numNodes: {n}` with `deepspeed.zeroStage: 3`", whole.model_copy(update={"num_nodes": n}))
        for n in range(spec.num_nodes + 1, _MOST_NODES + 1)
    ]


def _lora(spec: LaunchSpec) -> LaunchSpec:
    return spec.model_copy(update={"method": Method.LORA, "adapter": spec.adapter or _ADAPTER, "freeze": None})


def _adapters(spec: LaunchSpec) -> Kind:
    if spec.adapter is not None:
        return []
    lora = _lora(spec)
    return [("`method: LoRA`", lora), ("`method: LoRA` with `deepspeed.zeroStage: 3`", _partitioned(lora, 3))]


def _quantised(spec: LaunchSpec) -> Kind:
    if spec.quantization is not None:
        return []
    four = {"method": Method.QLORA, "quantization": LaunchQuantization(bits=4, double_quantization=True)}
    lora = _partitioned(_lora(spec), 0)
    return [("`method: QLoRA` with `deepspeed.zeroStage: 0`", lora.model_copy(update=four))]


def _partitioned(spec: LaunchSpec, stage: int, **offloaded: Offload) -> LaunchSpec:
    """The job with another ZeRO stage; what it offloads is what is said here."""
    nothing = {"offload_optimizer": Offload.NONE, "offload_parameters": Offload.NONE}
    update = {"zero_stage": ZeroStage(stage), **nothing, **offloaded}
    return spec.model_copy(update={"deepspeed": spec.deepspeed.model_copy(update=update)})


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def check_memory(shapes: Shapes, spec: LaunchSpec, device: torch.device) -> None:
    """Refuses a job that cannot fit on this node.

    Args:
        shapes: of the model's weights; none: nothing is known.
        spec: the launch.
        device: of this rank.

    Raises:
        ConfigError: with what is needed, what there is, and what would fit.
    """
    gpu = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    reason = obstacle(shapes, spec, Capacity(gpu, host_memory()))
    if reason is not None:
        raise ConfigError(reason)
    need = needed(shapes, spec)
    log.info(
        "memory: a rank needs at least %.2f GiB (weights %.2f, gradients %.2f, optimizer %.2f) and %.2f GiB of offloaded state, "
        "activations not counted",
        *(size / GIB for size in (need.device, need.weights, need.gradients, need.optimizer, need.host)),
    )


def host_memory() -> int:
    """Bytes that this container may use: its limit, or the machine's memory."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, memory_limit() or machine)
