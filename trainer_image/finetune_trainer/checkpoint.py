"""Saves and restores the training state of all ranks.

Every rank writes and verifies its own part; rank 0 decides. A checkpoint is a folder `step-XXXXXXXX` that was written under
another name, got a manifest with a SHA-256 for each file, was flushed, and was renamed: only then it counts. The state is
copied to host memory while training stands still; the rest happens in the background (see `saving`).
"""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from finetune_api.spec import EvaluationMetric
from finetune_api.words import say_ranks
from finetune_trainer import manifest as mf
from finetune_trainer import optimizer_state, reshard
from finetune_trainer.claims import AttemptClaim
from finetune_trainer.config import differences
from finetune_trainer.distributed import World
from finetune_trainer.engine import is_partitioned
from finetune_trainer.errors import CheckpointCorruptError, ConfigError, StorageError, writing
from finetune_trainer.evaluation.best import best_step
from finetune_trainer.manifest import Manifest, Progress
from finetune_trainer.saving import Saved, Saving
from finetune_trainer.staging import Staging, settle
from finetune_trainer.tensor_file import write_tensors
from finetune_trainer.versions import versions

FIRST_POLL_SECONDS, LAST_POLL_SECONDS = 0.005, 0.25
SEEN_SECONDS = 10.0
"""A network file system may show what another node has written so much later."""
log = logging.getLogger("finetune_trainer")


@dataclass
class Checkpoints:
    """The checkpoint folder of one job, as one attempt uses it."""

    root: Path
    keep: int
    world: World
    claim: AttemptClaim | None
    """Rank 0's; None on the others."""
    fingerprint: dict[str, Any]
    attempt: int
    metric: EvaluationMetric | None = None
    """Tells the best checkpoint, which is never deleted."""
    _staging: Staging = field(default_factory=Staging, init=False)
    _saving: Saving | None = field(default=None, init=False)
    _newest: Saved | None = field(default=None, init=False)
    _num_before: int = field(default=0, init=False)

    def save(self, engine: Any, progress: Progress, beat: Callable[[], None]) -> None:
        """Stages the state and starts to write it; all ranks call it at the same step.

        A save that is still on its way is waited for: never more than one is.

        Raises:
            SupersededError, StorageError: the save before failed (on every rank).
        """
        self.wait(beat)
        staged: dict[str, torch.Tensor] = {}
        self.world.together(lambda: self._stage(engine, staged))
        temporary = mf.temporary_folder(self.root, progress.step, self.attempt)
        name, then = self._part(engine), deepcopy(progress)
        self._saving = Saving(
            self.world,
            progress.step,
            write=lambda count: self._write_part(staged, temporary, name, count),
            commit=lambda parts: self._commit(temporary, then, {n: e for part in parts for n, e in part.items()}),
            superseded=lambda: self.claim.check() if self.claim else None,
        )

    def wait(self, beat: Callable[[], None]) -> None:
        """Waits for the save that is on its way, if there is one; all ranks call it at the same step.

        The ranks ask each other all the while, so that one that has died is noticed. A rank whose own part does not move gives
        no sign of life: a dead volume is found by the hang watch.

        Raises:
            SupersededError: a newer attempt owns the folder (on every rank).
            StorageError: a rank could not write (on every rank).
        """
        saving = self._saving
        if saving is None:
            return
        pause = FIRST_POLL_SECONDS
        while self.world.sum([float(saving.ended)])[0] < self.world.size:
            if saving.moved():
                beat()
            time.sleep(pause)
            pause = min(2 * pause, LAST_POLL_SECONDS)
        self._saving = None
        self.world.together(saving.result)
        self._newest, self._num_before = saving.saved, self._num_before + 1
        if self.world.is_first:
            saving.forget()

    @property
    def failed(self) -> bool:
        """Whether the save that is on its way has failed, as far as this rank knows; `wait` then raises on all ranks."""
        return self._saving is not None and self._saving.failed

    @property
    def newest(self) -> Saved | None:
        """The newest checkpoint of this attempt that counts, as far as this rank knows."""
        return (self._saving.saved if self._saving else None) or self._newest

    @property
    def num_saved(self) -> int:
        """Checkpoints that this attempt has written."""
        return self._num_before + int(self._saving is not None and self._saving.saved is not None)

    def restore(self, engine: Any) -> Progress | None:
        """Resumes from the newest checkpoint that verifies; newer ones are then set aside.

        Returns:
            Its progress; None if there is none to resume from.

        Raises:
            ConfigError: the newest checkpoint is another run's, or cannot be resumed on this number of ranks.
            CheckpointCorruptError: there are checkpoints and none verifies. They stay, so that the next attempt says the same.
            StorageError: one cannot be read.
        """
        found = self.world.together(lambda: self._candidates() if self.world.is_first else [])[0]
        for newer, name in enumerate(found):
            folder = self.root / name
            if problems := self._problems(folder):
                log.error("checkpoint %s is corrupt and skipped: %s", name, problems)
                continue
            saved = mf.read_manifest(folder)
            if differs := differences(self.fingerprint, saved.fingerprint):
                raise ConfigError(f"checkpoint.uri: {folder} is of another run: {'; '.join(differs[:5])}")
            self.world.together(lambda names=found[:newer]: self._set_aside(names))  # type: ignore[misc]
            self._load(engine, folder, saved)
            progress = saved.progress
            if saved.world_size == self.world.size:
                log.info("resumed from %s", name)
            else:
                said = (
                    f"Resumed from {name} of {say_ranks(saved.world_size)} on {say_ranks(self.world.size)}: the same rows in the "
                    "same order, sums in another order."
                )
                log.info("%s", said)
                progress.note = f"{progress.note} {said}".strip()
            return progress
        if found:
            raise CheckpointCorruptError(
                f"{self.root}: none of the {len(found)} checkpoints verifies ({', '.join(found[:5])}); see the log; restore one "
                "of them, or delete them all to start from step 0"
            )
        return None

    def load_step(self, engine: Any, step: int) -> None:
        """Puts the state of one checkpoint back, such as the best one for the export.

        Raises:
            CheckpointCorruptError: it is missing or does not verify.
            StorageError: it cannot be read.
        """
        folder = mf.step_folder(self.root, step)
        if problems := self._problems(folder):
            raise CheckpointCorruptError(f"{folder}, the best checkpoint, cannot be exported: {problems}")
        self._load(engine, folder, mf.read_manifest(folder))

    def _load(self, engine: Any, folder: Path, saved: Manifest) -> None:
        """Puts a verified checkpoint's state back, whatever the number of ranks that wrote it."""
        if saved.world_size == self.world.size or not is_partitioned(engine):
            optimizer_state.restore(engine, load_file(folder / self._part(engine)))
            return
        parts = [folder / mf.part_file(rank) for rank in range(saved.world_size)]
        sizes = [master.numel() for master in optimizer_state.masters(engine)]
        try:
            layout = optimizer_state.layout(engine)
            tensors = reshard.read_part(parts, layout, sizes, self.world.rank, self.world.size)
        except reshard.ReshardError as error:
            raise ConfigError(
                f"checkpoint.uri: {folder} is of {say_ranks(saved.world_size)} and cannot be resumed on "
                f"{say_ranks(self.world.size)}: {error}; resume with {say_ranks(saved.world_size)}"
            ) from error
        optimizer_state.restore(engine, tensors)

    def _part(self, engine: Any) -> str:
        return mf.part_file(self.world.rank if is_partitioned(engine) else 0)

    def _stage(self, engine: Any, staged: dict[str, torch.Tensor]) -> None:
        if self.world.is_first or is_partitioned(engine):  # else every rank holds the same state
            settle(self.world.device)
            staged.update(optimizer_state.capture(engine, self._staging.hold))
            settle(self.world.device)

    def _write_part(
        self, staged: dict[str, torch.Tensor], temporary: Path, name: str, count: Callable[[int], None]
    ) -> dict[str, dict[str, Any]]:
        if not staged:
            return {}
        with self._writing():
            temporary.mkdir(parents=True, exist_ok=True)
            return {name: write_tensors(temporary / name, staged, count)}

    def _writing(self) -> AbstractContextManager[None]:
        return writing("checkpoint.uri", self.root)

    def _commit(self, temporary: Path, progress: Progress, files: dict[str, dict[str, Any]]) -> float:
        assert self.claim is not None
        self.claim.check()  # a newer attempt clears the folder away: that is then the cause
        self._check_written(temporary, files)
        now = time.time()
        manifest = Manifest(
            progress=progress,
            attempt=self.claim.attempt,
            world_size=self.world.size,
            time=now,
            fingerprint=self.fingerprint,
            files=files,
            versions=versions(),
        )
        with self._writing():
            manifest.write(temporary)
            self.claim.check()
            mf.commit(temporary, mf.step_folder(self.root, progress.step))
            self.claim.check()
            mf.retain(self.root, self.keep, spare=best_step(progress.metrics, self.metric))
        return now

    def _check_written(self, temporary: Path, files: dict[str, dict[str, Any]]) -> None:
        """Nodes that have a folder each under this path would make a checkpoint of which every node has only its own part."""
        end = time.monotonic() + SEEN_SECONDS
        for name, entry in files.items():
            while problem := mf.verify_size(temporary, name, entry):
                if time.monotonic() >= end:
                    raise StorageError(
                        f"checkpoint.uri: rank 0 does not see what another rank has written: {problem} in {temporary}; "
                        f"{self.root} must be one volume for all pods"
                    )
                time.sleep(LAST_POLL_SECONDS)

    def _candidates(self) -> list[str]:
        assert self.claim is not None
        self.claim.check()  # what is half written may be a newer attempt's
        with self._writing():
            for name in mf.remove_abandoned(self.root):
                log.info("removed the unfinished checkpoint %s", name)
            return [path.name for path in mf.complete_checkpoints(self.root)]

    def _problems(self, folder: Path) -> str:
        """What any rank finds wrong with a checkpoint; empty if nothing is. All ranks call it."""
        found = self.world.together(lambda: self._verify(folder))
        return "; ".join(dict.fromkeys(filter(None, found)))

    def _verify(self, folder: Path) -> str | None:
        """Each rank reads a share of the files, so that verifying takes no longer with more of them.

        Raises:
            StorageError: a file cannot be read. That says nothing of what is in it, and next time it may be.
        """
        file = folder / mf.MANIFEST
        try:
            manifest = mf.read_manifest(folder)
            for name in sorted(manifest.files)[self.world.rank :: self.world.size]:
                file = folder / name
                if problem := mf.verify_file(folder, name, manifest.files[name]):
                    return problem
        except ValueError as error:
            return str(error)
        except OSError as error:
            raise StorageError(
                f"checkpoint.uri: {file} cannot be read: {error}; rename {folder} to resume from the checkpoint before it"
            ) from error
        return None

    def _set_aside(self, names: list[str]) -> None:
        if self.claim is None:
            return
        for name in names:
            self.claim.check()
            with self._writing():
                (self.root / name).rename(self.root / f"{name}.corrupt-{self.claim.attempt}")
