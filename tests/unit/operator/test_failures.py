"""Which cause is the first."""

import pytest

from finetune_api.reasons import Reason
from finetune_api.reports import TerminationReport
from finetune_operator.core.failures import first_cause
from finetune_operator.core.observe import ObservedJob, ObservedPod
from tests.unit.operator.samples import NOW, child, ended, pod, seconds

RUNNING = child(num_nodes=2)
FAILED = child(num_nodes=2, failed=True, message="Job has reached the specified backoff limit")


def told(reason: Reason, message: str = "it broke") -> str:
    return TerminationReport(reason=reason, message=message, step=40).to_json()


CASES: dict[str, tuple[list[ObservedPod], ObservedJob | None, Reason | None]] = {
    "all well": ([pod(), pod(index=1)], RUNNING, None),
    "no pods yet": ([], RUNNING, None),
    "one done, one running": ([ended(), pod(index=1)], RUNNING, None),
    "report": (
        [ended(code=81, message=told(Reason.OUT_OF_MEMORY_GPU)), pod(index=1)],
        RUNNING,
        Reason.OUT_OF_MEMORY_GPU,
    ),
    "exit code alone": ([ended(code=82)], RUNNING, Reason.HANG),
    "no report": ([ended(code=1, message="Traceback ...")], RUNNING, Reason.POD_FAILED),
    "broken report": ([ended(code=1, message='{"reason": "No')], RUNNING, Reason.POD_FAILED),
    "host memory": ([ended(code=137, why="OOMKilled")], RUNNING, Reason.OUT_OF_MEMORY_HOST),
    "killed rank before lost peers": (
        [
            ended(code=83, message=told(Reason.COMMUNICATION_ERROR), at=1),
            ended(index=1, code=90, message=told(Reason.RANK_KILLED), at=2),
        ],
        RUNNING,
        Reason.RANK_KILLED,
    ),
    "the earlier root": (
        [
            ended(code=87, message=told(Reason.DATA_ERROR), at=5),
            ended(index=1, code=88, message=told(Reason.CONFIG_ERROR), at=4),
        ],
        RUNNING,
        Reason.CONFIG_ERROR,
    ),
    "evicted, going": ([pod(delete_time=NOW, disruption="EvictionByEvictionAPI")], RUNNING, Reason.EVICTED),
    "evicted, gone": (
        [ended(code=143, message=told(Reason.TERMINATED), delete_time=NOW, disruption="EvictionByEvictionAPI")],
        RUNNING,
        Reason.EVICTED,
    ),
    "evicted, peers lost": (
        [
            ended(code=83, message=told(Reason.COMMUNICATION_ERROR), at=-1),
            pod(index=1, delete_time=NOW, disruption="EvictionByEvictionAPI"),
        ],
        RUNNING,
        Reason.EVICTED,
    ),
    "node pressure": (
        [
            pod(
                phase="Failed",
                running=False,
                reason="Evicted",
                message="low on memory",
                disruption="TerminationByKubelet",
            )
        ],
        RUNNING,
        Reason.EVICTED,
    ),
    "its own limit of local storage": (
        [pod(phase="Failed", running=False, reason="Evicted", message="Pod ephemeral local storage usage exceeds")],
        RUNNING,
        Reason.POD_FAILED,
    ),
    "preempted": ([pod(delete_time=NOW, disruption="PreemptionByScheduler")], RUNNING, Reason.PREEMPTED),
    "node lost": ([pod(delete_time=NOW, disruption="DeletionByTaintManager")], RUNNING, Reason.NODE_LOST),
    "node gone": ([pod(phase="Failed", running=False, disruption="DeletionByPodGC")], RUNNING, Reason.NODE_LOST),
    "pod deleted": ([pod(), pod(index=1, delete_time=NOW)], RUNNING, Reason.POD_DELETED),
    "pod deleted, then peers lost": (
        [ended(code=83, message=told(Reason.COMMUNICATION_ERROR), at=3), pod(index=1, delete_time=NOW)],
        RUNNING,
        Reason.POD_DELETED,
    ),
    "peers lost, then the Job controller deleted the rest": (
        [ended(code=83, message=told(Reason.COMMUNICATION_ERROR), at=0), pod(index=1, delete_time=NOW + seconds(1))],
        FAILED,
        Reason.COMMUNICATION_ERROR,
    ),
    "deleted pod that saved and left": (
        [ended(code=143, message=told(Reason.TERMINATED), delete_time=NOW)],
        RUNNING,
        Reason.POD_DELETED,
    ),
    "told to stop by nobody known": ([ended(code=143, message=told(Reason.TERMINATED))], RUNNING, Reason.TERMINATED),
    "superseded": ([ended(code=93, message=told(Reason.SUPERSEDED))], RUNNING, Reason.SUPERSEDED),
    "deleted but it failed by itself": (
        [ended(code=87, message=told(Reason.DATA_ERROR), delete_time=NOW)],
        RUNNING,
        Reason.DATA_ERROR,
    ),
    "Job gone": ([pod()], None, Reason.POD_DELETED),
    "Job going": ([pod()], child(deleting=True), Reason.POD_DELETED),
    "Job failed, a pod missing": ([pod()], FAILED, Reason.POD_DELETED),
    "Job failed, nobody knows why": ([pod(), pod(index=1)], FAILED, Reason.POD_FAILED),
    "a device that is gone": (
        [pod(phase="Failed", reason="UnexpectedAdmissionError", message="no healthy devices present")],
        RUNNING,
        Reason.POD_REJECTED,
    ),
    "refused by kubelet": (
        [pod(phase="Failed", running=False, reason="OutOfcpu", message="no cpu")],
        RUNNING,
        Reason.POD_REJECTED,
    ),
}


@pytest.mark.parametrize(("pods", "job", "reason"), CASES.values(), ids=CASES.keys())
def test_first_cause(pods: list[ObservedPod], job: ObservedJob | None, reason: Reason | None) -> None:
    cause = first_cause(tuple(pods), job)
    assert (cause.reason if cause else None) == reason
    assert cause is None or cause.message


def test_the_reports_words_and_the_pod_are_kept() -> None:
    gang = (ended(code=87, message=told(Reason.DATA_ERROR, "/data/train.jsonl:17: not JSON")),)
    cause = first_cause(gang, RUNNING)
    assert cause is not None
    assert (cause.message, cause.pod, cause.exit_code) == ("/data/train.jsonl:17: not JSON", "tune-1-0-abcde", 87)


def test_without_a_report_the_end_of_the_log_is_shown() -> None:
    cause = first_cause((ended(code=1, message="ModuleNotFoundError: no module named 'x'"),), RUNNING)
    assert cause is not None
    assert "exit code 1" in cause.message
    assert "no module named 'x'" in cause.message
