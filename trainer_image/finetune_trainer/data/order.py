"""The order of rows: a pure function of (seed, epoch, position), whatever the number of ranks.

Rows form one endless stream, epoch after epoch; optimizer step k (from 1) takes positions [(k-1)·G, k·G) of it, G being the
global batch size. A rank takes its slice of them, and nothing about the order has to be saved. That holds for data sets that
are mixed by weight and for rows grouped by length, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.store import Ints

_U64 = npt.NDArray[np.uint64]


def _mix(values: _U64) -> _U64:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014); wraps around by design."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def hash64(*parts: int) -> int:
    """A 64-bit hash of integers, for seeds; the same on every machine and with every version of every library."""
    state = np.array([0x9E3779B97F4A7C15], dtype=np.uint64)
    for part in parts:
        state = _mix(state + np.uint64(part & 0xFFFFFFFFFFFFFFFF) + np.uint64(0x9E3779B97F4A7C15))
    return int(state[0])


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> Ints:
    """A permutation of `size` rows. NumPy's own generators may change between versions; sorting hashes does not."""
    with np.errstate(over="ignore"):
        keys = _mix(np.arange(size, dtype=np.uint64) + np.uint64(hash64(seed, epoch)))
    return np.argsort(keys, kind="stable")


def shares(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Rows that an epoch takes from each data set: the total by weight, rounded by largest remainders.

    Args:
        sizes: rows of each data set; their sum is the rows of an epoch.
        weights: relative shares, each above 0.
    """
    total = sum(sizes)
    exact = [total * weight / sum(weights) for weight in weights]
    taken = [int(value) for value in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (taken[i] - exact[i], i))
    for index in by_remainder[: total - sum(taken)]:
        taken[index] += 1
    return taken


@dataclass(frozen=True)
class Mixture:
    """Data sets whose rows follow each other in the store, and how many rows an epoch takes from each.

    The rows of one data set form an endless stream of their own, pass after pass, each pass a permutation of its own; epoch e
    takes the e-th stretch of it. So over many epochs every row of a data set comes equally often (but for one), whether an
    epoch has room for a part of them or for all of them several times.
    """

    sizes: tuple[int, ...]
    taken: tuple[int, ...]
    """With the same sum as `sizes`."""

    def rows(self, seed: int, epoch: int) -> Ints:
        """The rows of an epoch, one data set after the other."""
        parts, first = [], 0
        for index, (size, taken) in enumerate(zip(self.sizes, self.taken, strict=True)):
            own_seed = hash64(seed, index)
            begin, end = epoch * taken, (epoch + 1) * taken
            for number in range(begin // size, -(-end // size)):
                start = number * size
                part = permutation(own_seed, number, size)[max(begin - start, 0) : end - start]
                parts.append(first + part)
            first += size
        return np.concatenate(parts)


GROUPED_STEPS = 50
"""`groupByLength` sorts the rows of so many steps: enough for hardly any padding, and the rest stays random."""


@dataclass(frozen=True)
class RowOrder:
    """The stream of row numbers of one job."""

    num_rows: int
    seed: int
    global_batch_size: int
    epochs: int | None
    """None: as many as the steps take."""
    max_steps: int | None
    mixture: Mixture | None = None
    """None: every row once an epoch."""
    lengths: Ints | None = field(default=None, repr=False, compare=False)
    """Tokens of each row, to group rows of similar length; None: purely random."""
    _epochs: dict[int, Ints] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The newest epochs' orders: a step may reach into two."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the job; the last one of the last epoch may hold fewer rows."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.epochs is not None
        return -(-self.epochs * self.num_rows // self.global_batch_size)

    def epoch_after(self, step: int) -> float:
        """Passes over the data done after `step` steps."""
        passes = step * self.global_batch_size / self.num_rows
        return passes if self.epochs is None else min(passes, float(self.epochs))

    def rows(self, step: int) -> list[int | None]:
        """The rows of one step, in order; None where the last epoch has ended.

        Args:
            step: from 1.
        """
        first = (step - 1) * self.global_batch_size
        end = None if self.epochs is None else self.epochs * self.num_rows
        return [
            None if end is not None and position >= end else self._row(position)
            for position in range(first, first + self.global_batch_size)
        ]

    def epoch(self, number: int) -> Ints:
        """All rows of an epoch, in order; a pure function of the seed and the number (from 0)."""
        if number not in self._epochs:
            for old in sorted(self._epochs)[:-1]:
                del self._epochs[old]
            rows = permutation(self.seed, number, self.num_rows)
            if self.mixture is not None:
                rows = self.mixture.rows(self.seed, number)[rows]
            self._epochs[number] = rows if self.lengths is None else self._grouped(rows, self.lengths, number)
        return self._epochs[number]

    def _row(self, position: int) -> int:
        number, index = divmod(position, self.num_rows)
        return int(self.epoch(number)[index])

    def _grouped(self, rows: Ints, lengths: Ints, number: int) -> Ints:
        """Sorts the rows of every `GROUPED_STEPS` steps by length and shuffles the steps again.

        Where the epoch does not begin with a step, its first rows share one with the epoch before: they are a group of their own,
        so that all others are whole steps.
        """
        size = self.global_batch_size
        first = -number * self.num_rows % size
        head, body = rows[:first], rows[first:]
        blocks: list[Ints] = []
        for start in range(0, len(body), size * GROUPED_STEPS):
            part = body[start : start + size * GROUPED_STEPS]
            part = part[np.argsort(-lengths[part], kind="stable")]
            blocks += [part[at : at + size] for at in range(0, len(part), size)]
        whole = len(body) // size
        steps = permutation(hash64(self.seed, GROUPED_STEPS), number, whole)
        shuffled = [blocks[index] for index in steps.tolist()] + blocks[whole:]
        return np.concatenate([head[np.argsort(-lengths[head], kind="stable")], *shuffled])
