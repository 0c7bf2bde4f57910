"""What a rank tells its supervisor is written beside its work, the newest facts always."""

import threading
from pathlib import Path
from typing import Any

import pytest

from finetune_api.reasons import Reason
from finetune_api.reports import Activity
from finetune_trainer import state
from finetune_trainer.errors import StorageError
from finetune_trainer.state import StateWriter, read_failure, read_state


def test_a_busy_disk_holds_up_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    idle, written, write = threading.Event(), list[bytes](), state.write_atomic

    def slow(path: Path, data: bytes, *, durable: bool) -> None:
        idle.wait()
        written.append(data)
        write(path, data, durable=durable)

    monkeypatch.setattr(state, "write_atomic", slow)
    status = StateWriter(tmp_path, 0, 1)
    for step in range(100):
        status.beat(Activity.TRAINING, step=step)  # would wait for ever
    assert read_state(tmp_path, 0) is None
    idle.set()
    status.flush()
    found = read_state(tmp_path, 0)
    assert found is not None and (found.step, found.activity) == (99, Activity.TRAINING)
    assert len(written) <= 2, "of those that came meanwhile the newest"


def test_a_failure_comes_after_the_last_facts(tmp_path: Path) -> None:
    status = StateWriter(tmp_path, 3, 1)
    status.beat(step=7)
    status.fail(Reason.HANG, "waits", "")
    found, failure = read_state(tmp_path, 3), read_failure(tmp_path, 3)
    assert found is not None and found.step == 7
    assert failure is not None and failure.message == "waits"


def test_a_full_disk_is_told_by_the_next_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    status = StateWriter(tmp_path, 0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(state, "write_atomic", full)
        status.beat(step=1)
        status.flush()
    with pytest.raises(StorageError, match=f"{tmp_path} cannot be written: .*No space left"):
        status.beat(step=2)
    status.flush()
    found = read_state(tmp_path, 0)
    assert found is not None and found.step == 2
