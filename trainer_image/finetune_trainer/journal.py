"""One line a step in the checkpoint folder: what each attempt computed, at full precision, for people and for comparisons."""

import json
from pathlib import Path
from typing import Any


class Journal:
    """Appends to `journal.jsonl`; written by rank 0 only."""

    def __init__(self, folder: Path, attempt: int) -> None:
        self._file = (folder / "journal.jsonl").open("a", encoding="utf-8")
        self._attempt = attempt

    def write(self, step: int, *, loss: float, grad_norm: float, tokens: int, seconds: float) -> None:
        """Adds a step; `loss_hex` and `grad_norm_hex` carry every bit."""
        line: dict[str, Any] = {
            "step": step,
            "attempt": self._attempt,
            "loss": loss,
            "loss_hex": loss.hex(),
            "grad_norm": grad_norm,
            "grad_norm_hex": grad_norm.hex(),
            "tokens": tokens,
            "seconds": round(seconds, 4),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def event(self, step: int, **facts: Any) -> None:
        """Adds a line about something other than a step, such as an evaluation."""
        self._file.write(json.dumps({"step": step, "attempt": self._attempt, **facts}) + "\n")
        self._file.flush()
