"""Which evaluation was the best, and whether to stop: pure functions of the evaluations so far.

These stand in the progress that a checkpoint keeps, so a resumed run decides as an unbroken one, and all ranks alike. The
evaluation of the base model, at step 0, is no candidate: there is no checkpoint of it.
"""

from collections.abc import Sequence
from typing import Any

from finetune_api.spec import EvaluationMetric


def best_step(evaluations: Sequence[dict[str, Any]], metric: EvaluationMetric | None) -> int | None:
    """The step with the best value, of equals the first; None without a metric or before the first step's evaluation."""
    scored = _scored(evaluations, metric)
    return max(scored, key=lambda pair: (pair[1], -pair[0]))[0] if scored else None


def evaluations_without_improvement(
    evaluations: Sequence[dict[str, Any]], metric: EvaluationMetric | None, min_delta: float
) -> int:
    """How many of the newest evaluations brought no improvement of more than `min_delta` over the best before them."""
    best, since = float("-inf"), 0
    for _, score in _scored(evaluations, metric):
        if score > best + min_delta:
            best, since = score, 0
        else:
            since += 1
    return since


def _scored(evaluations: Sequence[dict[str, Any]], metric: EvaluationMetric | None) -> list[tuple[int, float]]:
    """Steps and their values, turned so that more is better."""
    if metric is None:
        return []
    sign = -1.0 if metric is EvaluationMetric.EVAL_LOSS else 1.0
    return [(e["step"], sign * e["values"][metric]) for e in evaluations if e["step"] > 0]
