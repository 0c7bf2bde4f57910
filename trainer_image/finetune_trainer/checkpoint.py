"""Saves and restores the training state of all ranks.

Every rank writes and verifies its own part; rank 0 decides. A checkpoint is a folder `step-XXXXXXXX` that was written under
another name, got a manifest with a SHA-256 for each file, was flushed, and was renamed: only then it counts.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from finetune_api.spec import EvaluationMetric
from finetune_trainer import manifest as mf
from finetune_trainer import optimizer_state
from finetune_trainer.claims import AttemptClaim
from finetune_trainer.config import differences
from finetune_trainer.distributed import World
from finetune_trainer.engine import is_partitioned
from finetune_trainer.errors import CheckpointCorruptError, ConfigError
from finetune_trainer.evaluation.best import best_step
from finetune_trainer.manifest import Manifest, Progress
from finetune_trainer.versions import versions

log = logging.getLogger("finetune_trainer")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoint folder of one job, as one attempt uses it."""

    root: Path
    keep: int
    world: World
    claim: AttemptClaim | None
    """Rank 0's; None on the others."""
    fingerprint: dict[str, Any]
    metric: EvaluationMetric | None = None
    """Tells the best checkpoint, which is never deleted."""

    def save(self, engine: Any, progress: Progress) -> float:
        """Writes a checkpoint; all ranks call it at the same step.

        Returns:
            When it was complete, as Unix time.

        Raises:
            SupersededError: a newer attempt owns the folder (on every rank).
            StorageError: a rank could not write (on every rank).
        """
        temporary = mf.temporary_folder(self.root, progress.step, self.claim.attempt if self.claim else 0)
        temporary = Path(self.world.broadcast(str(temporary)))
        self.world.together(lambda: self._prepare(temporary))
        entries = self.world.together(lambda: self._write_part(engine, temporary))
        files = {name: entry for part in entries for name, entry in part.items()}
        now = time.time()
        self.world.together(lambda: self._commit(temporary, progress, files, now))
        return now

    def restore(self, engine: Any) -> Progress | None:
        """Resumes from the newest checkpoint that verifies.

        Returns:
            Its progress; None if there is none to resume from.

        Raises:
            ConfigError: the newest checkpoint is another run's.
            CheckpointCorruptError: there are checkpoints and none verifies.
        """
        found = self.world.together(lambda: self._candidates() if self.world.is_first else [])[0]
        for name in found:
            folder = self.root / name
            problems = [p for p in self.world.together(lambda f=folder: self._verify(f)) if p]  # type: ignore[misc]
            if problems:
                log.error("checkpoint %s is corrupt and skipped: %s", name, "; ".join(problems))
                self.world.together(lambda f=folder: self._set_aside(f))  # type: ignore[misc]
                continue
            saved = mf.read_manifest(folder)
            if differs := differences(self.fingerprint, saved.fingerprint):
                raise ConfigError(f"checkpoint.uri: {folder} is of another run: {'; '.join(differs[:5])}")
            optimizer_state.restore(engine, load_file(folder / self._part(engine)))
            log.info("resumed from %s", name)
            return saved.progress
        if found:
            raise CheckpointCorruptError(f"{self.root}: none of the {len(found)} checkpoints verifies; see the log")
        return None

    def load_step(self, engine: Any, step: int) -> None:
        """Puts the state of one checkpoint back, such as the best one for the export.

        Raises:
            CheckpointCorruptError: it is missing or does not verify.
        """
        folder = mf.step_folder(self.root, step)
        problems = [problem for problem in self.world.together(lambda: self._verify(folder)) if problem]
        if problems:
            raise CheckpointCorruptError(f"{folder}, the best checkpoint, cannot be exported: {'; '.join(problems)}")
        optimizer_state.restore(engine, load_file(folder / self._part(engine)))

    def _prepare(self, temporary: Path) -> None:
        if self.world.is_first:
            temporary.mkdir(parents=True, exist_ok=True)

    def _part(self, engine: Any) -> str:
        return f"rank-{self.world.rank if is_partitioned(engine) else 0:05d}.safetensors"

    def _write_part(self, engine: Any, temporary: Path) -> dict[str, dict[str, Any]]:
        if not self.world.is_first and not is_partitioned(engine):
            return {}  # every rank holds the same state
        name = self._part(engine)
        save_file(optimizer_state.capture(engine), temporary / name)
        return {name: mf.file_entry(temporary / name)}

    def _commit(self, temporary: Path, progress: Progress, files: dict[str, dict[str, Any]], now: float) -> None:
        if self.claim is None:
            return
        manifest = Manifest(
            progress=progress,
            attempt=self.claim.attempt,
            world_size=self.world.size,
            time=now,
            fingerprint=self.fingerprint,
            files=files,
            versions=versions(),
        )
        manifest.write(temporary)
        self.claim.check()
        mf.commit(temporary, mf.step_folder(self.root, progress.step))
        self.claim.check()
        mf.retain(self.root, self.keep, spare=best_step(progress.metrics, self.metric))

    def _candidates(self) -> list[str]:
        for name in mf.remove_abandoned(self.root):
            log.info("removed the unfinished checkpoint %s", name)
        return [path.name for path in mf.complete_checkpoints(self.root)]

    def _verify(self, folder: Path) -> str | None:
        """Each rank reads a share of the files, so that verifying takes no longer with more of them."""
        try:
            manifest = mf.read_manifest(folder)
        except ValueError as error:
            return str(error) if self.world.is_first else None
        for name in sorted(manifest.files)[self.world.rank :: self.world.size]:
            if problem := mf.verify_file(folder, name, manifest.files[name]):
                return problem
        return None

    def _set_aside(self, folder: Path) -> None:
        if self.claim is not None:
            self.claim.check()
            folder.rename(folder.with_name(folder.name + f".corrupt-{self.claim.attempt}"))
