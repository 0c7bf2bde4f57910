"""A real Prometheus scrapes operator and trainers during a run, as the chart's monitors say, and answers for every metric."""

import math
from collections.abc import Callable

import pytest

from tests.e2e.jobs import Job, start
from tests.e2e.kube import Kubectl, wait_for
from tests.observability.prometheus import Prometheus

pytestmark = pytest.mark.cluster

NAME = "scraped"
STEPS = 40
SEEN = "max_over_time({metric}{{finetunejob='scraped'}}[30m])"
"""The largest value of a run: its pods are gone when it is asked for."""


def _up_to(limit: float) -> Callable[[float], bool]:
    return lambda value: 0 < value <= limit


def _positive(value: float) -> bool:
    return 0 < value < math.inf


TRAINER: dict[str, Callable[[float], bool]] = {
    "finetune_samples_per_second": _positive,
    "finetune_tokens_per_second": _positive,
    "finetune_tokens_total": _positive,
    "finetune_device_utilization_ratio": _up_to(1.5),
    "finetune_memory_used_bytes": lambda value: 1e8 < value < 64e9,
    "finetune_memory_reserved_bytes": lambda value: 1e8 < value < 64e9,
    "finetune_loss": _up_to(50),
    "finetune_eval_loss": _up_to(50),
    "finetune_base_eval_loss": _up_to(50),
    "finetune_learning_rate": _up_to(1e-3),
    "finetune_grad_norm": _positive,
    "finetune_step": _up_to(STEPS),
    "finetune_steps": lambda value: value == STEPS,
    "finetune_epoch": _positive,
    "finetune_last_checkpoint_step": _up_to(STEPS),
    "finetune_last_checkpoint_timestamp_seconds": _positive,
    "finetune_checkpoints_total": _positive,
    "finetune_checkpoint_stall_seconds_total": _positive,
    "finetune_heartbeat_timestamp_seconds": _positive,
    "finetune_activity": lambda value: value == 1,
}
"""Every metric that a trainer is asked for, and what is plausible (the model is cut short, and starts with a loss of 20)."""

OPERATOR = {
    "is leader": "finetune_operator_is_leader == 1",
    "reconciles": "sum(finetune_operator_reconciles_total) > 0",
    "reconcile duration": "histogram_quantile(0.99, sum(rate(finetune_operator_reconcile_seconds_bucket[30m])) by (le)) > 0",
    "jobs by state": "max_over_time(sum(finetune_operator_jobs{state='Complete'})[30m:1s]) >= 1",
    "queue": "finetune_operator_queue_depth >= 0",
    "API requests": "sum(finetune_operator_api_requests_total) > 0",
    "process memory": "process_resident_memory_bytes{service='finetune-operator-metrics'} > 1e7",
}


@pytest.fixture(scope="module")
def scraped(kubectl: Kubectl, scraping: Prometheus) -> Job:
    """A complete job of two pods that was scraped all along."""
    spec = {
        "training": {"maxSteps": STEPS, "evalEverySteps": 10},
        "trainer": {"numNodes": 2},
        "checkpoint": {"everySteps": 10},
    }
    job = start(kubectl, NAME, spec)
    job.complete(timeout=600)
    return job


@pytest.mark.parametrize("metric", TRAINER)
def test_trainer_metric(scraping: Prometheus, scraped: Job, metric: str) -> None:
    found = scraping.query(SEEN.format(metric=metric))
    assert found, f"{metric}: no series"
    assert any(TRAINER[metric](float(series["value"][1])) for series in found), found


def test_both_pods_are_told_apart(scraping: Prometheus, scraped: Job) -> None:
    """Job, attempt and place in the gang are labels of the scrape; the rank is the trainer's own."""
    found = scraping.query(SEEN.format(metric="finetune_step"))
    labels = {(s["metric"]["attempt"], s["metric"]["node_index"], s["metric"]["rank"]) for s in found}
    assert labels == {("1", "0", "0"), ("1", "1", "1")}
    assert len({series["metric"]["pod"] for series in found}) == 2
    assert {series["metric"]["namespace"] for series in found} == {scraped.kubectl.namespace}


@pytest.mark.parametrize("query", OPERATOR.values(), ids=OPERATOR.keys())
def test_operator_metric(scraping: Prometheus, scraped: Job, query: str) -> None:
    wait_for(query, lambda: scraping.query(query), 30)


def test_the_operator_is_scraped_through_its_service(scraping: Prometheus) -> None:
    def up() -> bool:
        return any(
            target["scrapePool"].startswith("serviceMonitor/") and target["health"] == "up"
            for target in scraping.targets()
        )

    wait_for("the operator's target to be up", up, 30, scraping.targets)
