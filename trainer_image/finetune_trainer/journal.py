"""One line a step in the checkpoint folder: what each attempt computed, at full precision, for people and for comparisons.

A restart goes back to the newest checkpoint, so some steps are done again. What the journal says of the first time is the proof
that the resumed run is the same run.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.errors import writing

ROUNDING = 1e-3
"""Losses that differ by less, relatively, differ by the order of sums: on other numbers of ranks BF16 was measured at 4e-5."""
log = logging.getLogger("finetune_trainer")


@dataclass
class Replay:
    """The steps that were done before the restart and are done again after it."""

    expected: dict[int, tuple[float, float]]
    """Loss and gradient norm of the first time, of the steps that are still to come."""
    steps: int = 0
    identical: bool = True
    largest_difference: float = 0.0
    """Of a loss, relative to that of the first time."""

    def compare(self, step: int, loss: float, grad_norm: float) -> bool:
        """Holds a step against its first time; true once all have been."""
        before = self.expected.pop(step, None)
        if before is None:
            return False
        self.steps += 1
        self.identical = self.identical and before == (loss, grad_norm)
        difference = abs(loss - before[0]) / max(abs(before[0]), 1e-12)
        self.largest_difference = max(self.largest_difference, difference)
        return not self.expected

    @property
    def is_the_same(self) -> bool:
        """Whether what was done again is what was done before, but for rounding."""
        return self.largest_difference <= ROUNDING

    @property
    def verdict(self) -> str:
        """What people should know of it; empty where nothing was done again."""
        if not self.steps:
            return ""
        done = f"{self.steps} step{'s were' if self.steps > 1 else ' was'} done again after the restart"
        if self.identical:
            return f"{done}: the same losses and gradient norms to the bit."
        text = f"losses differ by up to {self.largest_difference:.1e}"
        if self.is_the_same:
            return f"{done}: {text}, as sums in another order do."
        return f"{done}: {text}. This is NOT the same run; look for other data, code, libraries or hardware."


class Journal:
    """Appends to `journal.jsonl`; written by rank 0 only.

    Args:
        folder: of the job's checkpoints.
        attempt: this one's number.
        resumed_from: the step that it goes on from.

    Raises:
        StorageError: it cannot be written; also of `write` and `event`.
    """

    def __init__(self, folder: Path, attempt: int, resumed_from: int) -> None:
        self._folder, self._attempt = folder, attempt
        path = folder / "journal.jsonl"
        with writing("checkpoint.uri", folder):
            lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
            self.replay = Replay(_steps(lines, resumed_from))
            self._file = path.open("a", encoding="utf-8")
            if lines[-1]:
                self._file.write("\n")  # the power went in the middle of a line

    def write(self, step: int, *, loss: float, grad_norm: float, tokens: int, seconds: float) -> None:
        """Adds a step; `loss_hex` and `grad_norm_hex` carry every bit."""
        self.event(
            step,
            loss=loss,
            loss_hex=loss.hex(),
            grad_norm=grad_norm,
            grad_norm_hex=grad_norm.hex(),
            tokens=tokens,
            seconds=round(seconds, 4),
        )
        if self.replay.compare(step, loss, grad_norm):
            log.log(logging.INFO if self.replay.is_the_same else logging.ERROR, "%s", self.replay.verdict)

    def event(self, step: int, **facts: Any) -> None:
        """Adds a line about something other than a step, such as an evaluation."""
        with writing("checkpoint.uri", self._folder):
            self._file.write(json.dumps({"step": step, "attempt": self._attempt, **facts}) + "\n")
            self._file.flush()


def _steps(lines: list[str], after: int) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of every later step, the last time that it was done."""
    found: dict[int, tuple[float, float]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # half a line
        if "loss_hex" in entry and entry["step"] > after:
            found[entry["step"]] = float.fromhex(entry["loss_hex"]), float.fromhex(entry["grad_norm_hex"])
    return found
