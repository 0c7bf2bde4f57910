"""Who may write where: an attempt's claim on its checkpoint folder, and a job's claim on its output folder.

A claim is a small file that its owner reads again before it commits, deletes or exports anything. An older attempt that was
believed dead (a node cut off from the network) finds a newer claim there and ends itself.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.launch import JobIdentity, LaunchSpec
from finetune_trainer.errors import ConfigError, SupersededError, reading, writing
from finetune_trainer.files import write_json

ATTEMPT_FILE = "attempt.json"
OUTPUT_FILE = "finetunejob.json"


@dataclass(frozen=True)
class AttemptClaim:
    """One attempt's right to write into the checkpoint folder."""

    folder: Path
    uid: str
    attempt: int

    @classmethod
    def take(cls, spec: LaunchSpec) -> "AttemptClaim":
        """Claims the folder for this attempt; rank 0 only.

        Raises:
            SupersededError: a newer attempt has claimed it.
            ConfigError: it belongs to another job, or cannot be.
            StorageError: it cannot be written.
        """
        folder = Path(spec.checkpoint.dir)
        claim = cls(folder, spec.job.uid, spec.attempt)
        with writing("checkpoint.uri", folder):
            with _path_of("checkpoint.uri", folder):
                folder.mkdir(parents=True, exist_ok=True)
            other = _read(folder / ATTEMPT_FILE)
            if other is not None and other["uid"] != claim.uid:
                raise ConfigError(
                    f"checkpoint.uri: {folder} belongs to another FineTuneJob (uid {other['uid']}); set another "
                    "`checkpoint.uri`, or delete the folder if that job is gone"
                )
            if other is not None and other["attempt"] > claim.attempt:
                raise SupersededError(f"attempt {other['attempt']} owns {folder}; this is attempt {claim.attempt}")
            write_json(folder / ATTEMPT_FILE, {"uid": claim.uid, "attempt": claim.attempt})
        return claim

    def check(self) -> None:
        """To be called right before anything is committed or deleted; rank 0 only.

        Raises:
            SupersededError: the folder has been claimed by another attempt since.
            StorageError: it cannot be read.
        """
        with reading("checkpoint.uri", self.folder):
            other = _read(self.folder / ATTEMPT_FILE)
        if other is None or other["uid"] != self.uid or other["attempt"] != self.attempt:
            owner = "nobody" if other is None else f"attempt {other['attempt']}"
            raise SupersededError(f"{self.folder} is now owned by {owner}; this is attempt {self.attempt}")


def claim_output(spec: LaunchSpec) -> None:
    """Claims the output folder at the start, so that a job does not train for hours to find it taken; rank 0 only.

    An absent or empty folder is taken; one of a job with the same namespace and name will be replaced at the end.

    Raises:
        ConfigError: it holds another job's output, or files that no job has written, or it cannot be.
        StorageError: it cannot be written.
    """
    folder = Path(spec.output_dir)
    with writing("output.uri", folder), _path_of("output.uri", folder):
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints = Path(spec.checkpoint.dir)
        entries = [e for e in folder.iterdir() if e.name != "lost+found" and not checkpoints.is_relative_to(e)]
        other = _read(folder / OUTPUT_FILE)
        if other is None and entries:
            raise ConfigError(
                f"output.uri: {folder} is not empty and was not written by a FineTuneJob (it has {entries[0].name}); "
                "set another `output.uri`"
            )
        if other is not None and (other["namespace"], other["name"]) != (spec.job.namespace, spec.job.name):
            raise ConfigError(
                f"output.uri: {folder} holds the output of FineTuneJob {other['namespace']}/{other['name']}; "
                "set another `output.uri`"
            )
        if other is None:
            write_json(folder / OUTPUT_FILE, output_claim(spec.job))
        elif not os.access(folder, os.W_OK):
            raise ConfigError(f"output.uri: {folder} cannot be written by the trainer (uid {os.getuid()})")


@contextmanager
def _path_of(field: str, folder: Path) -> Iterator[None]:
    """A path that cannot be is the job's mistake; anything else is the volume's."""
    try:
        yield
    except (NotADirectoryError, FileExistsError, PermissionError) as error:
        raise ConfigError(
            f"{field}: {folder} cannot be written by the trainer (uid {os.getuid()}): {error.strerror}"
        ) from error


def output_claim(job: JobIdentity) -> dict[str, Any]:
    """The content of `finetunejob.json`."""
    return {"namespace": job.namespace, "name": job.name, "uid": job.uid}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{path}: broken JSON: {error}; delete the file if its job is gone") from error
    return value
