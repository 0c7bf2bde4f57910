"""The list of a checkpoint's files that makes it count: written last, verified first. Pure file work, no torch."""

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune_trainer.files import fsync_path, sha256_file, write_json

MANIFEST = "manifest.json"
FORMAT = 2
_STEP = re.compile(r"^step-(\d{8})$")


@dataclass
class Progress:
    """What has to survive a restart beside the tensors."""

    step: int = 0
    samples_total: int = 0
    tokens_total: int = 0
    loss: float | None = None
    base_eval_loss: float | None = None
    eval_loss: float | None = None
    last_eval_step: int | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """Every evaluation so far, oldest first: `step` and `values`, a number for each metric's name."""
    note: str = ""
    """What people should know of how it came here, such as on other numbers of ranks."""

    def newest_metrics(self) -> dict[str, dict[str, float]]:
        """Of each metric its newest `value`, its first (`base`) and the newest one's `step`."""
        newest: dict[str, dict[str, float]] = {}
        for evaluation in self.metrics:
            for name, value in evaluation["values"].items():
                base = newest.get(name, {"base": value})["base"]
                newest[name] = {"value": value, "base": base, "step": evaluation["step"]}
        return newest


@dataclass(frozen=True)
class Manifest:
    progress: Progress
    attempt: int
    world_size: int
    time: float
    fingerprint: dict[str, Any]
    files: dict[str, dict[str, Any]]
    """Name to `sha256` and `size_bytes`."""
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, asdict(self))


def read_manifest(folder: Path) -> Manifest:
    """Reads a checkpoint's manifest.

    Raises:
        ValueError: it is missing or not one of this format.
        OSError: it is there and the volume does not give it.
    """
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}, this trainer reads {FORMAT}")
        return Manifest(**{**values, "progress": Progress(**values["progress"])})
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error}") from error


def verify_size(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    """What is wrong with a file of a checkpoint as far as its folder tells; None if nothing is."""
    try:
        size = (folder / name).stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    return None if size == entry["size_bytes"] else f"{name} has {size} bytes instead of {entry['size_bytes']}"


def verify_file(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    """What is wrong with a file of a checkpoint; None if nothing is."""
    if problem := verify_size(folder, name, entry):
        return problem
    same = sha256_file(folder / name) == entry["sha256"]
    return None if same else f"{name} has another SHA-256 than its manifest says"


def part_file(rank: int) -> str:
    """Name of the file with a rank's part of the state."""
    return f"rank-{rank:05d}.safetensors"


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def complete_checkpoints(root: Path) -> list[Path]:
    """Folders that were renamed into place, newest first. Whether they verify is another question."""
    return sorted((p for p in root.iterdir() if _STEP.match(p.name)), key=lambda p: p.name, reverse=True)


def temporary_folder(root: Path, step: int, attempt: int) -> Path:
    return root / f".step-{step:08d}.tmp-{attempt}"


def remove_abandoned(root: Path) -> list[str]:
    """Deletes what a dead attempt left half written; returns the names."""
    names = []
    for path in root.glob(".step-*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
        names.append(path.name)
    return names


def commit(temporary: Path, final: Path) -> None:
    """Makes a written folder count: entries to the disk, rename, and the rename to the disk."""
    fsync_path(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    fsync_path(final.parent)


def retain(root: Path, keep: int, spare: int | None = None) -> None:
    """Deletes all but the newest `keep` checkpoints and that of the step `spare`.

    Each is renamed first, so that no half-deleted one is ever seen.
    """
    for path in complete_checkpoints(root)[keep:]:
        if spare is not None and path == step_folder(root, spare):
            continue
        doomed = path.with_name(f".{path.name}.tmp-delete")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
