"""The local shell with a fake process table: what `plan` decides is done to processes, and what they do reaches `plan`."""

import errno
import json
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pytest

from finetune_api.job import FineTuneJob
from finetune_api.reports import Activity, ProgressReport
from finetune_api.status import FineTuneJobStatus, State
from finetune_operator.local.machine import as_one_node
from finetune_operator.local.run import LocalRun
from tests.unit.operator.samples import CONFIG, NOW, job_body, progress, seconds


@dataclass
class Fake:
    """A supervisor's process."""

    launch: dict[str, Any]
    code: int | None = None
    text: str = ""
    report: ProgressReport | None = None
    signals: list[int] = field(default_factory=list)

    def poll(self) -> int | None:
        return self.code

    def send_signal(self, number: int) -> None:
        self.signals.append(number)

    def progress(self) -> ProgressReport | None:
        return self.report

    def message(self) -> str:
        return self.text

    def end(self, code: int, reason: str | None = None, **report: Any) -> None:
        self.text = json.dumps({"reason": reason, "message": f"why: {reason}" if reason else "", **report})
        self.code = code


class Table:
    """A machine: one job, its processes, a clock, and what is on disk."""

    def __init__(self, status: FineTuneJobStatus | None = None, **spec: Any) -> None:
        job = as_one_node(FineTuneJob.from_object(job_body(**spec)))
        self.processes: list[Fake] = []
        self.time = NOW
        self.saved = status or job.status
        self.run = LocalRun(
            job.model_copy(update={"status": self.saved}), CONFIG, self._start, self._save, now=lambda: self.time
        )

    def _start(self, launch: dict[str, Any], _: dict[str, Any]) -> Fake:
        self.processes.append(Fake(launch))
        return self.processes[-1]

    def _save(self, status: FineTuneJobStatus) -> None:
        self.saved = status

    def tick(self, after: float = 0) -> FineTuneJobStatus:
        self.time += seconds(after)
        self.run.tick()
        assert self.saved == self.run.job.status, "what was decided is on disk"
        return self.saved


def test_a_job_of_two_nodes_is_one_process_with_all_ranks() -> None:
    table = Table(trainer={"numNodes": 2, "numProcPerNode": 4}, training={"globalBatchSize": 16})
    status = table.tick()
    assert len(table.processes) == 1
    launch = table.processes[0].launch
    assert (launch["attempt"], launch["numNodes"], launch["numProcPerNode"]) == (1, 1, 8)
    assert launch["training"]["gradientAccumulationSteps"] == 2
    assert launch["rendezvous"]["host"] == "localhost"
    assert status.state is State.STARTING and status.message == "Loading model and data on this machine."
    table.processes[0].report = progress(step=3, activity=Activity.TRAINING)
    status = table.tick(after=20)
    assert status.state is State.RUNNING and status.progress is not None and status.progress.step == 3


def test_success_is_complete_with_the_result_of_the_last_message() -> None:
    table = Table()
    table.tick()
    table.processes[0].end(0, step=6, totalSteps=6, baseEvalLoss=2.0, evalLoss=1.5)
    status = table.tick()
    assert status.state is State.COMPLETE and table.run.ended
    assert status.message == "Held-out loss 2 before, 1.5 after 6 steps. Output: pvc://data/out/tune"


def test_a_killed_rank_is_restarted_and_counted_until_the_limit() -> None:
    table = Table(recovery={"backoffLimit": 1})
    table.tick()
    table.processes[0].end(90, "RankKilled", step=5, lastCheckpointStep=4)
    status = table.tick()
    assert [p.launch["attempt"] for p in table.processes] == [1, 2]
    assert (status.restarts, status.counted_restarts) == (1, 1)
    assert status.attempts[0].lost_steps == 1
    assert status.message == "Loading model and data on this machine. Restart 1 after RankKilled at step 5."
    table.processes[1].end(90, "RankKilled", step=5)
    status = table.tick()
    assert status.state is State.FAILED and status.reason == "BackoffLimitExceeded" and table.run.ended
    assert len(table.processes) == 2


def test_attempts_without_progress_wait_as_in_a_cluster() -> None:
    table = Table(recovery={"backoffLimit": 9})
    table.tick()
    table.processes[0].end(82, "Hang")
    table.tick()
    table.processes[1].end(82, "Hang")
    status = table.tick()
    assert status.state is State.RESTARTING and "Waiting 10 s" in (status.message or "")
    table.tick(after=9)
    assert len(table.processes) == 2
    table.tick(after=1)
    assert len(table.processes) == 3


def test_a_mistake_of_the_user_fails_at_once() -> None:
    table = Table()
    table.tick()
    table.processes[0].end(87, "DataError")
    status = table.tick()
    assert status.state is State.FAILED and status.reason == "DataError"
    assert (status.message or "").startswith("why: DataError. Correct the file")


def test_a_supervisor_that_is_killed_is_known_by_its_log() -> None:
    table = Table()
    table.tick()
    table.processes[0].text, table.processes[0].code = "… Segmentation fault", -9
    table.tick()
    ended = table.saved.attempts[0]
    assert (ended.reason, ended.exit_code) == ("PodFailed", 137)
    assert "Segmentation fault" in (ended.message or "")


def test_interrupted_saves_and_the_next_run_goes_on() -> None:
    table = Table()
    table.tick()
    first = table.processes[0]
    table.run.suspend()
    assert table.tick().state is State.SUSPENDED and not table.run.ended, "the trainer is still saving"
    assert first.signals == [signal.SIGTERM]
    first.end(143, "Terminated", step=7, lastCheckpointStep=7)
    status = table.tick()
    assert table.run.ended and status.last_checkpoint is not None and status.last_checkpoint.step == 7

    again = Table(status=status)
    status = again.tick()
    assert [p.launch["attempt"] for p in again.processes] == [2]
    assert status.state is State.STARTING and status.restarts == 0, "going on is no restart"


def test_a_trainer_that_does_not_leave_is_killed_after_the_grace_period() -> None:
    table = Table()
    table.tick()
    table.run.suspend()
    table.tick()
    table.tick(after=CONFIG.termination_grace_seconds - 1)
    assert table.processes[0].signals == [signal.SIGTERM]
    table.tick(after=1)
    table.tick(after=1)
    assert table.processes[0].signals == [signal.SIGTERM, signal.SIGKILL]


def test_the_deadline_ends_the_process() -> None:
    table = Table(activeDeadlineSeconds=60)
    table.tick()
    status = table.tick(after=60)
    assert status.reason == "DeadlineExceeded" and table.processes[0].signals == [signal.SIGTERM]
    assert not table.run.ended
    table.processes[0].end(143, "Terminated")
    table.tick()
    assert table.run.ended


def test_a_run_that_was_killed_itself_is_taken_up_without_being_counted() -> None:
    """Its trainer left when it did: there is no Job, as when somebody has deleted it."""
    table = Table()
    table.tick()
    again = Table(status=table.saved)
    status = again.tick()
    assert [p.launch["attempt"] for p in again.processes] == [2]
    assert (status.attempts[0].reason, status.counted_restarts) == ("PodDeleted", 0)


def test_a_status_that_cannot_be_saved_is_saved_later_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    table = Table()
    save, table.run.save = table.run.save, _full_disk
    for _ in range(3):
        table.run.tick()
    assert len(table.processes) == 1 and table.saved.state is not State.RUNNING
    assert [record.message for record in caplog.records] == [
        "the status cannot be saved, it is tried again: [Errno 28] No space left on device"
    ]
    table.run.save = save
    table.run.tick()
    assert table.saved == table.run.job.status and table.saved.attempts


def _full_disk(_: FineTuneJobStatus) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_nothing_is_saved_while_nothing_changes() -> None:
    saves: list[datetime] = []
    table = Table()
    save: Callable[[FineTuneJobStatus], None] = table.run.save
    table.run.save = lambda status: (saves.append(table.time), save(status))[1]
    table.tick()
    count = len(saves)
    for _ in range(5):
        table.tick(after=1)
    assert len(saves) == count
