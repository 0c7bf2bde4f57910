"""What counts as a checkpoint, who may write one, and what may be resumed from it."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_api.launch import LaunchSpec
from finetune_api.reasons import FAILURES, Reason
from finetune_trainer import manifest as mf
from finetune_trainer.checkpoint import Checkpoints
from finetune_trainer.claims import AttemptClaim
from finetune_trainer.distributed import World
from finetune_trainer.errors import StorageError, SupersededError
from finetune_trainer.manifest import Manifest, Progress
from finetune_trainer.tensor_file import write_tensors
from tests.trainer import jobs
from tests.trainer.conftest import StartPod


def steps(pod: jobs.Pod) -> list[int]:
    return sorted(int(path.name[5:]) for path in (pod.folder / "checkpoints").glob("step-????????"))


def corrupt(pod: jobs.Pod, step: int) -> None:
    """Flips one bit in the middle of the tensors."""
    file = pod.folder / "checkpoints" / f"step-{step:08d}" / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def again(pod: jobs.Pod, **changes: object) -> jobs.Pod:
    return jobs.Pod(pod.folder, jobs.next_attempt(pod.spec, **changes), pod.server)


@pytest.fixture(scope="module")
def finished(server: jobs.ForkServer, assets, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Makes finished jobs cheaply: each is a copy of one."""
    import shutil
    from copy import deepcopy

    first = tmp_path_factory.mktemp("finished")
    pod = jobs.Pod(first, jobs.launch(first, assets.model, assets.train, assets.evaluation), server)
    pod.done()

    def copy(folder: Path) -> jobs.Pod:
        shutil.copytree(first, folder, dirs_exist_ok=True)
        clone = object.__new__(jobs.Pod)
        clone.folder, clone.server, clone.spec = folder, server, deepcopy(pod.spec)
        clone.spec["checkpoint"]["dir"] = str(folder / "checkpoints")
        clone.spec["outputDir"] = str(folder / "output")
        return clone

    return copy


def test_keeps_the_newest_and_leaves_nothing_half_written(finished, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pod = finished(tmp_path)
    assert steps(pod) == [4, 6]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")) == []
    manifest = mf.read_manifest(tmp_path / "checkpoints" / "step-00000006")
    assert manifest.progress.step == 6 and manifest.progress.samples_total == 24
    assert all(mf.verify_file(tmp_path / "checkpoints/step-00000006", n, e) is None for n, e in manifest.files.items())
    assert {"torch", "deepspeed", "transformers"} <= manifest.versions.keys()
    # Only the trainable state: adapters of 8,192 parameters as master and two moments, not the model.
    (name,) = manifest.files
    state = load_file(tmp_path / "checkpoints" / "step-00000006" / name)
    assert sum(tensor.nbytes for key, tensor in state.items() if not key.endswith(".step")) == 8192 * 12


def test_falls_back_to_the_newest_that_verifies(finished, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pod = finished(tmp_path)
    corrupt(pod, 6)
    abandoned = tmp_path / "checkpoints" / ".step-00000008.tmp-1"
    abandoned.mkdir()
    second = again(pod)
    assert second.done()["resumedFromStep"] == 4
    assert "step-00000006 is corrupt" in second.log and "SHA-256" in second.log
    assert (tmp_path / "checkpoints" / "step-00000006.corrupt-2").is_dir()
    assert not abandoned.exists()
    assert steps(pod) == [4, 6]


def test_no_checkpoint_verifies(finished, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pod = finished(tmp_path)
    corrupt(pod, 6)
    (tmp_path / "checkpoints" / "step-00000004" / "manifest.json").unlink()
    pods = [pod]
    for _ in range(2):  # the next attempt does not take a folder without checkpoints for a new job's
        pods.append(again(pods[-1]))
        assert pods[-1].wait() == FAILURES[Reason.CHECKPOINT_CORRUPT].exit_code
        message = pods[-1].report["message"]
        assert "none of the 2 checkpoints verifies (step-00000006, step-00000004)" in message
        assert "delete them all to start from step 0" in message
        assert steps(pod) == [4, 6], "they may verify next time"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"adapter": {"rank": 8, "alpha": 8, "dropout": 0.0, "targetModules": ["All"], **jobs.PLAIN_ADAPTER}},
            "adapter.rank: saved 4, now 8",
        ),
        ({"train": "other"}, "datasets.train"),
    ],
    ids=["other-rank", "other-data"],
)
def test_another_runs_checkpoint_is_refused(finished, tmp_path: Path, changes, said: str) -> None:  # type: ignore[no-untyped-def]
    pod = finished(tmp_path)
    if changes.get("train") == "other":
        from tests.trainer import tiny

        changes = {"train": [jobs.dataset(tiny.write_jsonl(tmp_path / "other.jsonl", tiny.chats(9, seed=5)))]}
    second = again(pod, **changes)
    assert second.wait() == FAILURES[Reason.CONFIG_ERROR].exit_code
    assert said in second.report["message"]
    assert steps(pod) == [4, 6]


def test_an_older_attempt_ends_itself_and_writes_nothing(start: StartPod) -> None:
    pod = start(training__maxSteps=4000, checkpoint__everySteps=10)
    pod.wait_for_step(2)
    claim = pod.folder / "checkpoints" / "attempt.json"
    claim.write_text(json.dumps({"uid": "uid-1", "attempt": 2}))
    before = steps(pod)
    assert pod.wait(60) == FAILURES[Reason.SUPERSEDED].exit_code, pod.log
    assert "owned by attempt 2" in pod.report["message"]
    assert len(steps(pod)) <= len(before) + 1
    assert not (pod.folder / "output" / "train_result.json").exists()

    late = jobs.Pod(pod.folder, {**pod.spec, "httpPort": jobs.free_port()}, pod.server)
    assert late.wait() == FAILURES[Reason.SUPERSEDED].exit_code


def test_another_jobs_folder_is_refused_before_training(finished, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pod = finished(tmp_path)
    second = again(pod, job={"namespace": "team", "name": "tiny", "uid": "uid-2"})
    assert second.wait() == FAILURES[Reason.CONFIG_ERROR].exit_code
    assert "checkpoint.uri" in second.report["message"] and "uid-1" in second.report["message"]


@pytest.mark.parametrize("content", ["another job's", "somebody's files"])
def test_a_taken_output_folder_is_refused_and_kept(start: StartPod, tmp_path: Path, content: str) -> None:
    output = tmp_path / "output"
    output.mkdir()
    if content == "another job's":
        (output / "finetunejob.json").write_text('{"namespace": "team", "name": "other", "uid": "x"}')
    else:
        (output / "thesis.txt").write_text("years of work")
    pod = start()
    assert pod.wait() == FAILURES[Reason.CONFIG_ERROR].exit_code
    assert "output.uri" in pod.report["message"]
    assert len(list(output.iterdir())) == 1


def test_a_finished_job_that_is_started_again_exports_the_same(finished, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pod = finished(tmp_path)
    adapter = tmp_path / "output" / "adapter_model.safetensors"
    before = adapter.read_bytes()
    report = again(pod).done()
    assert report["resumedFromStep"] == report["step"] == 6
    assert adapter.read_bytes() == before


def checkpoints(root: Path, attempt: int) -> Checkpoints:
    """Those of one rank, which has claimed the folder."""
    claim = AttemptClaim(root, "uid-1", attempt)
    (root / "attempt.json").write_text(json.dumps({"uid": claim.uid, "attempt": attempt}))
    world = World(0, 0, 1, 1, torch.device("cpu"), torch.distributed.HashStore(), None)
    return Checkpoints(root, 2, world, claim, {}, attempt)


def test_a_superseded_attempt_leaves_the_newer_ones_half_written_checkpoint(tmp_path: Path) -> None:
    old, _new = checkpoints(tmp_path, 1), checkpoints(tmp_path, 2)
    half = mf.temporary_folder(tmp_path, 4, attempt=2)
    half.mkdir()
    with pytest.raises(SupersededError, match="owned by attempt 2"):
        old.restore(None)
    assert half.is_dir()


def test_a_save_that_a_newer_attempt_has_cleared_away_is_superseded(tmp_path: Path) -> None:
    old, new = checkpoints(tmp_path, 1), checkpoints(tmp_path, 2)
    half = mf.temporary_folder(tmp_path, 4, attempt=1)
    half.mkdir()
    assert new.restore(None) is None and not half.exists()
    with pytest.raises(SupersededError, match="owned by attempt 2"):
        old._commit(half, Progress(step=4), {})


def test_a_part_that_rank_0_sees_later_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = mf.temporary_folder(tmp_path, 4, attempt=1)
    half.mkdir()
    monkeypatch.setattr("time.sleep", lambda _: (half / "rank-00001.safetensors").write_bytes(b"1234"))
    checkpoints(tmp_path, 1)._check_written(half, {"rank-00001.safetensors": {"sha256": "", "size_bytes": 4}})


def test_parts_that_rank_0_does_not_see_make_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes with a folder each under the same path."""
    monkeypatch.setattr("finetune_trainer.checkpoint.SEEN_SECONDS", 0.0)
    own = checkpoints(tmp_path, 1)
    half = mf.temporary_folder(tmp_path, 4, attempt=1)
    half.mkdir()
    (half / "rank-00000.safetensors").write_bytes(b"1234")
    entry = {"sha256": "", "size_bytes": 4}
    for name, said in (("rank-00001.safetensors", "is missing"), ("rank-00000.safetensors", "4 bytes instead of 5")):
        files = {"rank-00000.safetensors": entry, name: {**entry, "size_bytes": 5}}
        with pytest.raises(StorageError, match=rf"checkpoint\.uri: .*{name} .*{said}.* one volume for all pods"):
            own._commit(half, Progress(step=4), files)
    assert mf.complete_checkpoints(tmp_path) == []


def test_a_manifest_that_only_one_rank_cannot_read_is_told(tmp_path: Path) -> None:
    """Else that rank would go on to load what it takes for verified."""
    world = World(1, 0, 2, 1, torch.device("cpu"), torch.distributed.HashStore(), None)
    second = Checkpoints(tmp_path, 2, world, None, {}, 1)
    Manifest(Progress(step=4), 1, 2, 0.0, {}, {}).write(tmp_path)
    assert second._verify(tmp_path) is None
    (tmp_path / mf.MANIFEST).unlink()
    assert "manifest.json cannot be read" in str(second._verify(tmp_path))


def taken(root: Path) -> None:
    root.mkdir()
    (root / f".attempt.json.{os.getpid()}").symlink_to("/dev/full")
    AttemptClaim.take(LaunchSpec.model_validate(jobs.launch(root.parent, root, root, checkpoint__dir=str(root))))


def written(root: Path) -> None:
    root.mkdir()
    own, half = checkpoints(root, 1), mf.temporary_folder(root, 4, attempt=1)
    half.mkdir()
    (half / "rank").symlink_to("/dev/full")
    own._write_part({"a": torch.ones(1)}, half, "rank", lambda _size: None)


def committed(root: Path) -> None:
    root.mkdir()
    own, half = checkpoints(root, 1), mf.temporary_folder(root, 4, attempt=1)
    half.mkdir()
    (half / f".manifest.json.{os.getpid()}").symlink_to("/dev/full")
    own._commit(half, Progress(step=4), {})


@pytest.mark.parametrize("work", [taken, written, committed], ids=["claim", "part", "manifest"])
def test_a_full_volume_is_named_whatever_is_written(tmp_path: Path, work: Callable[[Path], None]) -> None:
    root = tmp_path / "root"
    with pytest.raises(StorageError, match=rf"checkpoint\.uri: {root} cannot be written: .*No space left"):
        work(root)


@pytest.mark.parametrize("unreadable", ["manifest.json", "rank-00000.safetensors"])
def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_a_corrupt_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unreadable: str
) -> None:
    """The steps since the one before would be lost, and this one set aside, for a volume that is back a minute later."""
    own = checkpoints(tmp_path, 1)
    for step in (4, 6):
        folder = mf.step_folder(tmp_path, step)
        folder.mkdir()
        files = {"rank-00000.safetensors": write_tensors(folder / "rank-00000.safetensors", {"a": torch.ones(1)})}
        Manifest(Progress(step=step), 1, 1, 0.0, {}, files).write(folder)
    newest, open_file = mf.step_folder(tmp_path, 6), Path.open

    def stale(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == newest / unreadable:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", stale)
    with pytest.raises(StorageError, match=rf"{newest / unreadable} cannot be read: .*Stale.*; rename {newest} to"):
        own.restore(None)
    assert newest.is_dir()
