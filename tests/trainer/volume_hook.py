"""Imported by a test's ranks (`TEST_HOOK`): a volume that is slow or full when the test says so.

TEST_HOLD names a folder: a checkpoint of step N is written only once it has a file `N`. TEST_FULL is `rank:step`: that rank finds
the volume full when it writes that step. TEST_FULL_OUTPUT names the file of the output with which its volume is full. TEST_CLAIM
is a claim that a newer attempt takes while the output is written.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import finetune_trainer.checkpoint as checkpoint
import finetune_trainer.export as export

FULL = Path("/dev/full")
"""The kernel's own "No space left on device"."""
write_tensors, write_weights = checkpoint.write_tensors, export._write_weights


def write(path: Path, *arguments: Any) -> dict[str, Any]:
    step = int(path.parent.name.removeprefix(".step-").split(".")[0])
    if hold := os.environ.get("TEST_HOLD"):
        while not (Path(hold) / str(step)).exists():
            time.sleep(0.005)
    if os.environ.get("TEST_FULL") == f"{os.environ['RANK']}:{step}":
        path = FULL
    return write_tensors(path, *arguments)


def write_output(model: Any, spec: Any, revision: Any, folder: Path, *, first: bool) -> None:
    if name := os.environ.get("TEST_FULL_OUTPUT"):
        (folder / name).symlink_to(FULL)
    write_weights(model, spec, revision, folder, first=first)
    if claim := os.environ.get("TEST_CLAIM"):
        Path(claim).write_text(json.dumps({"uid": spec.job.uid, "attempt": spec.attempt + 1}))


checkpoint.write_tensors, export._write_weights = write, write_output
