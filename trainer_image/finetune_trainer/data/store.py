"""Tokenised samples as flat arrays. Owns reading a job's data sets into them, and their form on disk.

The first rank of a node writes them sample after sample into files; all ranks map the same pages. So neither building nor
using them takes memory for more than a thousand samples.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_api.launch import LaunchDataset
from finetune_api.spec import DatasetFormat, Overlong
from finetune_trainer.data import images
from finetune_trainer.data.formats import Sample, detect, to_sample
from finetune_trainer.data.images import Image, ImageTable, ImageWriter
from finetune_trainer.data.layout import Layout, layout_of
from finetune_trainer.data.lengths import Piece, fit
from finetune_trainer.data.records import read_records
from finetune_trainer.data.tokenize import Encoder
from finetune_trainer.errors import DataError

CHUNK_SAMPLES = 1000
HASH_BYTES = 1 << 26
COUNTED_TOKENS = 1 << 22
META_FILE = "store.json"
_ARRAYS: dict[str, type[np.generic]] = {"ids": np.int32, "targets": np.bool_, "offsets": np.int64, "counts": np.int64}
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
    counts: Ints | None = None
    """Target tokens of each sample, shape (samples,), so that nobody has to read all targets for them; None: not counted yet."""
    images: ImageTable | None = None
    """None for a model that does not see."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Ints:
        """Tokens of each sample."""
        return np.diff(self.offsets)

    @property
    def target_counts(self) -> Ints:
        """Target tokens of each sample (no sample is empty)."""
        if self.counts is not None:
            return self.counts
        counts = np.zeros(len(self), dtype=np.int64)
        first = 0
        while first < len(self):  # in stretches, since `reduceat` makes eight bytes of each target
            end = int(np.searchsorted(self.offsets, self.offsets[first] + COUNTED_TOKENS, side="right")) - 1
            end = max(end, first + 1)
            begin = self.offsets[first:end] - self.offsets[first]
            part = self.targets[self.offsets[first] : self.offsets[end]]
            counts[first:end] = np.add.reduceat(part, begin, dtype=np.int64)
            first = end
        return counts

    def digest(self) -> str:
        """SHA-256 of tokens, targets, offsets and images: the data's identity, whatever files it came from."""
        sha = hashlib.sha256()
        for array in (self.ids, self.targets, self.offsets):
            data = np.ascontiguousarray(array).view(np.uint8)
            for at in range(0, len(data), HASH_BYTES):
                sha.update(data[at : at + HASH_BYTES].data)
        if self.images is not None:
            self.images.add_to(sha, HASH_BYTES)
        return sha.hexdigest()

    @classmethod
    def load(cls, folder: Path) -> "TokenStore":
        """Maps a saved store; its pages are shared by all ranks of the node.

        Raises:
            ValueError: a file has not the size that the store's description says.
            OSError: a file cannot be read.
        """
        entries = read_meta(folder)["entries"]
        arrays = [_mapped(folder, name, kind, entries[name]) for name, kind in _ARRAYS.items()]
        if not entries.keys() & images.ARRAYS.keys():
            return cls(*arrays)
        of_images = [_mapped(folder, name, kind, entries[name]) for name, kind in images.ARRAYS.items()]
        return replace(cls(*arrays), images=ImageTable.of_arrays(of_images))


def _mapped(folder: Path, name: str, kind: type[np.generic], entries: int) -> Any:
    file = folder / f"{name}.bin"
    empty = file.stat().st_size == 0  # cannot be mapped
    array = np.zeros(0, dtype=kind) if empty else np.memmap(file, dtype=kind, mode="r")
    if len(array) != entries:
        raise ValueError(f"{name}.bin has {len(array)} entries instead of {entries}")
    return array


@dataclass
class DatasetReport:
    """What became of one data set's records."""

    uri: str
    read: int = 0
    """Records."""
    conversations: int = 0
    """Of these; the others are texts."""
    used: int = 0
    """Records of which something is left."""
    samples: int = 0
    """Samples that came of them: more than `used` where long ones were split."""
    truncated: int = 0
    dropped: int = 0
    """Too long (`overlong: Drop`)."""
    image_cut: int = 0
    """Left out since too long to keep all of its images whole."""
    split: int = 0
    no_target: int = 0
    """Left out since nothing in them is a target (any more)."""
    tokens: int = 0
    """In the samples that are used."""
    targets: int = 0
    tokens_lost: int = 0
    """Of the records read, tokens that are in no sample."""
    images: int = 0
    """In the samples that are used."""


def read_meta(folder: Path) -> dict[str, Any]:
    """The description of a saved store: `entries` of each array, `digest`, `reports`.

    Raises:
        ValueError: it is no JSON object of that form.
        OSError: it cannot be read.
    """
    meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    if not isinstance(meta, dict) or not all(key in meta for key in ("entries", "digest", "reports")):
        raise ValueError(f"{META_FILE} is incomplete")
    return meta


class StoreWriter:
    """Appends samples to the files of a store."""

    def __init__(self, folder: Path, *, sees: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._stack = ExitStack()
        self._files = {name: self._stack.enter_context((folder / f"{name}.bin").open("wb")) for name in _ARRAYS}
        self._images = ImageWriter(folder, self._stack) if sees else None
        self._end = 0
        self._files["offsets"].write(np.zeros(1, dtype=np.int64).tobytes())

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, piece: Piece, of_sample: Sequence[Image] = ()) -> bool:
        """Appends a sample with its images if any of it is a target; a sample's first token is none."""
        targets = piece.targets.copy()
        targets[:1] = False
        if not targets.any():
            return False
        self._end += len(piece.ids)
        self._files["ids"].write(piece.ids.astype(np.int32, copy=False).tobytes())
        self._files["targets"].write(targets.tobytes())
        self._files["offsets"].write(np.array([self._end], dtype=np.int64).tobytes())
        self._files["counts"].write(np.array([targets.sum()], dtype=np.int64).tobytes())
        if self._images is not None:
            self._images.add(of_sample)
        return True


def build_store(
    datasets: Sequence[tuple[LaunchDataset, Path]],
    encoder: Encoder,
    max_length: int,
    beat: Callable[[], None],
    *,
    overlong: Overlong = Overlong.TRUNCATE,
    folder: Path | None = None,
) -> TokenStore:
    """Reads and tokenises data sets, in their order.

    Args:
        datasets: each with the local path of its files.
        encoder: of the model's tokenizer.
        max_length: tokens of the longest sample.
        beat: called now and then, as a sign of life.
        overlong: what becomes of longer samples.
        folder: receives the files; absent: they are unlinked at once, and gone with the store.

    Raises:
        DataError: a record is wrong, or no sample of a data set is usable.
        ConfigError: the tokenizer does not fit the data.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="finetune-store-") as temporary:
            return build_store(datasets, encoder, max_length, beat, overlong=overlong, folder=Path(temporary))
    reports = []
    sees = encoder.image is not None
    with StoreWriter(folder, sees=sees) as writer:
        for dataset, path in datasets:
            report = _add_dataset(writer, dataset, path, encoder, max_length, overlong, beat)
            _check_usable(report, path, max_length)
            reports.append(asdict(report))
    kinds = _ARRAYS | (images.ARRAYS if sees else {})
    entries = {name: (folder / f"{name}.bin").stat().st_size // np.dtype(kind).itemsize for name, kind in kinds.items()}
    meta = {"entries": entries, "digest": "", "reports": reports}
    (folder / META_FILE).write_text(json.dumps(meta), encoding="utf-8")
    store = TokenStore.load(folder)
    meta["digest"] = store.digest()
    (folder / META_FILE).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return store


def _add_dataset(
    writer: StoreWriter,
    dataset: LaunchDataset,
    path: Path,
    encoder: Encoder,
    max_length: int,
    overlong: Overlong,
    beat: Callable[[], None],
) -> DatasetReport:
    report = DatasetReport(dataset.uri)
    samples = _samples(dataset, path)
    bos = encoder.tokenizer.bos_token_id
    image_token = encoder.image.token if encoder.image else None
    while chunk := list(islice(samples, CHUNK_SAMPLES)):
        for sample, tokens in zip(chunk, encoder.encode(chunk), strict=True):
            pieces = fit(
                tokens, max_length, overlong, bos=bos, last_first=encoder.mask_history, image_token=image_token
            )
            kept = [piece for piece in pieces if writer.add(piece, sample.images)]
            long, whole = len(tokens.ids) > max_length, sum(len(piece.ids) - piece.repeated for piece in kept)
            report.read += 1
            report.conversations += sample.messages is not None
            report.used += bool(kept)
            report.samples += len(kept)
            report.dropped += not pieces and overlong is Overlong.DROP
            report.image_cut += not pieces and overlong is not Overlong.DROP
            report.no_target += bool(pieces) and not kept
            report.truncated += long and bool(pieces) and overlong in (Overlong.TRUNCATE, Overlong.TRUNCATE_SHARE)
            report.split += long and bool(pieces) and overlong is Overlong.SPLIT
            report.images += len(sample.images) if kept else 0
            report.tokens += sum(len(piece.ids) for piece in kept)
            report.targets += sum(int(piece.targets[1:].sum()) for piece in kept)
            report.tokens_lost += len(tokens.ids) - whole
        beat()
    return report


def _check_usable(report: DatasetReport, path: Path, max_length: int) -> None:
    if report.read == 0:
        raise DataError(f"{path} ({report.uri}): the data set has no record")
    if report.used == 0:
        long = report.truncated + report.split + report.dropped
        why = (
            f"{report.read} of {report.read} have no target token within the first "
            f"training.maxLength = {max_length} tokens ({long} of them are longer)"
        )
        if report.dropped:
            why = f"{report.dropped} of {report.read} are longer than training.maxLength = {max_length} tokens and dropped"
        elif report.image_cut:
            why = (
                f"{report.image_cut} of {report.read} are longer than training.maxLength = {max_length} tokens and would lose "
                "an image, or a part of one"
            )
        raise DataError(f"{path} ({report.uri}): no usable sample: {why}")


def _samples(dataset: LaunchDataset, path: Path) -> Iterator[Sample]:
    layout: Layout | None = None
    if dataset.format is not DatasetFormat.AUTO:
        layout = layout_of(dataset.format, dataset.columns, dataset.tags)
    for record in islice(read_records(path, dataset.uri, dataset.split), dataset.max_samples):
        if layout is None:
            layout = detect(record, dataset.columns)
        yield to_sample(record, layout)
