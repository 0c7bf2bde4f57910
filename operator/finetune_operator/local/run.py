"""One job on this machine: observe → plan → act → keep the status, until it has finished or is suspended.

The stand-in for the operator's shell, the Job controller and the kubelet. Everything that is decided is decided by
`core.plan`, with the same values as in a cluster.
"""

import json
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from finetune_api.job import LABEL_ATTEMPT, FineTuneJob
from finetune_api.reports import ProgressReport
from finetune_api.status import FineTuneJobStatus, State
from finetune_operator.core.build.configmap import LAUNCH_FILE
from finetune_operator.core.conditions import is_finished
from finetune_operator.core.observe import ANNOTATION_PREVIOUS_END, Observed, ObservedJob, ObservedPod, Terminated
from finetune_operator.core.plan import plan
from finetune_operator.core.settings import PlanConfig
from finetune_operator.core.situation import Action, Delete, Kind
from finetune_operator.local.machine import NODE

_LOG = logging.getLogger(__name__)


class Running(Protocol):
    """An attempt's process, as `process.Trainer` is one."""

    def poll(self) -> int | None:
        """Its exit code; negative: killed by that signal; None while it runs."""

    def send_signal(self, number: int) -> None: ...

    def progress(self) -> ProgressReport | None:
        """Rank 0's newest report."""

    def message(self) -> str:
        """What it left when it ended."""


StartAttempt = Callable[[dict[str, Any], dict[str, Any]], Running]
"""Starts what a Job manifest asks for, given the content of `launch.json`."""


@dataclass
class Attempt:
    """One attempt: a Job with one pod, which is one process."""

    name: str
    number: int
    created_at: datetime
    previous_end: str | None
    running: Running
    deleted_at: datetime | None = None
    killed: bool = False
    terminated: Terminated | None = None

    def job(self) -> ObservedJob | None:
        """The Job; None once it is deleted."""
        if self.deleted_at is not None:
            return None
        end = self.terminated
        return ObservedJob(
            name=self.name,
            uid=self.name,
            version=1,
            attempt=self.number,
            created_at=self.created_at,
            num_nodes=1,
            complete=end is not None and end.exit_code == 0,
            failed=end is not None and end.exit_code != 0,
            previous_end=self.previous_end,
        )

    def pod(self) -> ObservedPod:
        """The pod; it stays, so that its last message is read."""
        end = self.terminated
        return ObservedPod(
            name=f"{self.name}-0",
            uid=f"{self.name}-0",
            version=1,
            attempt=self.number,
            index=0,
            phase="Running" if end is None else "Succeeded" if end.exit_code == 0 else "Failed",
            node=NODE,
            scheduled=True,
            running=end is None,
            delete_time=self.deleted_at,
            terminated=end,
        )


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


@dataclass
class LocalRun:
    """A job that is run here."""

    job: FineTuneJob
    config: PlanConfig
    start: StartAttempt
    save: Callable[[FineTuneJobStatus], None]
    now: Callable[[], datetime] = _now
    attempts: list[Attempt] = field(default_factory=list)
    _launches: dict[str, str] = field(default_factory=dict)
    _kept: bool = True
    """Whether the newest status is saved."""
    _complaint: str = ""

    def tick(self) -> None:
        """Looks, decides and acts; again at once where something was done, since it may need a word of its own."""
        for _ in range(3):
            self._reap()
            decision = plan(self.job, self._observed(), self.now(), self.config)
            for action in decision.actions:
                self._do(action)
            if decision.status != self.job.status:
                self.job = self.job.model_copy(update={"status": decision.status})
                self._kept = False
            self._keep()
            if not decision.actions:
                return

    def _keep(self) -> None:
        """Saves the status; where that fails it is tried again at the next look, and training goes on."""
        if self._kept:
            return
        try:
            self.save(self.job.status)
        except OSError as error:
            if self._complaint != str(error):
                self._complaint = str(error)
                _LOG.warning("the status cannot be saved, it is tried again: %s", error)
        else:
            self._kept, self._complaint = True, ""

    def suspend(self) -> None:
        """As `spec.suspend: true`: the trainer saves a checkpoint and leaves."""
        self.job = self.job.model_copy(update={"spec": self.job.spec.model_copy(update={"suspend": True})})

    def kill(self) -> None:
        """Ends the trainer at once; the last complete checkpoint counts."""
        for attempt in self.attempts:
            if attempt.terminated is None:
                attempt.running.send_signal(signal.SIGKILL)

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do: finished or suspended, and no process runs."""
        over = is_finished(self.job.status) or self.job.status.state is State.SUSPENDED
        return over and all(attempt.terminated is not None for attempt in self.attempts)

    def progress(self) -> ProgressReport | None:
        """The newest report of the attempt that runs."""
        return self.attempts[-1].running.progress() if self.attempts else None

    def _observed(self) -> Observed:
        jobs = tuple(job for attempt in self.attempts if (job := attempt.job()) is not None)
        return Observed(jobs=jobs, pods=tuple(attempt.pod() for attempt in self.attempts), progress=self.progress())

    def _reap(self) -> None:
        """Takes notice of processes that have ended, and ends those whose grace period is over."""
        grace = timedelta(seconds=self.config.termination_grace_seconds)
        for attempt in self.attempts:
            if attempt.terminated is not None:
                continue
            code = attempt.running.poll()
            if code is not None:
                code = 128 - code if code < 0 else code
                reason = "Completed" if code == 0 else "Error"
                attempt.terminated = Terminated(code, reason, attempt.running.message(), self.now())
            elif attempt.deleted_at is not None and self.now() >= attempt.deleted_at + grace and not attempt.killed:
                attempt.killed = True
                attempt.running.send_signal(signal.SIGKILL)

    def _do(self, action: Action) -> None:
        if isinstance(action, Delete):
            if action.kind is Kind.JOB:
                self._delete(action.name)
        elif action.kind is Kind.CONFIG_MAP:
            self._launches[action.name] = action.manifest["data"][LAUNCH_FILE]
        elif action.kind is Kind.JOB:
            self._start(action.name, action.manifest)

    def _start(self, name: str, manifest: dict[str, Any]) -> None:
        metadata = manifest["metadata"]
        launch = json.loads(self._launches.pop(name))
        self.attempts.append(
            Attempt(
                name=name,
                number=int(metadata["labels"][LABEL_ATTEMPT]),
                created_at=self.now(),
                previous_end=metadata.get("annotations", {}).get(ANNOTATION_PREVIOUS_END),
                running=self.start(launch, manifest),
            )
        )

    def _delete(self, name: str) -> None:
        for attempt in self.attempts:
            if attempt.name == name and attempt.deleted_at is None:
                attempt.deleted_at = self.now()
                if attempt.terminated is None:
                    attempt.running.send_signal(signal.SIGTERM)
