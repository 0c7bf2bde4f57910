"""A key-value cache with room to grow: transformers' own is copied for every token."""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

ROOM_TOKENS = 64
"""So many more tokens find room before a layer is copied again."""


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """`keys` and `values` are the used parts of larger tensors."""

    keys: torch.Tensor
    values: torch.Tensor
    rooms: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the new tokens' keys and values and returns all of them."""
        length, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if self.rooms is None or self.rooms[0].shape[-2] < end:
            self.rooms = (_larger(self.keys, end), _larger(self.values, end))
        for room, new in zip(self.rooms, (key_states, value_states), strict=True):
            room[..., length:end, :] = new
        self.keys, self.values = (room[..., :end, :] for room in self.rooms)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps only some rows."""
        super().batch_select_indices(indices)
        self.rooms = None


def _larger(held: torch.Tensor, end: int) -> torch.Tensor:
    room = held.new_empty(*held.shape[:-2], end + ROOM_TOKENS, held.shape[-1])
    room[..., : held.shape[-2], :] = held
    return room


def give_room(cache: Any) -> None:
    """Changes the class of a cache's plain layers, once they hold the prompt; others, such as sliding windows, stay."""
    for layer in getattr(cache, "layers", ()):
        if type(layer) is DynamicLayer:
            layer.__class__ = RoomyLayer
