"""Tokenised samples as flat arrays. Owns reading a job's data sets into them, and their form on disk.

The first rank of a node tokenises and writes the arrays to the pod's scratch folder; the others map the same pages.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune_api.launch import LaunchDataset
from finetune_api.spec import DatasetFormat
from finetune_trainer.data.formats import Sample, detect, to_sample
from finetune_trainer.data.records import Record, read_records
from finetune_trainer.data.tokenize import Encoder, Tokens
from finetune_trainer.errors import DataError

CHUNK_SAMPLES = 1000
log = logging.getLogger("finetune_trainer")
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenStore:
    """Samples one after the other."""

    ids: npt.NDArray[np.int32]
    """All tokens, shape (tokens,)."""
    targets: npt.NDArray[np.bool_]
    """Which of them are targets, shape (tokens,). A sample's first token is never one: nothing predicts it."""
    offsets: Ints
    """Where each sample begins, and the end; shape (samples + 1,)."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Ints:
        """Tokens of each sample."""
        return np.diff(self.offsets)

    @property
    def target_counts(self) -> Ints:
        """Target tokens of each sample."""
        sums = np.concatenate([[0], np.cumsum(self.targets, dtype=np.int64)])
        counts: Ints = sums[self.offsets[1:]] - sums[self.offsets[:-1]]
        return counts

    def digest(self) -> str:
        """SHA-256 of everything: the data's identity, whatever files it came from."""
        sha = hashlib.sha256()
        for array in (self.ids, self.targets, self.offsets):
            sha.update(np.ascontiguousarray(array).view(np.uint8).data)
        return sha.hexdigest()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("ids", "targets", "offsets"):
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> "TokenStore":
        """Maps a saved store; its pages are shared by all ranks of the node."""
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "targets", "offsets")))


def build_store(
    datasets: Sequence[tuple[LaunchDataset, Path]],
    encoder: Encoder,
    max_length: int,
    beat: Callable[[], None],
) -> TokenStore:
    """Reads and tokenises data sets, in their order.

    Args:
        datasets: each with the local path of its files.
        encoder: of the model's tokenizer.
        max_length: longer samples lose their end.
        beat: called now and then, as a sign of life.

    Raises:
        DataError: a record is wrong, or no sample of a data set is usable.
        ConfigError: the tokenizer does not fit the data.
    """
    kept: list[Tokens] = []
    for dataset, path in datasets:
        before, read, long = len(kept), 0, 0
        samples = _samples(dataset, path)
        while chunk := list(islice(samples, CHUNK_SAMPLES)):
            for tokens in encoder.encode(chunk):
                read += 1
                long += len(tokens.ids) > max_length
                cut = Tokens(tokens.ids[:max_length], tokens.targets[:max_length])
                if any(cut.targets[1:]):
                    kept.append(cut)
            beat()
        usable = len(kept) - before
        if read == 0:
            raise DataError(f"{path} ({dataset.uri}): the data set has no record")
        if usable == 0:
            raise DataError(
                f"{path} ({dataset.uri}): no usable sample: {read} of {read} have no target token within the first "
                f"training.maxLength = {max_length} tokens ({long} of them are longer)"
            )
        log.info("%s: %d samples, %d truncated, %d without a target left out", dataset.uri, usable, long, read - usable)
    return _pack_arrays(kept)


def _samples(dataset: LaunchDataset, path: Path) -> Iterator[Sample]:
    form = dataset.format
    records: Iterator[Record] = islice(read_records(path, dataset.uri), dataset.max_samples)
    for record in records:
        if form is DatasetFormat.AUTO:
            form = detect(record)
        yield to_sample(record, form)


def _pack_arrays(samples: list[Tokens]) -> TokenStore:
    offsets = np.zeros(len(samples) + 1, dtype=np.int64)
    np.cumsum([len(s.ids) for s in samples], out=offsets[1:])
    ids = np.empty(offsets[-1], dtype=np.int32)
    targets = np.empty(offsets[-1], dtype=np.bool_)
    for sample, start, end in zip(samples, offsets[:-1], offsets[1:], strict=True):
        ids[start:end] = sample.ids
        targets[start:end] = sample.targets
        targets[start] = False
    return TokenStore(ids, targets, offsets)
