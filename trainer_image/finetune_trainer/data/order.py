"""The order of rows: a pure function of (seed, epoch, position), whatever the number of ranks.

Rows form one endless stream, epoch after epoch; optimizer step k (from 1) takes positions [(k-1)·G, k·G) of it, G being the
global batch size. A rank takes its slice of them, and nothing about the order has to be saved.
"""

from dataclasses import dataclass
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


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, size: int) -> Ints:
    """A permutation of `size` rows. NumPy's own generators may change between versions; sorting hashes does not."""
    with np.errstate(over="ignore"):
        keys = _mix(np.arange(size, dtype=np.uint64) + np.uint64(hash64(seed, epoch)))
    return np.argsort(keys, kind="stable")


@dataclass(frozen=True)
class RowOrder:
    """The stream of row numbers of one job."""

    num_rows: int
    seed: int
    global_batch_size: int
    epochs: int | None
    """None: as many as the steps take."""
    max_steps: int | None

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

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, self.num_rows)
        return int(permutation(self.seed, epoch, self.num_rows)[index])
