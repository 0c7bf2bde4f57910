"""Writes safetensors files tensor by tensor: names and shapes come first, values when they are at hand.

`safetensors.torch.save_file` wants all tensors in memory at once, and its file has to be read again for its SHA-256. Here one
tensor is enough, the hash comes with the writing, and every chunk is a sign of progress. Python's lock is free meanwhile.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

CHUNK_BYTES = 1 << 22
FLUSH_BYTES = 1 << 30
"""So much is handed to the disk at a time: the last fsync is short, and a container's memory is not full of unwritten pages."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Kind:
    """What a tensor is before it has values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Kind":
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.dtype.itemsize * self.num_values


class TensorFile:
    """One safetensors file that is being written.

    Args:
        path: the file; an old one is replaced.
        kinds: every tensor that the file will hold.
        progress: is told of every chunk's size.
    """

    def __init__(self, path: Path, kinds: Mapping[str, Kind], progress: Callable[[int], None] = lambda _size: None):
        self._kinds, self._progress = dict(kinds), progress
        # The widest numbers first, as safetensors itself does: each tensor is then aligned to its own width in a mapped file.
        self.names = sorted(kinds, key=lambda name: (-kinds[name].dtype.itemsize, name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._offsets, end = {}, 0
        for name in self.names:
            start, end = end, end + kinds[name].size_bytes
            self._offsets[name] = start
            header[name] = {
                "dtype": DTYPES[kinds[name].dtype],
                "shape": list(kinds[name].shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._missing = set(kinds)
        self._sha, self._hashed, self._unflushed = hashlib.sha256(), 0, 0
        self._file = path.open("wb", buffering=0)
        self._start = 0
        self._put(len(text).to_bytes(8, "little") + text, 0)
        self._start = 8 + len(text)
        self.size_bytes = self._start + end

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, _value: object, _trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()

    @property
    def complete(self) -> bool:
        """Whether every tensor has been written."""
        return not self._missing

    def close(self) -> None:
        """Flushes the file to the disk and closes it."""
        try:
            assert self.complete, f"never written: {sorted(self._missing)[:3]}"
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    @property
    def sha256(self) -> str:
        """SHA-256 of the file; only if the tensors were written in the order of `names`."""
        assert self._hashed == self.size_bytes
        return self._sha.hexdigest()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Puts one tensor's values, on whatever device they are, at their place; any order will do."""
        assert Kind.of(tensor) == self._kinds[name], name
        self._missing.remove(name)
        if tensor.numel():
            flat = tensor.detach().to("cpu").contiguous().reshape(-1)
            self._put(flat.view(torch.uint8).numpy().data, self._start + self._offsets[name])

    def _put(self, data: bytes | memoryview, at: int) -> None:
        self._file.seek(at)
        view = memoryview(data)
        for chunk_at in range(0, len(view), CHUNK_BYTES):
            chunk = view[chunk_at : chunk_at + CHUNK_BYTES]
            if at + chunk_at == self._hashed:
                self._sha.update(chunk)
                self._hashed += len(chunk)
            rest = chunk
            while rest:
                rest = rest[self._file.write(rest) :]
            self._unflushed += len(chunk)
            if self._unflushed >= FLUSH_BYTES:
                os.fdatasync(self._file.fileno())
                self._unflushed = 0
            self._progress(len(chunk))


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], progress: Callable[[int], None] = lambda _size: None
) -> dict[str, Any]:
    """Writes a whole file, flushed to the disk, and describes it for a manifest: `sha256` and `size_bytes`."""
    kinds = {name: Kind.of(tensor) for name, tensor in tensors.items()}
    with TensorFile(path, kinds, progress) as file:
        for name in file.names:
            file.write(name, tensors[name])
    return {"sha256": file.sha256, "size_bytes": file.size_bytes}
