"""Imported by a test's ranks (`TEST_HOOK`): writes what a rank holds right after it has resumed into $TEST_FACTS.

Beside the state (`rank-XXXXX.safetensors`, as in a checkpoint) it writes how DeepSpeed says that it is spread (`layout.json`).
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from finetune_trainer import optimizer_state
from finetune_trainer.checkpoint import Checkpoints
from finetune_trainer.engine import is_partitioned
from finetune_trainer.manifest import Progress, part_file

restore = Checkpoints.restore


def restore_and_tell(self: Checkpoints, engine: Any) -> Progress | None:
    progress = restore(self, engine)
    folder = Path(os.environ["TEST_FACTS"])
    save_file(optimizer_state.capture(engine), folder / part_file(self.world.rank))
    if is_partitioned(engine):
        (folder / "layout.json").write_text(json.dumps(asdict(optimizer_state.layout(engine))))
    return progress


Checkpoints.restore = restore_and_tell  # type: ignore[method-assign]
