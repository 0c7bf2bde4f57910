"""Reads records from .jsonl, .json and .parquet files. Owns their places: every record knows its file and line.

Plain JSON and pyarrow, not the datasets library: its readers tell neither the line of broken JSON nor of a wrong record,
and importing it takes seconds.
"""

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from finetune_trainer.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet")
ALLOWED = "a `.jsonl`, `.json` or `.parquet` file, or a folder of them"


class Record(NamedTuple):
    value: dict[str, Any]
    place: str
    """`file:line`, `file: record N` or `file: row N`, counted from 1."""


def read_records(path: Path, uri: str) -> Iterator[Record]:
    """All records of a file, or of a folder's files in the order of their names.

    Raises:
        DataError: nothing is there, or something that is not a record.
    """
    for file in _files(path, uri):
        try:
            yield from _READERS[file.suffix](file)
        except OSError as error:
            if error.errno in (errno.EIO, errno.ESTALE, errno.ENOTCONN):
                raise  # the volume's fault, not the data's
            raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error


def _files(path: Path, uri: str) -> list[Path]:
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path} ({uri}): must be {ALLOWED}")
        return [path]
    if not path.is_dir():
        raise DataError(f"{path} ({uri}): no such file or folder; give {ALLOWED}")
    files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
    if not files:
        raise DataError(f"{path} ({uri}): the folder has no `.jsonl`, `.json` or `.parquet` file")
    return files


def _jsonl(file: Path) -> Iterator[Record]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = line.removeprefix(b"\xef\xbb\xbf").strip()
            if not text:
                continue
            place = f"{file}:{number}"
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{place}: broken JSON at column {error.colno}: {error.msg}; each line must be one JSON object"
                ) from error
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: not UTF-8 text at byte {error.start}") from error
            yield Record(_checked(value, place), place)


def _json(file: Path) -> Iterator[Record]:
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = "; one object a line is called .jsonl" if error.msg == "Extra data" else ""
        raise DataError(
            f"{file}:{error.lineno}: broken JSON at column {error.colno}: {error.msg}; "
            f"the file must be one list of objects{hint}"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text at byte {error.start}") from error
    if not isinstance(values, list):
        raise DataError(f"{file}: must be a list of objects, got {_kind(values)}")
    for number, value in enumerate(values, start=1):
        place = f"{file}: record {number}"
        yield Record(_checked(value, place), place)


def _parquet(file: Path) -> Iterator[Record]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        table = pq.ParquetFile(file)
    except pa.ArrowException as error:
        raise DataError(f"{file}: broken Parquet: {error}") from error
    number = 0
    try:
        for batch in table.iter_batches():
            for value in batch.to_pylist():
                number += 1
                yield Record(value, f"{file}: row {number}")
    except pa.ArrowException as error:
        raise DataError(f"{file}: broken Parquet after row {number}: {error}") from error


def _checked(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: must be a JSON object, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


_READERS = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
