"""What is kept of a local job between two runs: its identity, its manifest and its status, in a folder beside its checkpoints.

The stand-in for the API server's store. One run at a time: the lock is inherited by the trainer, so it is free only once the
last process of a run is gone, whatever became of the others.
"""

import fcntl
import json
import os
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_api.job import FineTuneJob
from finetune_api.status import FineTuneJobStatus
from finetune_operator.core.conditions import is_finished
from finetune_operator.local.machine import LocalError

_FILE = "job.json"


@dataclass
class Folder:
    """The folder of one job, locked."""

    path: Path
    lock: int
    """File descriptor whose lock says that the job runs."""
    record: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, root: Path, namespace: str, name: str) -> "Folder":
        """Opens and locks the folder of a job, which may be new.

        Raises:
            LocalError: it cannot be written, another process holds it, or what it holds cannot be read.
        """
        path = root / f"{namespace}.{name}.run"  # neither has a dot: no two jobs share a folder
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise LocalError(f"checkpoint.uri: {path} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock, 32, 0).decode(errors="replace").strip()
            os.close(lock)
            raise LocalError(
                f"`{name}` is running already (process {owner or '?'}), or what is left of it is saving a checkpoint; "
                f"wait for it, or end it (lock: {path / 'lock'})"
            ) from None
        except OSError as error:
            os.close(lock)
            raise LocalError(f"checkpoint.uri: {path} cannot be locked: {error.strerror}") from error
        try:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            os.close(lock)
            raise LocalError(f"checkpoint.uri: {path} cannot be written: {error.strerror}") from error
        return cls(path, lock, _read(path / _FILE))

    def close(self) -> None:
        """Lets go of the lock."""
        os.close(self.lock)

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The job as it was admitted last; None: there was no run yet, or a fresh one was asked for."""
        manifest: dict[str, Any] | None = self.record.get("manifest")
        return manifest

    def forget(self) -> None:
        """Begins anew: the earlier run's record and logs are put aside, its checkpoints and its output are not touched."""
        if self.record:
            aside = self.path / f"earlier-{self.record['uid'][:8]}"
            aside.mkdir(exist_ok=True)
            for file in (*self.path.glob("attempt-*"), self.path / _FILE):
                file.rename(aside / file.name)
            self.record = {}

    def take(self, manifest: dict[str, Any]) -> FineTuneJob:
        """The job of an admitted manifest, with the identity and the status that it had, or with new ones.

        Active time begins anew, as after a suspension, however the earlier run ended.

        Raises:
            LocalError: the status was written by another version.
        """
        if not self.record:
            now = datetime.now(UTC).replace(microsecond=0).isoformat()
            self.record = {"uid": str(uuid.uuid4()), "generation": 1, "created": now, "status": {}}
        elif manifest["spec"] != self.record["manifest"]["spec"]:
            self.record["generation"] += 1
        self.record["manifest"] = manifest
        metadata = {
            **manifest["metadata"],
            "uid": self.record["uid"],
            "generation": self.record["generation"],
            "creationTimestamp": self.record["created"],
        }
        try:
            job = FineTuneJob.from_object({**manifest, "metadata": metadata, "status": self.record["status"]})
            if is_finished(job.status):
                return job
            return job.model_copy(update={"status": job.status.model_copy(update={"start_time": None})})
        except ValidationError as error:
            raise LocalError(
                f"{self.path / _FILE}: not readable by this version; `--fresh` begins anew: {error}"
            ) from error

    def save(self, status: FineTuneJobStatus) -> None:
        """Keeps the status, so that it survives a power cut."""
        self.record["status"] = status.to_wire()
        new = self.path / f".{_FILE}.new"
        with new.open("w", encoding="utf-8") as file:
            json.dump(self.record, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path / _FILE)


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise LocalError(f"{path}: cannot be read ({error}); rename it to begin anew") from error
    return record
