"""What `benchmarks/quality.py` trains on and what it calls good."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality
from finetune_api.spec import BenchmarkName
from finetune_trainer.evaluation.problems import read_problems
from tests.trainer import tiny

MODULE = '''
import functools

def double(x: int) -> int:
    """Twice.

    >>> double(2)
    4
    """
    # as a sum
    return x + x


def solved(x):
    """In HumanEval. >>> solved(1)"""
    return 1


def silent(x):
    """Without an example."""
    return x


@functools.cache
def decorated(x):
    """>>> decorated(1)"""
    return x


def only_described():
    """>>> only_described()"""
'''


def test_functions_are_asked_for_as_humanevals_are(tmp_path: Path) -> None:
    records = list(quality.functions(MODULE, {"solved"}))
    assert len(records) == 1
    question, answer = (turn["content"] for turn in records[0]["messages"])
    assert answer == "    # as a sum\n    return x + x"
    prompt = question.removeprefix("Complete this function.\n\n")
    assert prompt.startswith("def double") and prompt.endswith('"""')
    record = {"task_id": "1", "prompt": prompt, "entry_point": "double", "test": "def check(f): assert f(2) == 4"}
    file = tiny.write_jsonl(tmp_path / "p.jsonl", [record])
    (problem,) = read_problems(file, BenchmarkName.HUMAN_EVAL, "x", None)
    assert problem.question == question
    exec(compile(problem.programs_of_answer(answer)[0], "program", "exec"), {})


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ({"LoRA": 1.0, "QLoRA": 1.0 + quality.DISTANCE / 2}, True),
        ({"LoRA": 1.0, "QLoRA": 1.0 + quality.DISTANCE * 2}, False),
        ({"Full": 1.0}, True),
        ({"Full": 1.6}, False),
    ],
)
def test_what_is_good(after: dict[str, float], expected: bool) -> None:
    def measured(loss: float) -> dict[str, Any]:
        return {"EvalLoss": loss, "TokenAccuracy": 0.5, "HumanEvalPassAt1": 0.25}

    results = {
        method: {"before": measured(1.5), "after": measured(loss), "problems": 8, "seconds": 60}
        for method, loss in after.items()
    }
    assert quality.good(results) is expected
    assert "25.0% (2)" in quality.table(results)[-1]
