"""Tokenised data kept between attempts and jobs. Owns what makes two tokenisations the same, and the folder of one.

An entry is a folder named after everything that it depends on, written beside its place and renamed into it, so it is whole
or not there. One process of all pods builds it at a time.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from finetune_api.launch import LaunchDataset
from finetune_api.spec import Overlong
from finetune_trainer.data.chat_templates import written_date
from finetune_trainer.data.sources import data_files
from finetune_trainer.data.store import TokenStore, build_store, read_meta
from finetune_trainer.data.tokenize import Encoder
from finetune_trainer.files import fsync_path, sha256_file
from finetune_trainer.hub import locked

VERSION = 3
"""Of this package's reading, rendering, masking and cutting. A change that gives other tokens needs another number."""
UNUSED_SECONDS = 90 * 86400
"""An attempt maps its entry for as long as it trains, and a file that is gone from a network volume cannot be read on."""
_LIBRARIES = ("transformers", "tokenizers", "jinja2")
log = logging.getLogger("finetune_trainer")


def cache_key(
    datasets: Sequence[tuple[LaunchDataset, Path]],
    encoder: Encoder,
    max_length: int,
    overlong: Overlong,
    beat: Callable[[], None],
) -> str:
    """SHA-256 of everything that the tokens depend on: files, formats, tokenizer, template, lengths, versions.

    Files are told by their content: a copy with another date is the same, and a file that was changed in place is not. That
    costs one reading of them.

    Raises:
        DataError: there are no files.
    """
    tokenizer = encoder.tokenizer
    state: dict[str, object] = {
        "version": VERSION,
        "libraries": {name: version(name) for name in _LIBRARIES},
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "tokens": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "template": tokenizer.chat_template,
        "train_on_prompt": encoder.train_on_prompt,
        "mask_history": encoder.mask_history,
        "max_length": max_length,
        "overlong": overlong,
        "datasets": [_identity(dataset, path, beat) for dataset, path in datasets],
    }
    if (day := written_date(tokenizer)) is not None:
        state["date"] = day
    if encoder.image is not None:  # images are not in the cache: an entry has their places
        state["image"] = [encoder.image.token, encoder.image.tokens_per_image]
        state["folders"] = [str(path.resolve()) for _, path in datasets]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _identity(dataset: LaunchDataset, path: Path, beat: Callable[[], None]) -> dict[str, object]:
    chosen = dataset.model_dump(mode="json", include={"uri", "format", "max_samples", "columns", "tags"})
    files = data_files(path, dataset.uri, dataset.split)
    return {**chosen, "files": [[file.suffix, sha256_file(file, beat)] for file in files]}


def cached_store(
    cache_dir: Path,
    fallback: Path,
    datasets: Sequence[tuple[LaunchDataset, Path]],
    encoder: Encoder,
    max_length: int,
    overlong: Overlong,
    beat: Callable[[], None],
) -> Path:
    """The folder of the tokenised data sets, built if it is not in the cache or is damaged there.

    Args:
        cache_dir: shared by pods and jobs.
        fallback: a folder of this pod, used where the cache cannot be.
        datasets: each with the local path of its files.
        encoder: of the model's tokenizer.
        max_length: tokens of the longest sample.
        overlong: what becomes of longer samples.
        beat: called now and then, as a sign of life.

    Raises:
        DataError: a record is wrong, or no sample of a data set is usable.
        ConfigError: the tokenizer does not fit the data.
    """
    key = cache_key(datasets, encoder, max_length, overlong, beat)
    folder, lock = cache_dir / "tokens" / key, cache_dir / "locks" / f"tokens-{key}.lock"

    def build(place: Path) -> None:
        build_store(datasets, encoder, max_length, beat, overlong=overlong, folder=place)

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock):
            if _is_whole(folder, beat):
                log.info("tokenised data: taken from the cache, %s", folder)
                return folder
            _forget_unused(cache_dir, besides=lock)
            _add(folder, build)
            return folder
    except OSError as error:
        with suppress(OSError):  # locks that nodes do not see of each other let two build the same
            if _is_whole(folder, beat):
                return folder
        log.warning("%s cannot be used (%s): data is tokenised for this attempt only", cache_dir, error)
    build(fallback)
    return fallback


def _add(folder: Path, build: Callable[[Path], None]) -> None:
    """Builds an entry in the place of a damaged one, if there is one; the caller has its lock."""
    if folder.exists():
        shutil.rmtree(folder)
    for rest in folder.parent.glob(f".{folder.name}.*"):  # of a builder that was killed
        shutil.rmtree(rest, ignore_errors=True)
    temporary = folder.parent / f".{folder.name}.{socket.gethostname()}-{os.getpid()}"
    try:
        build(temporary)
        for file in temporary.iterdir():
            fsync_path(file)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(folder.parent)


def _forget_unused(cache_dir: Path, besides: Path) -> None:
    """Deletes the entries that no attempt has begun with for long. A lock is as old as its entry's last use.

    Args:
        cache_dir: shared by pods and jobs.
        besides: the lock that this process holds, which closing the file would release.
    """
    for path in (cache_dir / "locks").glob("tokens-*.lock"):
        if path == besides:
            continue
        with suppress(OSError), path.open("r+") as file:
            # Raises where it is in use, as `open` where it is another user's.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            entry = cache_dir / "tokens" / path.stem.removeprefix("tokens-")
            if time.time() - path.stat().st_mtime > UNUSED_SECONDS and entry.exists():
                shutil.rmtree(entry, ignore_errors=True)
                log.info("tokenised data: %s was not used for %d days and is deleted", entry, UNUSED_SECONDS // 86400)


def _is_whole(folder: Path, beat: Callable[[], None]) -> bool:
    """Whether the cache has the entry, as it was written.

    Raises:
        OSError: the volume does not give it, which is no damage: another attempt may be training on it.
    """
    if not folder.exists():
        return False
    beat()
    try:
        store = TokenStore.load(folder)
        if store.digest() == read_meta(folder)["digest"] and _counted(store):
            return True
        error = "its SHA-256 is not the one that was written"
    except (FileNotFoundError, ValueError) as caught:
        error = str(caught)
    log.warning("tokenised data: %s in the cache is damaged (%s); it is built again", folder, error)
    return False


def _counted(store: TokenStore) -> bool:
    """The counts are no part of the digest, so they are held against what they count."""
    again = replace(store, counts=None)
    return bool((store.target_counts == again.target_counts).all())
