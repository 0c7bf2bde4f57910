"""A model's weights, streamed into safetensors files: no rank ever holds more of the whole model than one layer.

Owns which tensors the files of a whole model hold, under which names, and their split into shards. The names are those of the
folder that the model was loaded from: where transformers renamed or fused weights at loading, that is undone.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_trainer.adapters import unwrap
from finetune_trainer.errors import ConfigError
from finetune_trainer.files import write_json
from finetune_trainer.tensor_file import Kind, TensorFile
from finetune_trainer.weights import FILE, INDEX

ADAPTER = "default"
_LAYER = re.compile(r"^(.+?\.\d+)\.")


@dataclass(frozen=True)
class Source:
    """One tensor of the model in memory."""

    parameters: list[Any]
    """What has to be whole to compute it."""
    kind: Kind
    make: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """Tensors of the files that are made at one time."""

    sources: dict[str, Source]
    kinds: dict[str, Kind]
    """Under the names of the files."""


@contextlib.contextmanager
def whole(parameters: list[Any]) -> Iterator[None]:
    """Puts partitioned parameters (ZeRO-3) together for a while; all ranks enter it."""
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            yield
    else:
        yield


def check_mergeable(model: Any) -> None:
    """Refuses, before anything is trained, adapters that cannot be merged.

    Raises:
        ConfigError: an adapter sits on a weight that another layer shares, which has no adapter, or on what is not known here.
    """
    if unknown := [name for name in sources_of(model) if ".base_layer." in name or ".lora_" in name]:
        raise ConfigError(f"output.mergeAdapter: the adapter on {unknown[0]} cannot be merged; leave it out")
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for names in owners.values():
        if len(names) > 1 and any(".base_layer." in name for name in names):
            raise ConfigError(
                f"output.mergeAdapter: {' and '.join(names)} are one weight, and merging would change both; take it out of "
                "`adapter.targetModules`"
            )


def sources_of(model: Any) -> dict[str, Source]:
    """Every tensor of a transformers model, with its adapters merged in where it has some, by its name in the model."""
    base = unwrap(model)
    layers = {name: module for name, module in base.named_modules() if hasattr(module, "get_delta_weight")}
    sources = {}
    for name, parameter in base.named_parameters():
        owner = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        if owner is None:
            sources[name] = Source([parameter], _kind(parameter), parameter.detach)
        elif name == f"{owner}.base_layer.weight":
            parts = list(layers[owner].parameters())
            sources[f"{owner}.weight"] = Source(parts, _kind(parameter), lambda layer=layers[owner]: _merged(layer))  # type: ignore[misc]
        elif name.startswith(f"{owner}.base_layer.") and ".lora_" not in name:
            plain, kind = name.replace(".base_layer", ""), _kind(parameter)
            adapter = _of_parameter(layers, owner, plain.rpartition(".")[2])
            if adapter is None:
                sources[plain] = Source([parameter], kind, parameter.detach)
            else:
                parts = [parameter, *(p for n, p in adapter.named_parameters() if n.startswith("lora_"))]
                sources[plain] = Source(parts, kind, lambda p=parameter, a=adapter: _added(p, a))  # type: ignore[misc]
    saved = base.state_dict().keys()
    for name, buffer in base.named_buffers():
        if name in saved:
            sources[name] = Source([], _kind(buffer), buffer.detach)
    ignored = set(base._keys_to_ignore_on_save or ())
    return {name: source for name, source in sources.items() if name not in ignored}


def _kind(tensor: Any) -> Kind:
    return Kind(tensor.dtype, tuple(getattr(tensor, "ds_shape", tensor.shape)))


def _of_parameter(layers: dict[str, Any], owner: str, parameter: str) -> Any:
    """The adapter on a parameter that is no module's weight (fused experts). Those of one module are around each other."""
    around = (layer for name, layer in layers.items() if name == owner or name.startswith(f"{owner}.base_layer"))
    return next((layer for layer in around if getattr(layer, "parameter_name", None) == parameter), None)


def _added(parameter: torch.Tensor, adapter: Any) -> torch.Tensor:
    delta: torch.Tensor = adapter.get_delta_weight(ADAPTER).to(parameter.dtype)
    return (parameter + delta).detach()


def _merged(layer: Any) -> torch.Tensor:
    """What peft's own merge computes, without touching the layer."""
    weight = layer.get_base_layer().weight.detach()
    merged: torch.Tensor
    if (variant := layer.lora_variant.get(ADAPTER)) is not None:  # DoRA
        merged = variant.merge_safe(layer, ADAPTER, weight.clone())
    else:
        merged = weight + layer.get_delta_weight(ADAPTER).to(weight.dtype)
    return merged.detach()


def plan_pieces(model: Any) -> list[Piece]:
    """What is made one after the other: single tensors, or whole layers where transformers has fused weights of a layer."""
    base = unwrap(model)
    sources = sources_of(model)
    converted = _file_names(base, {name: source.kind for name, source in sources.items()})
    groups: dict[str, dict[str, Source]] = {}
    for name, source in sources.items():
        layer = None if converted.keys() == sources.keys() else _LAYER.match(name)
        groups.setdefault(layer[1] if layer else name, {})[name] = source
    pieces = [Piece(group, _file_names(base, {n: s.kind for n, s in group.items()})) for group in groups.values()]
    made = {name: kind for piece in pieces for name, kind in piece.kinds.items()}
    assert made == converted, "transformers fuses weights of different layers"
    return pieces


def _file_names(model: Any, kinds: dict[str, Kind]) -> dict[str, Kind]:
    tensors = {name: torch.empty(kind.shape, dtype=kind.dtype, device="meta") for name, kind in kinds.items()}
    return {name: Kind.of(tensor) for name, tensor in _original_format(model, tensors).items()}


def _original_format(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    converted: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    return converted


def write_model(model: Any, folder: Path, max_shard_bytes: int, *, first: bool) -> None:
    """Writes `model.safetensors`, or shards and their index; all ranks call it, rank 0 writes.

    Raises:
        OSError: on rank 0, after all ranks have done their part.
    """
    base = unwrap(model)
    pieces = plan_pieces(model)
    shards = Shards(folder, {n: k for piece in pieces for n, k in piece.kinds.items()}, max_shard_bytes)
    failure: OSError | None = None
    for piece in pieces:
        tensors = {}
        for name, source in piece.sources.items():
            with whole(source.parameters):
                if first and failure is None:
                    tensors[name] = source.make().to("cpu", copy=bool(source.parameters))
        try:
            for name, tensor in _original_format(base, tensors).items() if tensors else ():
                shards.write(name, tensor)
        except OSError as error:  # the other ranks still wait for this one's share of the next parameter
            failure = error
    if failure is not None:
        raise failure
    if first:
        shards.finish()


class Shards:
    """The files of one model, each at most so large unless a single tensor is larger."""

    def __init__(self, folder: Path, kinds: dict[str, Kind], max_bytes: int) -> None:
        self._folder, self._kinds = folder, kinds
        parts: list[dict[str, Kind]] = [{}]
        size = 0
        for name, kind in kinds.items():
            if parts[-1] and size + kind.size_bytes > max_bytes:
                parts.append({})
                size = 0
            parts[-1][name] = kind
            size += kind.size_bytes
        count = len(parts)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else FILE for i in range(count)]
        self._parts = dict(zip(names, parts, strict=True))
        self._file_of = {name: file for file, part in self._parts.items() for name in part}
        self._open: dict[str, TensorFile] = {}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = TensorFile(self._folder / file, self._parts[file])
        self._open[file].write(name, tensor)
        if self._open[file].complete:
            self._open.pop(file).close()

    def finish(self) -> None:
        """Writes the index, if there is more than one file."""
        assert not self._open
        if len(self._parts) == 1:
            return
        total = {
            "total_parameters": sum(kind.num_values for kind in self._kinds.values()),
            "total_size": sum(kind.size_bytes for kind in self._kinds.values()),
        }
        write_json(self._folder / INDEX, {"metadata": total, "weight_map": self._file_of})
