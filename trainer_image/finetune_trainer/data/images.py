"""Images of samples: what a record says of them, where the tokenised data keeps that, and their pixels once a batch wants them.

Only the place of an image, or the bytes of its file, is kept; it is decoded when a batch is built. How many tokens it takes is
known without: in LLaVA-1.5 all images take the same number.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.unicode import valid
from finetune_trainer.errors import DataError, reading

PLACEHOLDER = "<image>"
"""Stands in a turn where an image belongs."""
ARRAYS: dict[str, type[np.generic]] = {
    "image_ends": np.int64,
    "image_index": np.int64,
    "image_sources": np.uint8,
    "image_places": np.uint8,
}
_INDEX_COLUMNS = 3
"""Of each image: its end in `image_sources`, its end in `image_places`, whether the source is the file's bytes."""
_DEEP_MODES = ("I", "F")
"""Of PIL, with `I;16` and its like: they would be clipped at 255 and become white."""
Floats = npt.NDArray[np.float32]


class Image(NamedTuple):
    """One image of a record."""

    source: str | bytes
    """A path as the record has it, or the bytes of an image file."""
    folder: str
    """Where a relative path begins."""
    place: str
    """The record, for messages."""

    @property
    def path(self) -> Path | None:
        """None if the record has the image itself."""
        return None if isinstance(self.source, bytes) else Path(self.folder) / self.source

    def decode(self, process: Callable[[Any], Floats]) -> Floats:
        """Its pixels.

        Args:
            process: makes them of a PIL image.

        Raises:
            DataError: it cannot be read or decoded, or has more than 8 bits per channel.
            StorageError: the volume fails.
        """
        import PIL.Image

        name = self.path or "its bytes"
        try:
            with (
                reading("datasets", Path(name)),
                PIL.Image.open(io.BytesIO(self.source) if isinstance(self.source, bytes) else name) as image,
            ):
                if image.mode.startswith(_DEEP_MODES):
                    raise DataError(
                        f"{self.place}: the image {name} has mode {image.mode}, more than 8 bits per channel; convert it to "
                        "8 bits per channel"
                    )
                return process(image)
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
            raise DataError(f"{self.place}: the image {name} cannot be decoded: {error}") from error


def read_images(value: Any, key: str, place: str, folder: Path) -> tuple[Image, ...]:
    """The images of a record.

    Args:
        value: of the record's column: one image, a list of them, or nothing. An image is a path, bytes, or an object with `bytes`
            or `path`, as Hugging Face's data sets have it.
        key: the column's name, for messages.
        place: of the record, for messages.
        folder: of the data file.

    Raises:
        DataError: it is something else, or no file is there.
    """
    if value is None or value == "":
        return ()
    values = value if isinstance(value, list) else [value]
    return tuple(_image(one, f"{key}[{number}]", place, folder) for number, one in enumerate(values))


def _image(value: Any, at: str, place: str, folder: Path) -> Image:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes) or not value:
        raise DataError(
            f"{place}: `{at}` must be a path, the bytes of an image file, or an object with `bytes` or `path`, "
            f"got {type(value).__name__}"
        )
    image = Image(valid(value, place, at), str(folder), place)
    if image.path is not None and not image.path.is_file():
        raise DataError(f"{place}: `{at}`: there is no file {image.path}; a path begins at the data file's folder")
    return image


@dataclass(frozen=True)
class ImageTable:
    """The images of all samples, one after the other."""

    ends: npt.NDArray[np.int64]
    """Images up to each sample, with its own; shape (samples,)."""
    index: npt.NDArray[np.int64]
    """See `_INDEX_COLUMNS`; shape (images, 3)."""
    sources: npt.NDArray[np.uint8]
    places: npt.NDArray[np.uint8]

    @classmethod
    def of_arrays(cls, arrays: Sequence[npt.NDArray[Any]]) -> "ImageTable":
        ends, index, sources, places = arrays
        return cls(ends, index.reshape(-1, _INDEX_COLUMNS), sources, places)

    def of(self, sample: int) -> list[Image]:
        """The images of one sample, in the order of their tokens."""
        first = int(self.ends[sample - 1]) if sample else 0
        return [self[number] for number in range(first, int(self.ends[sample]))]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Image:
        begin = self.index[number - 1] if number else np.zeros(_INDEX_COLUMNS, dtype=np.int64)
        end = self.index[number]
        source = self.sources[begin[0] : end[0]].tobytes()
        folder, place = self.places[begin[1] : end[1]].tobytes().decode().split("\n", 1)
        return Image(source if end[2] else source.decode(), folder, place)

    def add_to(self, sha: "hashlib._Hash", hash_bytes: int) -> None:
        """Adds to the data's identity what the records say, not where they lie."""
        for array in (self.ends, np.ascontiguousarray(self.index[:, ::2]), self.sources):
            data = array.reshape(-1).view(np.uint8)
            for at in range(0, len(data), hash_bytes):
                sha.update(data[at : at + hash_bytes].data)


class ImageWriter:
    """Appends the images of samples to files."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in ARRAYS}
        self._num_images = self._source_end = self._place_end = 0

    def add(self, images: Sequence[Image]) -> None:
        """Appends the images of the next sample."""
        for image in images:
            embedded = isinstance(image.source, bytes)
            source = image.source if isinstance(image.source, bytes) else image.source.encode()
            place = f"{image.folder}\n{image.place}".encode()
            self._source_end += len(source)
            self._place_end += len(place)
            self._files["image_sources"].write(source)
            self._files["image_places"].write(place)
            row = np.array([self._source_end, self._place_end, embedded], dtype=np.int64)
            self._files["image_index"].write(row.tobytes())
        self._num_images += len(images)
        self._files["image_ends"].write(np.array([self._num_images], dtype=np.int64).tobytes())


@dataclass(frozen=True)
class ImageInput:
    """What a model that sees takes in the place of an image."""

    token: int
    """Stands in the text for each part of an image."""
    tokens_per_image: int
    shape: tuple[int, int, int]
    """Of one image's pixels: (channels, height, width)."""
    process: Callable[[Any], Floats]
    """Makes the pixels of a PIL image."""
    blank: bool
    """Whether a batch without images brings a blank one: where ranks go through the tower together, or its weights get a
    gradient, all of them have to."""

    def pixels(self, images: Sequence[Image]) -> Floats | None:
        """(images, channels, height, width); None where the tower has nothing to do.

        Raises:
            DataError: an image cannot be decoded.
        """
        if images:
            return np.stack([image.decode(self.process) for image in images])
        return np.zeros((1, *self.shape), dtype=np.float32) if self.blank else None
