"""Checkpoints that are written while training goes on: what is in them, when they count, and what happens if they cannot."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_api.reasons import FAILURES, Reason
from finetune_trainer.distributed import World
from finetune_trainer.errors import StorageError, SupersededError
from finetune_trainer.files import sha256_file
from finetune_trainer.saving import Saving
from finetune_trainer.staging import Staging, settle
from finetune_trainer.tensor_file import DTYPES, Kind, TensorFile, write_tensors
from tests.trainer import jobs
from tests.trainer.conftest import Assets, StartPod
from tests.trainer.test_resume import losses, weights

ZERO2: dict[str, Any] = {
    "method": "Full",
    "adapter": None,
    "numProcPerNode": 2,
    "training__microBatchSize": 1,
    "deepspeed__zeroStage": 2,
    "training__maxSteps": 12,
    "checkpoint__everySteps": 3,
}


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A volume that writes step N once `hold / N` is there."""
    folder = tmp_path / "hold"
    folder.mkdir()
    monkeypatch.setenv("TEST_HOOK", "tests.trainer.volume_hook")
    monkeypatch.setenv("TEST_HOLD", str(folder))
    return folder


def test_written_while_training_goes_on_and_bit_identical(
    start: StartPod, tmp_path: Path, hold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 6 is written when its tensors have long changed; step 9 is cut off in the middle; the run is the unbroken one."""
    (hold / "3").touch()
    killed = start(tmp_path / "killed", **ZERO2)
    state = killed.wait_for_step(8)
    assert state.last_checkpoint_step == 3 and state.checkpoints == 1
    assert not (killed.folder / "checkpoints" / "step-00000006").exists()
    killed.wait_for(lambda state: state.step == 9 and state.activity == "Checkpointing")
    time.sleep(0.2)
    waiting = killed.state()
    assert waiting is not None and waiting.step == 9, "no second save before the first is done"
    (hold / "6").touch()
    state = killed.wait_for_step(11)
    assert state.last_checkpoint_step == 6
    (killed.folder / "checkpoints" / ".step-00000009.tmp-1").mkdir(
        exist_ok=True
    )  # as far as a slow write may have come
    killed.kill_rank(1)
    assert killed.wait() == FAILURES[Reason.RANK_KILLED].exit_code, killed.log
    assert killed.report["lastCheckpointStep"] == 6

    monkeypatch.delenv("TEST_HOOK")
    whole = start(tmp_path / "whole", **ZERO2)
    resumed = jobs.Pod(killed.folder, jobs.next_attempt(killed.spec), killed.server)
    assert resumed.done()["resumedFromStep"] == 6
    assert "removed the unfinished checkpoint .step-00000009.tmp-1" in resumed.log
    whole.done()
    assert weights(killed.folder) == weights(whole.folder)
    assert losses(killed.folder) == losses(whole.folder)


def test_in_the_foreground_training_waits(start: StartPod, hold: Path) -> None:
    pod = start(checkpoint__background=False, evaluation=[])
    pod.wait_for(lambda state: state.step == 2 and state.activity == "Checkpointing")
    time.sleep(0.3)
    state = pod.state()
    assert state is not None and state.step == 2
    for step in (2, 4, 6):
        (hold / str(step)).touch()
    assert pod.done()["lastCheckpointStep"] == 6


def test_a_full_volume_of_one_rank_ends_all(
    server: jobs.ForkServer, assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other pod has no part in it, but learns the cause at the next step and leaves with it."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("TEST_HOOK", "tests.trainer.volume_hook")
    monkeypatch.setenv("TEST_FULL", "1:6")
    changes = {**ZERO2, "numProcPerNode": 1, "numNodes": 2, "training__maxSteps": 4000}
    spec = jobs.launch(tmp_path, assets.model, assets.train, **changes)
    pods = [jobs.Pod(tmp_path, {**spec, "httpPort": jobs.free_port()}, server, node=node) for node in (0, 1)]
    code = FAILURES[Reason.STORAGE_ERROR].exit_code
    assert [pod.wait(60) for pod in pods] == [code, code], pods[0].log + pods[1].log
    for pod in pods:
        place = f"checkpoint.uri: {tmp_path / 'checkpoints'} cannot be written"
        assert pod.report["message"] == f"rank 1: {place}: [Errno 28] No space left on device"
        assert pod.report["lastCheckpointStep"] == 3
        assert 6 <= pod.report["step"] <= 9
    assert not (tmp_path / "checkpoints" / "step-00000006").exists()


class Gang:
    """Ranks as threads around one store."""

    def __init__(self, size: int) -> None:
        store = torch.distributed.HashStore()
        self.worlds = [World(rank, rank, size, size, torch.device("cpu"), store, None) for rank in range(size)]
        self.committed: list[list[dict[str, Any]]] = []

    def save(self, writes: list[Any], superseded: Any = lambda: None) -> list[Saving]:
        def commit(parts: list[dict[str, Any]]) -> float:
            self.committed.append(parts)
            return 12.5

        return [Saving(w, 4, write, commit, superseded) for w, write in zip(self.worlds, writes, strict=True)]


def ended(savings: list[Saving]) -> list[Saving]:
    deadline = time.monotonic() + 10
    while not all(saving.ended for saving in savings):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return savings


def test_it_counts_when_every_rank_has_written() -> None:
    gang, gate = Gang(3), threading.Event()

    def slow(count: Any) -> dict[str, Any]:
        count(7)
        gate.wait(10)
        return {"c": 3}

    savings = gang.save([lambda _: {"a": 1}, lambda _: {}, slow])
    time.sleep(0.1)
    assert not any(saving.ended for saving in savings) and not gang.committed
    assert [saving.moved() for saving in savings] == [True, True, True]
    assert [saving.moved() for saving in savings] == [True, True, False], "only the slow one gives no sign of life"
    gate.set()
    assert [saving.result().time for saving in ended(savings)] == [12.5] * 3
    assert gang.committed == [[{"a": 1}, {}, {"c": 3}]]
    savings[0].forget()
    again = gang.save([lambda _: {}] * 3)
    assert all(saving.result() for saving in ended(again)), "notes of the step before are not mistaken for new ones"


def full(_count: Any) -> dict[str, Any]:
    raise OSError(28, "No space left on device")


def test_a_rank_that_cannot_write_fails_the_save_on_all() -> None:
    gang = Gang(2)
    for saving in ended(gang.save([lambda _: {}, full])):
        with pytest.raises(StorageError, match=r"rank 1: .*No space left"):
            saving.result()
    assert not gang.committed


def test_a_folder_cleared_away_by_a_newer_attempt_is_not_a_broken_volume() -> None:
    def superseded() -> None:
        raise SupersededError("attempt 2 owns it")

    for saving in ended(Gang(2).save([lambda _: {}, full], superseded)):
        with pytest.raises(SupersededError, match="attempt 2"):
            saving.result()


def test_staged_tensors_share_nothing_with_live_ones_and_buffers_are_kept() -> None:
    staging, live = Staging(), torch.arange(6.0)
    staged = staging.hold("a", live)
    live.zero_()
    assert staged.tolist() == [0, 1, 2, 3, 4, 5]
    assert staging.hold("a", live).data_ptr() == staged.data_ptr()
    assert staging.hold("a", torch.ones(3, dtype=torch.int64)).tolist() == [1, 1, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_staging_from_a_gpu_is_page_locked_and_exact() -> None:
    staging, live = Staging(), torch.randn(1 << 20, device="cuda")
    settle(live.device)
    staged = staging.hold("a", live)
    settle(live.device)
    assert staged.device.type == "cpu" and staged.is_pinned() and torch.equal(staged, live.cpu())


def test_a_tensor_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(5, 3).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors |= {
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "odd": torch.ones(3).bool(),
    }
    tensors["transposed"] = torch.randn(4, 6).T
    written: list[int] = []
    entry = write_tensors(tmp_path / "a", tensors, written.append)
    assert entry == {"sha256": sha256_file(tmp_path / "a"), "size_bytes": (tmp_path / "a").stat().st_size}
    assert sum(written) == entry["size_bytes"]
    kinds = {name: Kind.of(tensor) for name, tensor in tensors.items()}
    with TensorFile(tmp_path / "b", kinds) as file:
        for name in sorted(tensors, reverse=True):
            file.write(name, tensors[name])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes(), "in any order"
    loaded = load_file(tmp_path / "a")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(
            loaded[name].contiguous().reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)
        )
