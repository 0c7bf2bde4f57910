"""Rows as tensors. Owns padding, positions and the shift of labels.

No attention mask is ever passed: attention is causal and padding stands at the end of a row, where no real token sees it. In
packed rows the positions start again at every sample, and transformers keeps the samples apart by them, but only when no 2-D
mask is given and the cache is off.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from finetune_trainer.data.images import Image, ImageInput
from finetune_trainer.data.packing import SampleRows
from finetune_trainer.data.store import Ints, TokenStore

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the host; every tensor has the shape (rows, tokens) and dtype int64."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    """The next token where it is a target, else -100: already shifted, so that no label crosses a sample's end."""
    position_ids: torch.Tensor | None
    """Only for packed rows."""
    num_samples: int
    num_tokens: int
    """Without padding."""
    num_targets: int
    sequence_lengths: Ints
    """Lengths of the sequences that the rows consist of, row after row; together they cover every token. Padding is cut into
    sequences of its own, none longer than the longest real one, so that it costs little where attention knows of lengths."""
    pixel_values: torch.Tensor | None = None
    """float32, (images, channels, height, width), in the order of their tokens; None where no vision tower is asked."""
    image_places: torch.Tensor | None = None
    """Where image tokens are in the flattened rows; with `pixel_values`."""

    @cached_property
    def keep(self) -> torch.Tensor:
        """Positions that some row learns from, found on the host: asking the device would wait for it.

        Never empty: an empty row takes part so that the collectives of all ranks match.
        """
        found = np.flatnonzero((self.labels.numpy() != IGNORE).any(axis=0))
        return torch.from_numpy(found if len(found) else np.zeros(1, dtype=np.int64))


@dataclass(frozen=True)
class Rows:
    """The rows of one data set."""

    store: TokenStore
    samples: SampleRows
    """Sample indices of each row."""
    packed: bool
    pad_to: int = 1
    """Rows are padded to a multiple of so many tokens: compiled code and CUDA's allocator want few shapes."""
    image: ImageInput | None = None
    """None for a model that does not see."""

    def __len__(self) -> int:
        return len(self.samples)

    def targets_in(self, rows: Sequence[int | None]) -> int:
        """Target tokens of some rows; None is an empty row."""
        return sum(int(self.row_targets[row]) for row in rows if row is not None)

    @cached_property
    def row_targets(self) -> Ints:
        """Target tokens of each row."""
        return self.samples.sums(self.store.target_counts)

    @cached_property
    def row_lengths(self) -> Ints:
        """Tokens of each row."""
        return self.samples.sums(self.store.lengths)

    def batch(self, rows: Sequence[int | None]) -> Batch:
        """Collates rows, padded to the longest (and to `pad_to`); an empty row is one padding token.

        Args:
            rows: row numbers; None for an empty row.

        Raises:
            DataError: an image cannot be decoded.
        """
        samples = [() if row is None else self.samples[row] for row in rows]
        offsets = self.store.offsets
        lengths = [[int(offsets[s + 1] - offsets[s]) for s in row] for row in samples]
        width = max(1, *(sum(row) for row in lengths))
        width = -(-width // self.pad_to) * self.pad_to
        longest = max((length for row in lengths for length in row), default=1)
        sequences: list[int] = []
        ids = np.zeros((len(rows), width), dtype=np.int64)
        labels = np.full((len(rows), width), IGNORE, dtype=np.int64)
        positions = np.zeros((len(rows), width), dtype=np.int64)
        num_tokens = 0
        for line, row in enumerate(samples):
            at = 0
            for sample in row:
                start = int(offsets[sample])
                length = int(offsets[sample + 1]) - start
                tokens = self.store.ids[start : start + length]
                ids[line, at : at + length] = tokens
                targets = self.store.targets[start + 1 : start + length]
                labels[line, at : at + length - 1] = np.where(targets, tokens[1:], IGNORE)
                positions[line, at : at + length] = np.arange(length)
                at += length
                sequences.append(length)
            positions[line, at:] = np.arange(width - at)
            sequences.extend(min(longest, width - start) for start in range(at, width, longest))
            num_tokens += at
        pixels, places = self._images(ids, samples)
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(labels),
            torch.from_numpy(positions) if self.packed else None,
            num_samples=sum(len(row) for row in samples),
            num_tokens=num_tokens,
            num_targets=int((labels != IGNORE).sum()),
            sequence_lengths=np.array(sequences, dtype=np.int64),
            pixel_values=pixels,
            image_places=places,
        )

    def _images(
        self, ids: Ints, samples: Sequence[Sequence[int] | Ints]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.image is None:
            return None, None
        assert self.store.images is not None
        images: list[Image] = [
            image for row in samples for sample in row for image in self.store.images.of(int(sample))
        ]
        pixels = self.image.pixels(images)
        if pixels is None:
            return None, None
        places = np.flatnonzero(ids == self.image.token)
        assert len(places) == len(images) * self.image.tokens_per_image
        return torch.from_numpy(pixels), torch.from_numpy(places)
