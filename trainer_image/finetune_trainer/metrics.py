"""Rank facts as Prometheus metrics, read at scrape time. Job and pod names come from the scrape, not from here."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from finetune_api.reports import Activity
from finetune_trainer.state import RankState

PREFIX = "finetune_"
Family = TypeVar("Family", GaugeMetricFamily, CounterMetricFamily)

GAUGES: dict[str, tuple[str, str]] = {
    "attempt": ("attempt", "Number of the attempt, from 1"),
    "step": ("step", "Optimizer steps done since step 0 of the job"),
    "steps": ("total_steps", "Optimizer steps of the whole job"),
    "epoch": ("epoch", "Passes over the training data"),
    "loss": ("loss", "Mean loss for each target token of the last step, over all ranks"),
    "eval_loss": ("eval_loss", "Newest held-out loss for each target token"),
    "base_eval_loss": ("base_eval_loss", "Held-out loss before the first step"),
    "learning_rate": ("learning_rate", "Learning rate of the last step"),
    "grad_norm": ("grad_norm", "Global gradient norm of the last step, before clipping"),
    "samples_per_second": ("samples_per_second", "Samples of all ranks, last step"),
    "tokens_per_second": ("tokens_per_second", "Tokens of all ranks without padding, last step"),
    "eta_seconds": ("eta_seconds", "Time left at the present speed"),
    "resumed_from_step": ("resumed_from_step", "Checkpoint that this attempt started from; 0: fresh start"),
    "last_checkpoint_step": ("last_checkpoint_step", "Step of the newest complete checkpoint"),
    "last_checkpoint_timestamp_seconds": ("last_checkpoint_time", "When it was completed, Unix time"),
    "heartbeat_timestamp_seconds": ("heartbeat_time", "Last sign of life of the rank, Unix time"),
}
COUNTERS: dict[str, tuple[str, str]] = {
    "samples": ("samples_total", "Samples trained on since step 0"),
    "tokens": ("tokens_total", "Tokens trained on since step 0, without padding"),
    "checkpoints": ("checkpoints", "Checkpoints written by this attempt"),
    "checkpoint_stall_seconds": ("checkpoint_stall_seconds", "Time in which training stood still for checkpoints"),
    "data_wait_seconds": ("data_wait_seconds", "Time in which training waited for batches"),
}
DEVICE_GAUGES: dict[str, tuple[str, str]] = {
    "memory_used_bytes": ("memory_used_bytes", "Allocated by torch; on CPU the process's resident memory"),
    "memory_reserved_bytes": ("memory_reserved_bytes", "Held by torch's allocator; on CPU the same as used"),
    "memory_peak_bytes": ("memory_peak_bytes", "Largest use so far"),
    "device_utilization_ratio": (
        "device_utilization",
        "0 to 1: GPU utilisation as NVML tells it; on CPU the rank's CPU time over wall time and threads",
    ),
}


class RankCollector(Collector):
    """Collects from the states of all local ranks."""

    def __init__(self, states: Callable[[], Iterable[RankState]]) -> None:
        self._states = states

    def describe(self) -> list[Metric]:
        return []  # nothing is read at registration

    def collect(self) -> Iterator[Metric]:
        states = list(self._states())
        for name, (field, text) in GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=["rank"])
            yield _fill(gauge, states, field)
        for name, (field, text) in COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=["rank"])
            yield _fill(counter, states, field)
        for name, (field, text) in DEVICE_GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=["rank", "device"])
            for state in states:
                gauge.add_metric([str(state.rank), state.device], getattr(state, field))
            yield gauge
        startup = GaugeMetricFamily(
            PREFIX + "startup_seconds",
            "What the time up to this attempt's first step went to",
            labels=["rank", "phase"],
        )
        for state in states:
            for phase, seconds in state.startup.items():
                startup.add_metric([str(state.rank), phase], seconds)
        yield startup
        yield from _evaluations(states)
        yield _activities(states)


def _fill(family: Family, states: list[RankState], field: str) -> Family:
    for state in states:
        value = getattr(state, field)
        if value is not None:
            family.add_metric([str(state.rank)], value)
    return family


def _evaluations(states: list[RankState]) -> Iterator[Metric]:
    accuracy = GaugeMetricFamily(
        PREFIX + "eval_token_accuracy_ratio", "Share of held-out target tokens that are the likeliest", labels=["rank"]
    )
    passes = GaugeMetricFamily(
        PREFIX + "benchmark_pass_ratio", "Newest pass@k of a benchmark, 0 to 1", labels=["rank", "benchmark", "k"]
    )
    for state in states:
        for name, metric in state.metrics.items():
            benchmark, found, k = name.partition("PassAt")
            if found:
                passes.add_metric([str(state.rank), benchmark, k], metric["value"])
            elif name == "TokenAccuracy":
                accuracy.add_metric([str(state.rank)], metric["value"])
    yield accuracy
    yield passes


def _activities(states: list[RankState]) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(PREFIX + "activity", "1 for what the rank is doing now", labels=["rank", "activity"])
    for state in states:
        for activity in Activity:
            gauge.add_metric([str(state.rank), activity], float(state.activity == activity))
    return gauge
