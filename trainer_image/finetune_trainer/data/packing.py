"""Which samples share a row. Packing is done once, not once an epoch: rows are then shuffled like samples."""

from bisect import bisect_left, insort

import numpy as np

from finetune_trainer.data.store import Ints


def single_rows(num_samples: int) -> list[Ints]:
    """Without packing each sample is a row of its own."""
    return [np.array([index]) for index in range(num_samples)]


def pack_rows(lengths: Ints, max_length: int) -> list[Ints]:
    """Best-fit decreasing: each sample goes into the fullest row that still has room.

    Args:
        lengths: tokens of each sample, each at most `max_length`.
        max_length: tokens of a row.

    Returns:
        Rows of sample indices; every sample is in exactly one row. A pure function of its arguments.
    """
    order = np.argsort(-lengths, kind="stable")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for sample in order.tolist():
        length = int(lengths[sample])
        at = bisect_left(room, (length, -1))
        if at < len(room):
            left, row = room.pop(at)
            rows[row].append(sample)
        else:
            left, row = max_length, len(rows)
            rows.append([sample])
        if left - length > 0:
            insort(room, (left - length, row))
    return [np.array(row) for row in rows]
