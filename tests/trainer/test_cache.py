"""Tokenised data in the cache: taken again, rebuilt when damaged, in bounded memory, and the report before training."""

import errno
import json
import logging
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from finetune_api.launch import LaunchDataset
from finetune_api.spec import Overlong
from finetune_trainer.data import cache as cached
from finetune_trainer.data.cache import cached_store
from finetune_trainer.data.chat_templates import fix_date
from finetune_trainer.data.store import TokenStore, read_meta
from finetune_trainer.data.tokenize import Encoder
from tests.trainer import jobs, tiny
from tests.trainer.conftest import Assets, StartPod


class Cache:
    """One data set and a cache folder."""

    def __init__(self, folder: Path) -> None:
        self.path = tiny.write_jsonl(folder / "a.jsonl", tiny.chats(20, seed=1))
        self.folder = folder
        self.tokenizer = tiny.make_tokenizer()

    def get(self, max_length: int = 64, overlong: Overlong = Overlong.TRUNCATE, **options: Any) -> Path:
        dataset = LaunchDataset.model_validate(jobs.dataset(self.path, **options))
        encoder = Encoder(self.tokenizer, "x")
        return cached_store(
            self.folder / "cache",
            self.folder / "own",
            [(dataset, self.path)],
            encoder,
            max_length,
            overlong,
            lambda: None,
        )


def test_everything_that_changes_tokens_makes_another_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    first = cache.get()
    changed = first.stat().st_mtime_ns
    os.utime(cache.path)  # a newer date is the same content
    assert cache.get() == first and first.stat().st_mtime_ns == changed
    others = [cache.get(48), cache.get(overlong=Overlong.DROP), cache.get(maxSamples=3)]
    cache.tokenizer.chat_template += "{# a comment #}"
    others.append(cache.get())
    cache.path.write_text(cache.path.read_text().replace("cat", "dog", 1))
    others.append(cache.get())
    assert len({first, *others}) == 6
    assert all(TokenStore.load(folder).digest() == read_meta(folder)["digest"] for folder in others)
    assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.name.startswith(".")]


def test_the_date_belongs_to_an_entry_only_where_it_is_written(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for template, entries in ((tiny.CHATML, 1), ("{{ strftime_now('%d %b %Y') }}" + tiny.CHATML, 2)):
        cache.tokenizer.chat_template = template
        found = set()
        for day in (24, 25, 24):
            fix_date(cache.tokenizer, date(2026, 11, day))
            found.add(cache.get())
        assert len(found) == entries


def test_what_nobody_uses_for_long_is_deleted(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    used, unused, in_use = cache.get(48), cache.get(40), cache.get(32)
    for folder in (used, unused, in_use):
        os.utime(tmp_path / "cache" / "locks" / f"tokens-{folder.name}.lock", (0, 0))
    assert cache.get(48) == used and unused.exists(), "nothing is looked for where nothing is added"
    program = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print('ready', flush=True); input()"
    lock = tmp_path / "cache" / "locks" / f"tokens-{in_use.name}.lock"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        added = cache.get(24)
        holder.communicate("\n")
    assert [folder.exists() for folder in (used, unused, in_use, added)] == [True, False, True, True]


@pytest.mark.parametrize("damage", ["bit", "count", "cut", "meta", "missing"])
def test_a_damaged_entry_is_built_again_and_said(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path)
    folder = cache.get()
    digest = read_meta(folder)["digest"]
    ids = folder / ("counts.bin" if damage == "count" else "ids.bin")
    if damage in ("bit", "count"):
        content = bytearray(ids.read_bytes())
        content[100] ^= 1
        ids.write_bytes(content)
    elif damage == "cut":
        ids.write_bytes(ids.read_bytes()[:-4])
    elif damage == "meta":
        (folder / "store.json").write_text("{")
    else:
        (folder / "targets.bin").unlink()
    with caplog.at_level(logging.WARNING, "finetune_trainer"):
        again = cache.get()
    assert "is damaged" in caplog.text and "built again" in caplog.text
    assert TokenStore.load(again).digest() == digest


def test_what_a_killed_builder_left_is_removed(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    folder = cache.get()
    rest = folder.rename(folder.with_name(f".{folder.name}.pod-7"))
    assert cache.get() == folder and not rest.exists()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path)
    (tmp_path / "cache").write_text("a file is in the way")
    with caplog.at_level(logging.WARNING, "finetune_trainer"):
        assert cache.get() == tmp_path / "own"
    assert "tokenised for this attempt only" in caplog.text
    assert len(TokenStore.load(tmp_path / "own")) == 20


def test_room_is_made_before_an_entry_is_built_and_its_lock_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    cache = Cache(tmp_path)
    unused = cache.get(48)
    os.utime(tmp_path / "cache" / "locks" / f"tokens-{unused.name}.lock", (0, 0))
    build, seen = cached.build_store, list[bool]()

    def look(*arguments: Any, folder: Path, **options: Any) -> None:
        key = folder.name.split(".")[1]
        lock = tmp_path / "cache" / "locks" / f"tokens-{key}.lock"
        other = subprocess.run([sys.executable, "-c", program, str(lock)], stderr=subprocess.DEVNULL)
        seen.extend([unused.exists(), other.returncode == 0])
        build(*arguments, folder=folder, **options)

    monkeypatch.setattr(cached, "build_store", look)
    assert cache.get(40).exists() and seen == [False, False]


def test_a_cache_that_is_full_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache, build = Cache(tmp_path), cached.build_store

    def full(*arguments: Any, folder: Path, **options: Any) -> None:
        if folder.is_relative_to(tmp_path / "cache"):
            folder.mkdir()
            (folder / "ids.bin").symlink_to("/dev/full")
        build(*arguments, folder=folder, **options)

    monkeypatch.setattr(cached, "build_store", full)
    assert cache.get() == tmp_path / "own"
    assert "No space left on device" in caplog.text and "tokenised for this attempt only" in caplog.text
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_what_another_node_has_built_meanwhile_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks of some network volumes hold within a node only."""
    cache, build = Cache(tmp_path), cached.build_store

    def twice(*arguments: Any, folder: Path, **options: Any) -> None:
        build(*arguments, folder=folder, **options)
        build(*arguments, folder=folder.with_name(folder.name.split(".")[1]), **options)

    monkeypatch.setattr(cached, "build_store", twice)
    folder = cache.get()
    assert list((tmp_path / "cache" / "tokens").iterdir()) == [folder]


@pytest.mark.parametrize(("times", "taken"), [(1, True), (2, False)], ids=["once", "for-long"])
def test_an_entry_that_cannot_be_read_is_not_taken_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, taken: bool
) -> None:
    """Another job may be training on it."""
    cache, load, left = Cache(tmp_path), TokenStore.load, [None] * times
    folder = cache.get()
    inode = folder.stat().st_ino

    def stale(path: Path) -> TokenStore:
        if left:
            left.pop()
            raise OSError(errno.ESTALE, "Stale file handle")
        return load(path)

    monkeypatch.setattr(TokenStore, "load", stale)
    assert cache.get() == (folder if taken else tmp_path / "own")
    assert folder.stat().st_ino == inode


MEMORY = """
import resource, sys
from pathlib import Path
from tests.trainer import jobs, tiny
from finetune_api.launch import LaunchDataset
from finetune_trainer.data.store import build_store
from finetune_trainer.data.tokenize import Encoder

for name in sys.argv[1:]:
    path = Path(name)
    dataset = LaunchDataset.model_validate(jobs.dataset(path))
    encoder = Encoder(tiny.make_tokenizer(), "x")
    store = build_store([(dataset, path)], encoder, 4096, lambda: None, folder=path.with_suffix(".store"))
    print(len(store.ids), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_building_takes_no_memory_for_the_tokens(tmp_path: Path) -> None:
    """Ten times the data, the same peak: as lists of Python integers the tokens alone would take 8 bytes each and more."""
    line = json.dumps({"text": "the red cat " * 20}) + "\n"
    paths = [tmp_path / f"{count}.jsonl" for count in (1000, 10000)]
    for path in paths:
        path.write_text(line * int(path.stem))
    command = [sys.executable, "-c", MEMORY, *map(str, paths)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    few, low, many, high = map(int, out[-4:])
    assert many == 10 * few
    assert (high - low) * 1024 < 8 * (many - few), f"{few} tokens took {low} kB, {many} took {high} kB"


def test_the_second_attempt_takes_the_cache_and_the_report_says_what_was_lost(
    start: StartPod, assets: Assets, tmp_path: Path
) -> None:
    pieces = {"training__overlong": "Split", "training__maxLength": 24, "training__groupByLength": True}
    data = [jobs.dataset(assets.train, weight=2.0), jobs.dataset(assets.evaluation, weight=1.0)]
    two = {**pieces, "numProcPerNode": 2}
    killed = start(tmp_path / "killed", train=data, **two)
    whole = start(tmp_path / "whole", train=data, **two)
    killed.wait_for_step(3, 1)
    killed.kill_rank(1)
    killed.wait()
    assert "taken from the cache" not in killed.log
    resumed = jobs.Pod(killed.folder, jobs.next_attempt(killed.spec), killed.server)
    assert resumed.done()["resumedFromStep"] in (2, 4)
    assert resumed.log.count("taken from the cache") == 2, "training and evaluation data, once a node"
    whole.done()

    results = [json.loads((p.folder / "output" / "train_result.json").read_text()) for p in (resumed, whole)]
    assert results[0]["loss"] == results[1]["loss"] and results[0]["eval_loss"] == results[1]["eval_loss"]
    report = results[0]["data"]
    first = report["train"][0]
    assert first["read"] == first["used"] == 40 and first["split"] > 0
    assert first["samples"] > 40 and 0 < report["padding_share"] < 1
    assert f"{first['split']} " in resumed.log.replace(")", " ") and "an epoch takes" in resumed.log
