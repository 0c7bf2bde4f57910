"""Durable and atomic file operations. Owns nothing but the order of write, fsync and rename."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 22


def fsync_path(path: Path) -> None:
    """Flushes a file or a folder's entries to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes, *, durable: bool) -> None:
    """Replaces a file in one step: readers see the old content or the new, never a part.

    Args:
        path: the file; its folder must exist.
        data: the new content.
        durable: also survive a crash of the machine (two fsyncs).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)
    if durable:
        fsync_path(path.parent)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Writes sorted, indented JSON atomically."""
    write_atomic(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode(), durable=durable)


def sha256_file(path: Path, beat: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of a file's content, in hexadecimal; `beat` is called for each chunk, as a sign of life."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha.update(chunk)
            beat()
    return sha.hexdigest()
