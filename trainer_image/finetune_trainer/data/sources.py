"""Which files a data set consists of. Owns the layouts of folders: plain ones, and those of `save_to_disk`."""

import json
import re
from pathlib import Path
from typing import Any

from finetune_trainer.errors import ConfigError, DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
ALLOWED = (
    "a `.jsonl`, `.json`, `.csv`, `.parquet` or `.arrow` file, a folder of them, "
    "or one that Hugging Face's `save_to_disk` wrote"
)
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""Lies beside the records in repositories and saved data sets, and holds none."""


def data_files(path: Path, uri: str, split: str | None) -> list[Path]:
    """The files of a data set, in the order in which their records count.

    Args:
        path: a file, a folder of files (taken in the order of their names), or a folder of `save_to_disk`.
        uri: as the user wrote it, for messages.
        split: of a saved `DatasetDict`: its name. Of a folder of files: only those that have it as a word in their name or
            their folder's, as `train-00000-of-00002.parquet` and `train/a.jsonl` have.

    Raises:
        DataError: nothing is there, or a saved data set lacks a file.
        ConfigError: `split` does not fit what is there.
    """
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path} ({uri}): must be {ALLOWED}")
        if split is not None:
            raise ConfigError(f"datasets.split: {uri} is one file and has no splits; remove `split`, or give a folder")
        return [path]
    if not path.is_dir():
        raise DataError(f"{path} ({uri}): no such file or folder; give {ALLOWED}")
    if (path / "dataset_dict.json").is_file():
        names = _read(path / "dataset_dict.json", uri).get("splits", [])
        return _saved(path / _choose(names, split, uri), uri)
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        own = _read(path / "state.json", uri).get("_split")
        if split is not None and split != own:
            raise ConfigError(
                f"datasets.split: {uri} is a saved data set of split `{own}`, not `{split}`; remove `split`"
            )
        return _saved(path, uri)
    files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.name not in _METADATA and f.is_file())
    if not files:
        raise DataError(f"{path} ({uri}): the folder has no `.jsonl`, `.json`, `.csv`, `.parquet` or `.arrow` file")
    if split is None:
        return files
    chosen = [f for f in files if split in re.split(r"[^A-Za-z0-9]+", str(f.relative_to(path).with_suffix("")))]
    if not chosen:
        some = ", ".join(f"`{f.relative_to(path)}`" for f in files[:5])
        raise ConfigError(f"datasets.split: no file of {uri} has `{split}` in its name; there are {some}")
    return chosen


def _choose(names: list[str], split: str | None, uri: str) -> str:
    if split is None and len(names) == 1:
        return names[0]
    listed = ", ".join(f"`{name}`" for name in names)
    if split is None:
        raise ConfigError(f"datasets.split: {uri} has the splits {listed}; set `split` to one of them")
    if split not in names:
        raise ConfigError(f"datasets.split: {uri} has no split `{split}`; it has {listed}")
    return split


def _saved(folder: Path, uri: str) -> list[Path]:
    """The files of a saved data set in its own order, which is not always that of their names."""
    names = [str(entry["filename"]) for entry in _read(folder / "state.json", uri).get("_data_files", [])]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} ({uri}): the saved data set is incomplete; missing: {', '.join(missing[:5])}")
    if not names:
        raise DataError(f"{folder} ({uri}): the saved data set has no file")
    return [folder / name for name in names]


def _read(file: Path, uri: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file} ({uri}): cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{file} ({uri}): broken JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{file} ({uri}): must be a JSON object")
    return value
