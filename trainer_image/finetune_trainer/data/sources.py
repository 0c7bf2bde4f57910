"""Which files a data set consists of. Owns the layouts of folders, plain ones and those of `save_to_disk`, and splits' names."""

import json
import re
from pathlib import Path
from typing import Any

from finetune_trainer.errors import ConfigError, DataError, reading

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
ALLOWED = (
    "a `.jsonl`, `.json`, `.csv`, `.parquet` or `.arrow` file, a folder of them, "
    "or one that Hugging Face's `save_to_disk` wrote"
)
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""Lies beside the records in repositories and saved data sets, and holds none."""
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""By which Hugging Face's `datasets` tells the splits of files."""
_SHARD = re.compile(r"-\d+-of-\d+.*")
_NUMBER = re.compile(r"[-_.]\d+$")


def data_files(path: Path, uri: str, split: str | None) -> list[Path]:
    """The files of a data set, in the order in which their records count.

    Args:
        path: a file, a folder of files (taken in the order of their names), or a folder of `save_to_disk`.
        uri: as the user wrote it, for messages.
        split: of a saved `DatasetDict`: its name. Of a folder of files: only those that are its own by their names, see
            `_of_split`.

    Raises:
        DataError: nothing is there, or a saved data set lacks a file.
        ConfigError: `split` does not fit what is there.
        StorageError: the volume fails.
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
    return [path / name for name in _of_split([f.relative_to(path) for f in files], split, uri)]


def _of_split(names: list[Path], split: str, uri: str) -> list[Path]:
    """The files of a split, by the first of these rules that finds any.

    1. The split is the name, but for endings and numbers, or that of a folder: `train_sft-00000-of-00003.parquet`,
       `train_sft/a.jsonl`.
    2. It is a word of the name or of a folder's: `dolly_train.jsonl`. Shards of different names are different splits.
    3. As 2, with the other words that Hugging Face has for the split.
    4. All are of `train` where no name has a word of any split.

    Raises:
        ConfigError: there are none, or they are of several splits.
    """
    paths = {name: str(name.with_suffix("")) for name in names}
    chosen = [name for name in names if split in (name.stem, _stem(name), *name.parts[:-1])]
    stems: set[str] = set()
    if not chosen:
        chosen = [name for name in names if _has(paths[name], split)]
        stems = {_stem(name) for name in chosen if _SHARD.search(name.stem) and _has(_stem(name), split)}
    chosen = chosen or [name for name in names if any(_has(paths[name], word) for word in _WORDS.get(split, ()))]
    if not chosen and split == "train" and not any(map(_kinds, paths.values())):
        return names
    if not chosen:
        some = ", ".join(f"`{name}`" for name in names[:5])
        raise ConfigError(f"datasets.split: no file of {uri} has `{split}` in its name; there are {some}")
    known = {} if _kinds(split) else {_kinds(own): own for name in chosen if (own := _known(name))}
    if len(stems) > 1 or len(known) > 1:
        several = ", ".join(f"`{name}`" for name in sorted(stems or known.values())[:5])
        raise ConfigError(
            f"datasets.split: `{split}` fits several splits of {uri}: {several}; set `split` to one of them"
        )
    return chosen


def _stem(name: Path) -> str:
    """The name without what numbers the parts of a split: `train-00000-of-00002`, `train-1`."""
    return _NUMBER.sub("", _SHARD.sub("", name.stem))


def _has(path: str, word: str) -> bool:
    """Whether it is a word of a path. Digits end one, unless the word has some: `train2` has `train`."""
    edge = "A-Za-z" if word.isalpha() else "A-Za-z0-9"
    return re.search(rf"(?<![{edge}]){re.escape(word)}(?![{edge}])", path) is not None


def _known(name: Path) -> str:
    """The innermost name of a file and its folders that has a split's word; empty if none has."""
    return next((part for part in (_stem(name), *reversed(name.parts[:-1])) if _kinds(part)), "")


def _kinds(path: str) -> frozenset[str]:
    """The splits whose words are in a path."""
    return frozenset(kind for kind, words in _WORDS.items() if any(_has(path, word) for word in words))


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
        with reading("datasets", file):
            value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file} ({uri}): cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{file} ({uri}): broken JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{file} ({uri}): must be a JSON object")
    return value
