"""The best checkpoint and early stopping: decisions as tables, and whole jobs, also killed and resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_api.reasons import FAILURES, Reason
from finetune_api.spec import EvaluationMetric
from finetune_trainer.evaluation.best import best_step, evaluations_without_improvement
from tests.trainer import jobs, tiny
from tests.trainer.conftest import StartPod
from tests.trainer.test_benchmarks import odd_problem, with_benchmark
from tests.trainer.test_resume import weights

LOSS, ACCURACY = EvaluationMetric.EVAL_LOSS, EvaluationMetric.TOKEN_ACCURACY


def history(metric: EvaluationMetric, *values: float) -> list[dict[str, Any]]:
    return [{"step": 10 * n, "values": {metric: value}} for n, value in enumerate(values)]


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        (LOSS, [3, 2, 1, 2], 20),
        (ACCURACY, [0.1, 0.2, 0.3, 0.2], 20),
        (LOSS, [1, 2, 2, 3], 10),
        (LOSS, [1], None),
        (LOSS, [], None),
    ],
    ids=["lower-loss", "higher-accuracy", "first-of-equals-and-not-the-base", "only-the-base", "nothing"],
)
def test_best_step(metric: EvaluationMetric, values: list[float], best: int | None) -> None:
    assert best_step(history(metric, *values), metric) == best
    assert best_step(history(metric, *values), None) is None


@pytest.mark.parametrize(
    ("values", "min_delta", "since"),
    [
        ([9, 3, 2, 1], 0, 0),
        ([9, 1, 2, 1], 0, 2),
        ([9, 3, 2.8, 2.6, 2.4], 0.5, 0),
        ([9, 3, 2.8, 2.6], 0.5, 2),
        ([9], 0, 0),
    ],
    ids=["falls", "stays", "small-steps-add-up", "too-small", "base"],
)
def test_evaluations_without_improvement(values: list[float], min_delta: float, since: int) -> None:
    assert evaluations_without_improvement(history(LOSS, *values), LOSS, min_delta) == since


STOPPING: dict[str, Any] = {
    "training__precision": "FP32",
    "training__learningRate": 0.3,
    "training__scheduler": "Constant",
    "training__warmupRatio": 0.0,
    "training__maxSteps": 20,
    "training__evalEverySteps": 1,
    "checkpoint__everySteps": 100,
    "checkpoint__keep": 1,
    "selection": {
        "metric": "EvalLoss",
        "exportBest": True,
        "earlyStoppingPatience": 3,
        "earlyStoppingMinDelta": 0.0,
    },
}
"""With this learning rate the held-out loss rises after a few steps."""


def test_stops_early_keeps_and_exports_the_best_and_resumes_to_the_same(start: StartPod, tmp_path: Path) -> None:
    problems = tiny.write_jsonl(tmp_path / "problems.jsonl", [odd_problem(0)])
    changes = {**STOPPING, "benchmarks": with_benchmark(problems), "generation__maxNewTokens": 6}
    changes |= {"generation__samples": 2, "generation__temperature": 1.0, "adapter__dropout": 0.1}
    whole = start(tmp_path / "whole", **changes)
    report = whole.done()
    result = json.loads((whole.folder / "output" / "train_result.json").read_text())
    losses = {line["step"]: line["values"]["EvalLoss"] for line in result["metrics"]}
    best = min((step for step in losses if step), key=lambda step: (losses[step], step))
    assert report["step"] == best + 3 < 20
    assert f"Stopped early after {best + 3} of 20 steps" in report["message"]
    assert f"checkpoint of step {best}" in report["message"] and result["exported_step"] == best
    folders = sorted(path.name for path in (whole.folder / "checkpoints").glob("step-*"))
    assert folders == [f"step-{best:08d}", f"step-{best + 3:08d}"], "the best and the newest"

    def pieces(step: int) -> set[float]:
        state = load_file(whole.folder / "checkpoints" / f"step-{step:08d}" / "rank-00000.safetensors")
        return {x for tensor in state.values() if tensor.dtype == torch.float32 for x in tensor.flatten().tolist()}

    exported = load_file(whole.folder / "output" / "adapter_model.safetensors")
    numbers = {x for tensor in exported.values() for x in tensor.flatten().tolist()}
    assert numbers <= pieces(best) and not numbers <= pieces(best + 3)

    killed = start(tmp_path / "killed", **changes)
    killed.wait_for(lambda state: state.last_checkpoint_step is not None)
    killed.kill_rank()
    assert killed.wait() == FAILURES[Reason.RANK_KILLED].exit_code
    resumed = jobs.Pod(killed.folder, jobs.next_attempt(killed.spec), killed.server)
    message = resumed.done()["message"]
    assert message.startswith(report["message"]) and "done again after the restart: the same losses" in message
    assert weights(killed.folder) == weights(whole.folder)
    again = json.loads((killed.folder / "output" / "train_result.json").read_text())
    assert again["metrics"] == result["metrics"]


@pytest.mark.parametrize(
    ("selection", "says"),
    [
        ({"metric": "HumanEvalPassAt1"}, "evaluation.metric: HumanEvalPassAt1 is not measured"),
        ({"exportBest": True}, "need a `metric`"),
        ({"metric": "EvalLoss", "earlyStoppingPatience": 1}, "needs training.evalEverySteps"),
    ],
)
def test_what_cannot_be_decided_is_refused(selection: dict[str, Any], says: str, start: StartPod) -> None:
    nothing = {"metric": None, "exportBest": False, "earlyStoppingPatience": None, "earlyStoppingMinDelta": 0.0}
    pod = start(selection={**nothing, **selection})
    assert pod.wait() != 0
    assert pod.report["reason"] == "ConfigError" and says in pod.report["message"]
