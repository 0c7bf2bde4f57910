"""The lines and figures of `finetune follow`."""

from datetime import UTC, datetime

import pytest

from finetune_api.job import FineTuneJob
from finetune_api.reports import Activity, ProgressReport
from finetune_cli.view import Figures, duration, figures, headline, state_line
from tests.contract.manifests import GOOD


def _job(**status: object) -> FineTuneJob:
    return FineTuneJob.from_object({**GOOD, "status": status})


def test_state_line_names_state_reason_and_message() -> None:
    job = _job(state="Pending", reason="Unschedulable", message="0/2 nodes are available")
    assert state_line(job) == "Pending (Unschedulable): 0/2 nodes are available"
    assert state_line(_job(state="Complete", reason="Complete", message="Done.")) == "Complete: Done."
    assert state_line(_job()) == "Pending"


def test_a_running_job_gets_a_new_line_for_a_restart_but_not_for_a_step() -> None:
    first = headline(_job(state="Running", reason="Training", message="step 1/9", restarts=0))
    assert headline(_job(state="Running", reason="Training", message="step 2/9", restarts=0)) == first
    assert headline(_job(state="Running", reason="Training", message="step 2/9", restarts=1)) != first


def test_the_trainers_own_figures_win_over_status() -> None:
    job = _job(progress={"summary": "1/9 (11%)", "step": 1, "totalSteps": 9, "loss": "2.5"})
    report = ProgressReport(
        attempt=1,
        activity=Activity.TRAINING,
        step=2,
        total_steps=9,
        loss=2.25,
        heartbeat_time=datetime(2026, 1, 1, tzinfo=UTC),
    )
    assert figures(job, report) == Figures(2, 9, "2.2500", "-", "-")
    assert figures(job, None) == Figures(1, 9, "2.5000", "-", "-"), "the same digits"
    assert figures(_job(), None) is None


@pytest.mark.parametrize(("seconds", "text"), [(None, "-"), (7.4, "7s"), (185, "3m05s"), (3720, "1h02m")])
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
