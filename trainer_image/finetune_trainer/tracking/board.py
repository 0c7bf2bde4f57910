"""TensorBoard event files."""

from pathlib import Path
from typing import Any

from finetune_trainer.tracking.base import RunFacts

FLUSH_SECONDS = 10


class TensorBoardTracker:
    """One event file for each attempt in the job's folder."""

    name = "tracking.tensorBoard"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def start(self, facts: RunFacts) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps that an earlier attempt did after the checkpoint are done again: readers forget the old ones.
        self._writer = SummaryWriter(
            str(self._folder),
            purge_step=facts.first_step,
            flush_secs=FLUSH_SECONDS,
            filename_suffix=f".{facts.attempt}",
        )
        lines = [f"    {key}: {value}" for key, value in sorted(_flat(facts.config).items())]
        self._writer.add_text("config", "\n".join(lines), facts.first_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, succeeded: bool) -> None:
        self._writer.close()


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat
