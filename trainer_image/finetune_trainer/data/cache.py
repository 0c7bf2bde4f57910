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
from contextlib import ExitStack, suppress
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
        fallback: a folder of this pod, used where the cache cannot be written.
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
    folder = cache_dir / "tokens" / key
    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(cache_dir / "locks" / f"tokens-{key}.lock"))
        except OSError as error:
            log.warning("%s cannot be written (%s): data is tokenised for this attempt only", cache_dir, error)
            build_store(datasets, encoder, max_length, beat, overlong=overlong, folder=fallback)
            return fallback
        if _usable(folder, beat):
            log.info("tokenised data: taken from the cache, %s", folder)
            return folder
        for rest in folder.parent.glob(f".{key}.*"):  # of a builder that was killed: the lock is ours now
            shutil.rmtree(rest, ignore_errors=True)
        temporary = folder.parent / f".{key}.{socket.gethostname()}-{os.getpid()}"
        try:
            build_store(datasets, encoder, max_length, beat, overlong=overlong, folder=temporary)
            for file in temporary.iterdir():
                fsync_path(file)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_path(folder.parent)
    _forget_unused(cache_dir)
    return folder


def _forget_unused(cache_dir: Path) -> None:
    """Deletes the entries that no attempt has begun with for long. A lock is as old as its entry's last use."""
    for path in (cache_dir / "locks").glob("tokens-*.lock"):
        with suppress(OSError), path.open("r+") as file:
            # Raises where it is in use, as `open` where it is another user's.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            entry = cache_dir / "tokens" / path.stem.removeprefix("tokens-")
            if time.time() - path.stat().st_mtime > UNUSED_SECONDS and entry.exists():
                shutil.rmtree(entry, ignore_errors=True)
                log.info("tokenised data: %s was not used for %d days and is deleted", entry, UNUSED_SECONDS // 86400)


def _usable(folder: Path, beat: Callable[[], None]) -> bool:
    """Whether the cache has the entry; a damaged one is removed."""
    if not folder.exists():
        return False
    beat()
    try:
        store = TokenStore.load(folder)
        if store.digest() == read_meta(folder)["digest"] and _counted(store):
            return True
        error = "its SHA-256 is not the one that was written"
    except (OSError, ValueError) as caught:
        error = str(caught)
    log.warning("tokenised data: %s in the cache is damaged (%s); it is built again", folder, error)
    shutil.rmtree(folder)
    return False


def _counted(store: TokenStore) -> bool:
    """The counts are no part of the digest, so they are held against what they count."""
    again = replace(store, counts=None)
    return bool((store.target_counts == again.target_counts).all())
