"""Reads rows of Parquet, Arrow and CSV files, a few at a time. Owns what is in memory meanwhile: never a whole file."""

import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finetune_trainer.errors import DataError

ROWS = 1024
"""Rows that are Python objects at once; row groups and record batches may hold millions."""
_IPC_FILE_MAGIC = b"ARROW1"

Row = tuple[int, dict[str, Any]]
"""Number of the row in its file, from 1, and its columns."""


def parquet_rows(file: Path) -> Iterator[Row]:
    """Rows of a Parquet file.

    Raises:
        DataError: it is broken.
    """
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    yield from _numbered(file, "Parquet", lambda: pq.ParquetFile(file).iter_batches(batch_size=ROWS))


def arrow_rows(file: Path) -> Iterator[Row]:
    """Rows of an Arrow IPC file or stream (`datasets` writes streams); the file is mapped, not read.

    Raises:
        DataError: it is broken.
    """
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        with pa.memory_map(str(file)) as source:
            if bytes(source.read(len(_IPC_FILE_MAGIC))) == _IPC_FILE_MAGIC:
                reader = pa.ipc.open_file(source)
                yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                source.seek(0)
                yield from pa.ipc.open_stream(source)

    yield from _numbered(file, "Arrow", batches)


def _numbered(file: Path, kind: str, batches: Callable[[], Iterator[Any]]) -> Iterator[Row]:
    import pyarrow as pa

    number = 0
    try:
        for batch in batches():
            for start in range(0, batch.num_rows, ROWS):
                for value in batch.slice(start, ROWS).to_pylist():
                    number += 1
                    yield number, value
    except pa.ArrowException as error:
        after = f" after row {number}" if number else ""
        raise DataError(f"{file}: broken {kind}{after}: {error}") from error


def csv_rows(file: Path) -> Iterator[Row]:
    """Rows of a CSV file whose first line names the columns; every value is text.

    Raises:
        DataError: it is no UTF-8 text, has no header, or a row has another number of fields.
    """
    csv.field_size_limit(sys.maxsize)  # a text may be longer than the 131,072 characters of the default
    number = 0
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            if len(set(header)) != len(header):
                raise DataError(f"{file}: the first line names a column twice: {', '.join(header)}")
            for fields in reader:
                if not fields:
                    continue
                number += 1
                if len(fields) != len(header):
                    raise DataError(
                        f"{file}: row {number} has {len(fields)} fields and the first line names {len(header)} columns; "
                        'texts with commas or line breaks stand in double quotes, and a quote in them is written `""`'
                    )
                yield number, dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise DataError(f"{file}: row {number + 1}: broken CSV (line {reader.line_num}): {error}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 text after row {number}: {error.reason}") from error
