"""Why an attempt ended: the first cause over all pods of the gang.

One failure makes the rest of the gang fail too, in its own words. So causes are ranked: what started it (a killed rank, a
lost node) before what may be either (a lost peer, a deleted pod: the earlier one wins) before what only follows (SIGTERM).
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum

from pydantic import ValidationError

from finetune_api.reasons import EXIT_CODES, FAILURES, Reason, Recovery
from finetune_api.reports import TerminationReport
from finetune_operator.core.observe import ObservedJob, ObservedPod

_DISRUPTIONS = {
    "EvictionByEvictionAPI": Reason.EVICTED,
    "TerminationByKubelet": Reason.EVICTED,
    "PreemptionByScheduler": Reason.PREEMPTED,
    "DeletionByTaintManager": Reason.NODE_LOST,
    "DeletionByPodGC": Reason.NODE_LOST,
}
"""Reasons of the DisruptionTarget condition."""
_POD_REASONS = {"Evicted": Reason.EVICTED, "Preempting": Reason.PREEMPTED, "NodeLost": Reason.NODE_LOST}
"""`status.reason` of a failed pod."""
_REJECTIONS = {"UnexpectedAdmissionError", "NodeAffinity", "NodePorts", "TopologyAffinityError", "AdmissionError"}
"""`status.reason` of a pod that its kubelet refused, beside `OutOfcpu` and its like (pkg/kubelet/lifecycle/predicate.go)."""
_LATEST = datetime.max.replace(tzinfo=UTC)
_LOG_LIMIT = 600


class _Rank(IntEnum):
    ROOT = 0
    EITHER = 1
    FOLLOWS = 2


_RANKS = {
    Reason.COMMUNICATION_ERROR: _Rank.EITHER,
    Reason.POD_DELETED: _Rank.EITHER,
    Reason.TERMINATED: _Rank.FOLLOWS,
    Reason.SUPERSEDED: _Rank.FOLLOWS,
}


@dataclass(frozen=True, slots=True)
class Cause:
    """Why an attempt ended."""

    reason: Reason
    message: str
    pod: str | None = None
    exit_code: int | None = None
    time: datetime | None = None
    traceback: str = ""

    @property
    def recovery(self) -> Recovery:
        return FAILURES[self.reason].recovery

    @property
    def hint(self) -> str:
        return FAILURES[self.reason].hint


def parse_report(pod: ObservedPod) -> TerminationReport | None:
    """The trainer's last message; None while it runs, or where it left none (then the message is the end of its log)."""
    if pod.terminated is None or not pod.terminated.message.lstrip().startswith("{"):
        return None
    try:
        return TerminationReport.model_validate_json(pod.terminated.message)
    except ValidationError:
        return None


def first_cause(gang: tuple[ObservedPod, ...], job: ObservedJob | None) -> Cause | None:
    """The cause of an attempt's end; None while nothing says that it has failed.

    Args:
        gang: the attempt's pods.
        job: its Job; None if that is gone, which is an end too.
    """
    causes = [cause for pod in gang if (cause := pod_cause(pod)) is not None]
    if causes:
        return min(causes, key=lambda c: (_RANKS.get(c.reason, _Rank.ROOT), c.time or _LATEST, c.pod or ""))
    if job is None or job.deleting:
        return Cause(Reason.POD_DELETED, "Somebody or something deleted the attempt's Job.")
    if not job.failed:
        return None
    missing = sorted(set(range(job.num_nodes)) - {pod.index for pod in gang})
    if missing:
        return Cause(Reason.POD_DELETED, f"Pod {missing[0]} of the gang is gone.")
    return Cause(Reason.POD_FAILED, job.message or "The attempt's Job failed without saying why.")


def pod_cause(pod: ObservedPod) -> Cause | None:
    """What one pod says about the end of its gang; None while it is well, and after success."""
    if pod.succeeded:
        return None
    if pod.terminated is None and pod.phase != "Failed":
        return _going(pod)
    end = pod.terminated
    time = end.finished_at if end else pod.delete_time
    report = parse_report(pod)
    reason, message = _ended(pod, report)
    exit_code = end.exit_code if end else None
    traceback = report.traceback if report and report.reason is reason else ""
    return Cause(reason, message, pod=pod.name, exit_code=exit_code, time=time, traceback=traceback)


def _going(pod: ObservedPod) -> Cause | None:
    """A pod that has not ended, but is about to."""
    if pod.disruption is not None:
        reason = _DISRUPTIONS.get(pod.disruption, Reason.EVICTED)
        return Cause(
            reason, _where(pod, f"{pod.name} is taken away ({pod.disruption})"), pod.name, time=pod.delete_time
        )
    if pod.deleting:
        return Cause(Reason.POD_DELETED, f"{pod.name} was deleted.", pod.name, time=pod.delete_time)
    return None


def _where(pod: ObservedPod, text: str) -> str:
    return f"{text}, node {pod.node}." if pod.node else f"{text}."


def _ended(pod: ObservedPod, report: TerminationReport | None) -> tuple[Reason, str]:
    end = pod.terminated
    if end is not None and end.reason == "OOMKilled":
        return Reason.OUT_OF_MEMORY_HOST, _where(pod, f"{pod.name} used more memory than its limit")
    own = report.reason if report else EXIT_CODES.get(end.exit_code) if end else None
    if own in (None, Reason.TERMINATED, Reason.COMMUNICATION_ERROR):
        platform = _platform(pod, told=own is not None)
        if platform is not None:
            return platform
    if own is not None:
        text = (
            report.message if report and report.message else f"{pod.name} ended with exit code {end and end.exit_code}"
        )
        return own, text
    return Reason.POD_FAILED, _failed_text(pod)


def _platform(pod: ObservedPod, *, told: bool) -> tuple[Reason, str] | None:
    """What the platform did to a pod that was told to stop, or that could not say anything."""
    if pod.disruption is not None:
        reason = _DISRUPTIONS.get(pod.disruption, Reason.EVICTED)
        return reason, pod.message or _where(pod, f"{pod.name} was taken away ({pod.disruption})")
    if pod.reason == "Evicted":  # no DisruptionTarget: it used more than its own limit of local storage
        return Reason.POD_FAILED, _where(pod, f"{pod.name}: {pod.message}".rstrip(". "))
    if pod.reason in _POD_REASONS:
        return _POD_REASONS[pod.reason], pod.message or _where(pod, f"{pod.name}: {pod.reason}")
    if pod.terminated is None and (pod.reason in _REJECTIONS or pod.reason.startswith("OutOf")):
        return Reason.POD_REJECTED, _where(pod, f"{pod.name}: {pod.reason}: {pod.message}".rstrip(". "))
    killed = pod.terminated is None or pod.terminated.exit_code in (137, 143)
    if pod.deleting and (told or killed):
        return Reason.POD_DELETED, f"{pod.name} was deleted."
    return None


def _failed_text(pod: ObservedPod) -> str:
    end = pod.terminated
    if end is None:
        return f"{pod.name}: {pod.reason or 'Failed'}: {pod.message}".rstrip(": ")
    last_lines = end.message.strip()[-_LOG_LIMIT:]
    text = f"{pod.name} ended with exit code {end.exit_code} ({end.reason or 'no reason given'}) and left no report"
    return f"{text}; its log ends: {last_lines}" if last_lines else f"{text}."
