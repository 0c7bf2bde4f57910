"""What a forward pass gets, made on the host from a batch: the model's arguments and the targets.

Everything that depends on the data's values (which positions are learned from, where sequences begin) is worked out here,
where it costs no wait for the device.
"""

from dataclasses import dataclass
from typing import Any

import torch

from finetune_trainer.attention import layout_arguments
from finetune_trainer.data.batches import Batch


@dataclass(frozen=True)
class Inputs:
    arguments: dict[str, Any]
    """Keyword arguments of the model."""
    targets: torch.Tensor
    """(rows, kept positions); -100 where a row does not learn from the position."""

    def pinned(self) -> "Inputs":
        """A copy in page-locked memory, from which a transfer does not hold up the host."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "Inputs":
        """A copy on the device; itself on the CPU."""
        return self if device.type == "cpu" else self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, move: Any) -> "Inputs":
        done: dict[int, torch.Tensor] = {}  # what is one tensor stays one: kernels compare boundaries by identity

        def once(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) not in done:
                done[id(value)] = move(value)
            return done[id(value)]

        return Inputs({name: once(value) for name, value in self.arguments.items()}, once(self.targets))


def inputs_of(batch: Batch, *, by_layout: bool) -> Inputs:
    """The inputs of a batch, on the host.

    Args:
        batch: the batch.
        by_layout: whether attention is told where sequences begin (see `attention.Choice`).
    """
    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False, "logits_to_keep": batch.keep}
    if batch.position_ids is not None:
        arguments["position_ids"] = batch.position_ids
    if batch.pixel_values is not None:
        arguments |= {"pixel_values": batch.pixel_values, "image_places": batch.image_places}
    if by_layout:
        arguments |= layout_arguments(batch.sequence_lengths)
    return Inputs(arguments, batch.labels[:, batch.keep])
