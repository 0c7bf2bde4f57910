"""A rank's part of the training state, cut out of the parts that another number of ranks wrote. Knows files, not engines.

DeepSpeed lays the numbers of each kind (masters, each moment) out as blocks and cuts every block into pieces of one length, one a
rank; the last pieces are padded. A rank has its pieces one after the other, in one or more tensors ("partitions"); how many
pieces share one may depend on the number of ranks. So a part is taken for one long vector, and only the numbers that this rank
needs are read from each file.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

MASTER = "master"


class ReshardError(ValueError):
    """This state cannot be cut elsewhere; the message says why."""


@dataclass(frozen=True)
class Span:
    """Numbers of one block that stand together in an old part and in the new one."""

    rank: int
    """Whose old part."""
    start: int
    """First position in it."""
    count: int
    at: int
    """First position in the new part."""


@dataclass(frozen=True)
class Layout:
    """How state is spread over ranks, whatever their number."""

    blocks: tuple[int, ...]
    """Numbers in each: parameter groups with ZeRO 1 and 2, single parameters with ZeRO-3."""
    multiple: int = 1
    """A piece's length is a multiple of it."""

    def pieces(self, num_ranks: int) -> list[int]:
        """Length of each block's pieces, padding included; a rank's part is as long as their sum."""
        return [-(-numel // (num_ranks * self.multiple)) * self.multiple for numel in self.blocks]

    def spans(self, rank: int, num_ranks: int, num_old_ranks: int) -> Iterator[Span]:
        """Where the numbers of a rank's part stood when there were `num_old_ranks`; what no span covers is padding."""
        old_start = start = 0
        for numel, old, new in zip(self.blocks, self.pieces(num_old_ranks), self.pieces(num_ranks), strict=True):
            first = here = rank * new
            end = min(first + new, numel)
            while here < end:
                source, offset = divmod(here, old)
                count = min(end - here, old - offset)
                yield Span(source, old_start + offset, count, start + here - first)
                here += count
            old_start, start = old_start + old, start + new


def read_part(
    files: Sequence[Path], layout: Layout, sizes: Sequence[int], rank: int, num_ranks: int
) -> dict[str, torch.Tensor]:
    """This rank's state, as `optimizer_state.capture` would give it.

    Args:
        files: the old parts, in the order of their ranks.
        layout: how the state is spread.
        sizes: the length of each of this rank's partitions.
        rank: this one.
        num_ranks: today's number.

    Returns:
        `<partition>.<name>`: tensors of the shape `[sizes[partition]]`, and single values, such as `step`, that are the same in
        all partitions of all ranks.

    Raises:
        ReshardError: the parts cannot be cut like this.
    """
    with ExitStack() as stack:
        parts = [stack.enter_context(safe_open(file, "pt")) for file in files]
        first = {key: parts[0].get_slice(key) for key in parts[0].keys()}  # noqa: SIM118 (it is no dictionary)
        old_sizes = _partition_sizes(first)
        if sum(old_sizes) != sum(layout.pieces(len(files))) or sum(sizes) != sum(layout.pieces(num_ranks)):
            raise ReshardError("it is spread over the ranks in a way that is not known here")
        old_starts = list(accumulate(old_sizes, initial=0))
        state: dict[str, torch.Tensor] = {}
        for name in [key.removeprefix("0.") for key in first if key.startswith("0.")]:
            values = first[f"0.{name}"]
            if _is_single(values):
                new = [parts[0].get_tensor(f"0.{name}").clone() for _ in sizes]  # an optimizer counts up in place
            else:
                vector = torch.zeros(sum(sizes), dtype=values[:0].dtype)
                for span in layout.spans(rank, num_ranks, len(files)):
                    index = bisect_right(old_starts, span.start) - 1
                    at = span.start - old_starts[index]
                    found = parts[span.rank].get_slice(f"{index}.{name}")[at : at + span.count]
                    vector[span.at : span.at + span.count] = found
                new = list(torch.split(vector, list(sizes)))
            state |= {f"{index}.{name}": tensor for index, tensor in enumerate(new)}
        return state


def _partition_sizes(tensors: dict[str, Any]) -> list[int]:
    """The lengths of an old part's partitions, which are the same for all of its ranks.

    Raises:
        ReshardError: a tensor has neither one value nor one for each weight, such as the scales of an 8-bit state.
    """
    masters = sum(key.endswith(f".{MASTER}") for key in tensors)
    sizes: list[int] = [tensors[f"{index}.{MASTER}"].get_shape()[0] for index in range(masters)]
    for key, values in tensors.items():
        index, name = key.split(".")
        if not _is_single(values) and values.get_shape() != [sizes[int(index)]]:
            raise ReshardError(f"the optimizer's `{name}` does not have one value for each weight")
    return sizes


def _is_single(values: Any) -> bool:
    return not values.get_shape() or bool(values.get_dtype() == "I64")
