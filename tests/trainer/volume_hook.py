"""Imported by a test's ranks (`TEST_HOOK`): a volume that is slow or full when the test says so.

TEST_HOLD names a folder: a checkpoint of step N is written only once it has a file `N`. TEST_FULL is `rank:step`: that rank finds
the volume full when it writes that step. TEST_FULL_OUTPUT names the file of the output with which its volume is full. TEST_CLAIM
is a claim that a newer attempt takes while the output is written. With TEST_FULL_SCRATCH the pod's own volume is full.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import finetune_trainer.checkpoint as checkpoint
import finetune_trainer.export as export
import finetune_trainer.state as state

FULL = Path("/dev/full")
"""The kernel's own "No space left on device"."""
write_tensors, write_weights, write_atomic = checkpoint.write_tensors, export._write_weights, state.write_atomic


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


def write_state(path: Path, data: bytes, *, durable: bool) -> None:
    if os.environ.get("TEST_FULL_SCRATCH"):
        with suppress(FileExistsError):
            path.with_name(f".{path.name}.{os.getpid()}").symlink_to(FULL)
    write_atomic(path, data, durable=durable)


checkpoint.write_tensors, export._write_weights = write, write_output
state.write_atomic = write_state
