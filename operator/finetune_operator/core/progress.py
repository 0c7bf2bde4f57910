"""`status.progress`: rank 0's reports in a form for people, written seldom."""

from datetime import datetime, timedelta

from finetune_api.reports import Activity, MetricReport, ProgressReport, TerminationReport
from finetune_api.status import MAX_METRICS, FineTuneJobStatus, MetricStatus, ProgressStatus
from finetune_operator.core.attempts import absorb, absorb_reports
from finetune_operator.core.observe import Observed
from finetune_operator.core.settings import PlanConfig

_PHASES = {
    Activity.LOADING: 0,
    Activity.TRAINING: 1,
    Activity.EVALUATING: 1,
    Activity.CHECKPOINTING: 1,
    Activity.EXPORTING: 2,
    Activity.DONE: 3,
}
"""Activities that come and go within a phase are no reason to write at once."""


def number(value: float | None) -> str | None:
    """A number as text; status has no floats."""
    return None if value is None else f"{value:.6g}"


def metrics(reports: list[MetricReport]) -> list[MetricStatus]:
    """Metrics as text."""
    return [
        MetricStatus(name=m.name, value=f"{m.value:.6g}", base_value=f"{m.base_value:.6g}", step=m.step)
        for m in reports[:MAX_METRICS]
    ]


def summary(step: int, total: int | None) -> str:
    """For example `120/400 (30%)`; empty before anything is known."""
    return f"{step}/{total} ({100 * step // total}%)" if total else str(step or "")


def is_due(status: FineTuneJobStatus, report: ProgressReport, now: datetime, config: PlanConfig) -> bool:
    """Whether a report is to be written now: after the interval, or when the attempt enters another phase."""
    old = status.progress
    if old is None or old.update_time is None or old.activity is None:
        return True
    if _PHASES[old.activity] != _PHASES[report.activity]:
        return True
    if old.base_eval_loss is None and report.base_eval_loss is not None:
        return True
    return now - old.update_time >= timedelta(seconds=config.progress_interval_seconds)


def take_report(status: FineTuneJobStatus, report: ProgressReport, now: datetime) -> FineTuneJobStatus:
    """A copy with all that the report tells."""
    status = absorb(
        status,
        report.attempt,
        step=report.step,
        resumed_from=report.resumed_from_step,
        checkpoint=report.last_checkpoint_step,
        checkpoint_time=report.last_checkpoint_time,
        model_revision=report.model_revision,
    )
    old = status.progress
    total = report.total_steps or (old.total_steps if old else None)
    new = ProgressStatus(
        summary=summary(report.step, total),
        activity=report.activity,
        step=report.step,
        total_steps=total,
        epoch=number(report.epoch),
        loss=number(report.loss) or (old.loss if old else None),
        eval_loss=number(report.eval_loss) or (old.eval_loss if old else None),
        base_eval_loss=number(report.base_eval_loss) or (old.base_eval_loss if old else None),
        tokens_per_second=number(report.tokens_per_second),
        eta_seconds=round(report.eta_seconds) if report.eta_seconds is not None else None,
        update_time=old.update_time if old else None,
        metrics=metrics(report.metrics) or (old.metrics if old else []),
    )
    if new == old and new.update_time is not None:
        return status
    return status.model_copy(update={"progress": new.model_copy(update={"update_time": now})})


def take_all(status: FineTuneJobStatus, observed: Observed, now: datetime) -> FineTuneJobStatus:
    """A copy with all that is known of a running attempt, at its end: the newest report and the pods' last messages."""
    report = observed.progress
    if report is not None and status.attempts and report.attempt == status.attempts[-1].number:
        status = take_report(status, report, now)
    return halted(absorb_reports(status, observed))


def halted(status: FineTuneJobStatus) -> FineTuneJobStatus:
    """A copy in which nothing is going on any more: as far as the newest attempt is known to have come, no activity."""
    old = status.progress
    if old is None or not status.attempts:
        return status
    step = max(old.step, status.attempts[-1].to_step or 0)
    changes = {"activity": None, "eta_seconds": None, "step": step, "summary": summary(step, old.total_steps)}
    return status.model_copy(update={"progress": old.model_copy(update=changes)})


def take_result(status: FineTuneJobStatus, report: TerminationReport, now: datetime) -> FineTuneJobStatus:
    """A copy with the result that rank 0 left."""
    old = status.progress or ProgressStatus(summary="")
    total = report.total_steps or old.total_steps
    progress = old.model_copy(
        update={
            "summary": summary(report.step, total),
            "activity": Activity.DONE,
            "step": report.step,
            "total_steps": total,
            "loss": number(report.loss) or old.loss,
            "eval_loss": number(report.eval_loss) or old.eval_loss,
            "base_eval_loss": number(report.base_eval_loss) or old.base_eval_loss,
            "eta_seconds": None,
            "update_time": now,
            "metrics": metrics(report.metrics) or old.metrics,
        }
    )
    return status.model_copy(update={"progress": progress})
