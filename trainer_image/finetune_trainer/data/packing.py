"""Which samples share a row. Packing is done once, not once an epoch: rows are then shuffled like samples."""

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from typing import overload

import numpy as np

from finetune_trainer.data.store import Ints


class SampleRows(Sequence[Ints]):
    """The samples of each row, as two flat arrays: millions of small arrays would cost a hundred bytes each."""

    def __init__(self, samples: Ints, offsets: Ints) -> None:
        """Takes the arrays.

        Args:
            samples: sample indices, row after row.
            offsets: where each row begins in `samples`, and the end; shape (rows + 1,). No row is empty.
        """
        self.samples, self.offsets = samples, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, row: int) -> Ints: ...
    @overload
    def __getitem__(self, row: slice) -> list[Ints]: ...
    def __getitem__(self, row: int | slice) -> Ints | list[Ints]:
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        return self.samples[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[Ints]:
        return (self.samples[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True))

    def sums(self, values: Ints) -> Ints:
        """For each row the sum of its samples' values."""
        if len(self) == 0:
            return np.zeros(0, dtype=np.int64)
        totals: Ints = np.add.reduceat(values[self.samples], self.offsets[:-1], dtype=np.int64)
        return totals


def single_rows(num_samples: int) -> SampleRows:
    """Without packing each sample is a row of its own."""
    return SampleRows(np.arange(num_samples), np.arange(num_samples + 1))


def pack_rows(lengths: Ints, max_length: int) -> SampleRows:
    """Best-fit decreasing: each sample goes into the fullest row that still has room, of equals into the first.

    A million samples take about 3 s: rows stand in a heap for each number of free tokens, and the bits of one integer tell
    which heaps are not empty.

    Args:
        lengths: tokens of each sample, each at most `max_length`.
        max_length: tokens of a row.

    Returns:
        Rows of sample indices; every sample is in exactly one row. A pure function of its arguments.
    """
    order = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(order), dtype=np.int64)
    heaps: dict[int, list[int]] = {}
    free = 0  # bit n: a row has n tokens left
    num_rows = 0
    for at, length in enumerate(lengths[order].tolist()):
        fitting = free >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            heap = heaps[left]
            row = heappop(heap)
            if not heap:
                free ^= 1 << left
        else:
            left, row = max_length, num_rows
            num_rows += 1
        row_of[at] = row
        if left > length:
            heap = heaps.setdefault(left - length, [])
            if not heap:
                free |= 1 << (left - length)
            heappush(heap, row)
    return _by_row(order, row_of, num_rows)


def pack_parts(lengths: Ints, sizes: Sequence[int], max_length: int) -> SampleRows:
    """Packs each data set by itself.

    Args:
        lengths: tokens of each sample.
        sizes: samples of each data set, which follow each other.
        max_length: tokens of a row.

    Returns:
        The rows of all data sets, one data set after the other.
    """
    samples, offsets = [], [np.zeros(1, dtype=np.int64)]
    first = 0
    for size in sizes:
        rows = pack_rows(lengths[first : first + size], max_length)
        samples.append(rows.samples + first)
        offsets.append(rows.offsets[1:] + first)
        first += size
    return SampleRows(np.concatenate(samples), np.concatenate(offsets))


def _by_row(order: Ints, row_of: Ints, num_rows: int) -> SampleRows:
    offsets = np.zeros(num_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of, minlength=num_rows), out=offsets[1:])
    return SampleRows(order[np.argsort(row_of, kind="stable")], offsets)
