"""Reads records from the files of a data set. Owns their places: every record knows its file and line or row.

Plain JSON and pyarrow, not the datasets library: its readers tell neither the line of broken JSON nor of a wrong record,
and importing it takes seconds.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from finetune_trainer.data.sources import data_files
from finetune_trainer.data.tables import Row, arrow_rows, csv_rows, parquet_rows
from finetune_trainer.errors import DataError, reading


class Record(NamedTuple):
    value: dict[str, Any]
    place: str
    """`file:line`, `file: record N` or `file: row N`, counted from 1."""
    folder: Path = Path()
    """Of the file: paths in the record begin there."""
    of_table: bool = False
    """Its objects have the keys that any row's have, null where this row's have none."""


def read_records(path: Path, uri: str, split: str | None = None) -> Iterator[Record]:
    """All records of a data set, a few at a time (but for `.json`, whose list is read whole).

    Args:
        path: file or folder, see `sources.data_files`.
        uri: as the user wrote it, for messages.
        split: see `sources.data_files`.

    Raises:
        DataError: nothing is there, or something that is not a record.
        ConfigError: `split` does not fit what is there.
        StorageError: the volume fails.
    """
    for file in data_files(path, uri, split):
        try:
            with reading("datasets", file):
                yield from _READERS[file.suffix](file)
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error


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
            yield Record(_checked(value, place), place, file.parent)


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
        yield Record(_checked(value, place), place, file.parent)


def _table(rows: Callable[[Path], Iterator[Row]]) -> Callable[[Path], Iterator[Record]]:
    def read(file: Path) -> Iterator[Record]:
        for number, value in rows(file):
            yield Record(value, f"{file}: row {number}", file.parent, of_table=True)

    return read


def _checked(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: must be a JSON object, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _table(csv_rows),
    ".parquet": _table(parquet_rows),
    ".arrow": _table(arrow_rows),
}
