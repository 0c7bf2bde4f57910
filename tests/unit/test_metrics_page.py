"""docs/metrics.md names every metric that the operator and the trainer have. With UPDATE_DOCS=1 it is written again."""

import os
from collections.abc import Iterable
from pathlib import Path

from prometheus_client.core import Metric
from prometheus_client.metrics import MetricWrapperBase

from finetune_operator.shell import metrics as operator_metrics
from finetune_trainer.metrics import COUNTERS, DEVICE_GAUGES, GAUGES, RankCollector
from finetune_trainer.state import RankState

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
HEAD = """\
<!-- Written by `UPDATE_DOCS=1 make test TESTS=tests/unit/test_metrics_page.py`. Do not edit. -->

# Metrics

Each trainer pod serves its ranks' metrics at `http://POD:8080/metrics` (the container port `http`) while an attempt runs; the
chart's PodMonitor finds the pods and adds `namespace`, `pod`, `finetunejob`, `attempt` and `node_index`. The operator serves
its own at its port `http`, `/metrics`.

## Trainer
"""


def _table(rows: Iterable[tuple[str, str, list[str], str]]) -> str:
    lines = ["| metric | kind | labels | what it is |", "| --- | --- | --- | --- |"]
    for name, kind, labels, text in rows:
        lines.append(f"| `{name}` | {kind} | {', '.join(labels)} | {text.rstrip('.')} |")
    return "\n".join(lines) + "\n"


def _name(metric: Metric) -> str:
    return f"{metric.name}_total" if metric.type == "counter" else metric.name


def _trainer() -> list[tuple[str, str, list[str], str]]:
    measured = {"value": 0.5, "base": 0.5, "step": 1.0}
    state = RankState(
        rank=0, attempt=1, startup={"data": 1.0}, metrics={"TokenAccuracy": measured, "XPassAt1": measured}
    )
    for field, _ in (*GAUGES.values(), *COUNTERS.values(), *DEVICE_GAUGES.values()):
        setattr(state, field, 1)
    return [
        (_name(metric), metric.type, sorted(metric.samples[0].labels), metric.documentation)
        for metric in RankCollector(lambda: [state]).collect()
    ]


def _operator() -> list[tuple[str, str, list[str], str]]:
    ours = [value for value in vars(operator_metrics).values() if isinstance(value, MetricWrapperBase)]
    return [
        (_name(metric), metric.type, sorted(wrapper._labelnames), metric.documentation)
        for wrapper in ours
        for metric in wrapper.describe()
    ]


def test_the_page_of_metrics_is_complete() -> None:
    text = HEAD + "\n" + _table(_trainer()) + "\n## Operator\n\n" + _table(_operator())
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == text
