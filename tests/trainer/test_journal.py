"""Steps that are done again are held against what the journal says of the first time."""

import json
import logging
import os
from pathlib import Path

import pytest

from finetune_trainer.errors import StorageError
from finetune_trainer.journal import Journal


def run(folder: Path, attempt: int, first: int, last: int, factor: float = 1.0) -> Journal:
    """An attempt that goes on behind a checkpoint, with losses that are off by a factor."""
    journal = Journal(folder, attempt, first - 1)
    for step in range(first, last + 1):
        journal.write(step, loss=2.0 / step * factor, grad_norm=1.0 / step, tokens=10, seconds=0.1)
        journal.event(step, checkpoint_stall_seconds=0.1)
    return journal


@pytest.mark.parametrize(
    ("factor", "verdict", "level"),
    [
        (
            1.0,
            "3 steps were done again after the restart: the same losses and gradient norms to the bit.",
            logging.INFO,
        ),
        (
            1 + 1e-5,
            "3 steps were done again after the restart: losses differ by up to 1.0e-05, as sums in",
            logging.INFO,
        ),
        (1.5, "3 steps were done again after the restart: losses differ by up to 5.0e-01. This is NOT", logging.ERROR),
    ],
    ids=["the-same", "rounded", "another-run"],
)
def test_what_is_done_again_is_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, factor: float, verdict: str, level: int
) -> None:
    assert run(tmp_path, 1, first=1, last=8).replay.verdict == "", "nothing was done again"
    with caplog.at_level(logging.INFO, "finetune_trainer"):
        journal = run(tmp_path, 2, first=6, last=12, factor=factor)
    assert journal.replay.verdict.startswith(verdict)
    assert [(record.levelno, record.message) for record in caplog.records] == [(level, journal.replay.verdict)]


def test_the_last_time_counts_and_one_step_is_singular(tmp_path: Path) -> None:
    run(tmp_path, 1, first=1, last=3, factor=1.1)
    run(tmp_path, 2, first=1, last=3)
    assert run(tmp_path, 3, first=3, last=4).replay.verdict.startswith(
        "1 step was done again after the restart: the same"
    )


def test_half_a_line_is_closed_and_left_out(tmp_path: Path) -> None:
    run(tmp_path, 1, first=1, last=3)
    path = tmp_path / "journal.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')
    run(tmp_path, 2, first=3, last=5)
    lines = path.read_text().splitlines()
    assert sum('"lo' in line and not line.endswith("}") for line in lines) == 1
    assert [json.loads(line)["step"] for line in lines[7:] if "loss_hex" in line] == [3, 4, 5]


def test_a_full_volume_is_named(tmp_path: Path) -> None:
    journal = run(tmp_path, 1, 1, 1)
    file = journal._file.fileno()
    with Path("/dev/full").open("wb") as full, Path("/dev/null").open("wb") as emptied:
        os.dup2(full.fileno(), file)
        with pytest.raises(StorageError, match=rf"checkpoint\.uri: {tmp_path} cannot be written: .*No space left"):
            journal.event(1)
        os.dup2(emptied.fileno(), file)  # of what is still in the buffer
    journal._file.close()
