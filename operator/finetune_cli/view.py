"""What a person sees of a job, as pure functions: one line for its state, one set of figures for the bar."""

from dataclasses import dataclass

from finetune_api.job import FineTuneJob
from finetune_api.reports import ProgressReport
from finetune_api.status import State

FINISHED = (State.COMPLETE, State.FAILED)


@dataclass(frozen=True)
class Figures:
    """What stands beside the progress bar."""

    step: int
    total_steps: int | None
    loss: str
    tokens_per_second: str
    eta: str


def state_line(job: FineTuneJob) -> str:
    """The job's state in one line, such as `Pending (Unschedulable): 0/2 nodes are available`."""
    status = job.status
    state = status.state.value if status.state else "Pending"
    reason = f" ({status.reason})" if status.reason and status.reason != state else ""
    message = f": {status.message}" if status.message else ""
    return f"{state}{reason}{message}"


def headline(job: FineTuneJob) -> tuple[object, ...]:
    """What is worth a new line when it changes. While the job runs the message repeats the figures, so it is left out."""
    status = job.status
    message = None if status.state is State.RUNNING else status.message
    return status.state, status.reason, status.restarts, message


def figures(job: FineTuneJob, report: ProgressReport | None) -> Figures | None:
    """The newest figures: the trainer's own where it answers, else the coarser ones in status; None while it loads."""
    if report is not None:
        if report.total_steps is None:
            return None
        return Figures(
            report.step,
            report.total_steps,
            _number(report.loss, 4),
            _number(report.tokens_per_second, 0),
            duration(report.eta_seconds),
        )
    progress = job.status.progress
    if progress is None or progress.total_steps is None:
        return None
    return Figures(
        progress.step,
        progress.total_steps,
        _number(progress.loss, 4),
        _number(progress.tokens_per_second, 0),
        duration(progress.eta_seconds),
    )


def duration(seconds: float | None) -> str:
    """Seconds as `1h02m`, `3m05s` or `7s`; `-` where unknown."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def _number(value: float | str | None, digits: int) -> str:
    return "-" if value is None else f"{float(value):.{digits}f}"
