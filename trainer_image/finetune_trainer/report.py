"""The two documents that leave a pod: the progress report and the termination message. Pure functions of rank states."""

from datetime import UTC, datetime

from finetune_api.reasons import Reason
from finetune_api.reports import (
    TERMINATION_MESSAGE_LIMIT_BYTES,
    TRACEBACK_LIMIT,
    Activity,
    MetricReport,
    ProgressReport,
    TerminationReport,
)
from finetune_trainer.state import RankState

MESSAGE_LIMIT = 1500


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _metrics(state: RankState) -> list[MetricReport]:
    """Beside the held-out loss, which has fields of its own."""
    return [
        MetricReport(name=name, value=m["value"], base_value=m["base"], step=int(m["step"]))
        for name, m in state.metrics.items()
        if name != "EvalLoss"
    ]


def progress_report(state: RankState) -> ProgressReport:
    """What `GET /progress` answers."""
    heartbeat = _time(state.heartbeat_time)
    assert heartbeat is not None
    return ProgressReport(
        attempt=state.attempt,
        activity=Activity(state.activity),
        step=state.step,
        total_steps=state.total_steps,
        epoch=state.epoch,
        loss=state.loss,
        learning_rate=state.learning_rate,
        grad_norm=state.grad_norm,
        tokens_per_second=state.tokens_per_second,
        samples_per_second=state.samples_per_second,
        eta_seconds=state.eta_seconds,
        peak_memory_bytes=state.memory_peak_bytes or None,
        base_eval_loss=state.base_eval_loss,
        eval_loss=state.eval_loss,
        resumed_from_step=state.resumed_from_step,
        last_checkpoint_step=state.last_checkpoint_step,
        last_checkpoint_time=_time(state.last_checkpoint_time),
        model_revision=state.model_revision,
        heartbeat_time=heartbeat,
        metrics=_metrics(state),
    )


def termination_report(
    state: RankState | None,
    reason: Reason | None = None,
    message: str = "",
    rank: int | None = None,
    traceback: str = "",
) -> TerminationReport:
    """What the container leaves behind; always fits Kubernetes' limit.

    Args:
        state: the first local rank's newest facts; None before its first heartbeat.
        reason: why it ended; None after success.
        message: one sentence for people.
        rank: the rank it came from.
        traceback: its end is kept, the innermost frames.
    """
    facts = state or RankState(rank=0, attempt=0)
    # A file's name may be no UTF-8, and half of a character stands in a text for what is none.
    message, traceback = (text.encode(errors="replace").decode() for text in (message, traceback))
    for limit in (TRACEBACK_LIMIT, 700, 0):
        report = TerminationReport(
            reason=reason,
            message=message if len(message) <= MESSAGE_LIMIT else message[: MESSAGE_LIMIT - 1] + "…",
            rank=rank,
            traceback=traceback[len(traceback) - limit :] if len(traceback) > limit else traceback,
            step=facts.step,
            total_steps=facts.total_steps,
            resumed_from_step=facts.resumed_from_step,
            last_checkpoint_step=facts.last_checkpoint_step,
            loss=facts.loss,
            base_eval_loss=facts.base_eval_loss,
            eval_loss=facts.eval_loss,
            model_revision=facts.model_revision,
            metrics=_metrics(facts),
        )
        if len(report.to_json().encode()) <= TERMINATION_MESSAGE_LIMIT_BYTES:
            return report
    # Only a message of 1,500 many-byte characters comes here.
    return report.model_copy(update={"message": message[:300]})
