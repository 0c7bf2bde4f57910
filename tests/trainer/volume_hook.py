"""Imported by a test's ranks (`TEST_HOOK`): a volume that is slow or full when the test says so.

TEST_HOLD names a folder: a checkpoint of step N is written only once it has a file `N`. TEST_FULL is `rank:step`: that rank finds
the volume full when it writes that step.
"""

import os
import time
from pathlib import Path
from typing import Any

import finetune_trainer.checkpoint as checkpoint

write_tensors = checkpoint.write_tensors


def write(path: Path, *arguments: Any) -> dict[str, Any]:
    step = int(path.parent.name.removeprefix(".step-").split(".")[0])
    if hold := os.environ.get("TEST_HOLD"):
        while not (Path(hold) / str(step)).exists():
            time.sleep(0.005)
    if os.environ.get("TEST_FULL") == f"{os.environ['RANK']}:{step}":
        path = Path("/dev/full")  # the kernel's own "No space left on device"
    return write_tensors(path, *arguments)


checkpoint.write_tensors = write
