"""The problems of HumanEval and MBPP: their records, what a model is asked, and the program that its answer makes.

Reads the files as their authors publish them: HumanEval's `task_id, prompt, entry_point, test`, MBPP's `task_id, text` (or
`prompt`), `test_list, test_setup_code` (or `test_imports`). Runs nothing.
"""

import gzip
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from finetune_api.spec import BenchmarkName
from finetune_trainer.data.records import Record, read_records
from finetune_trainer.errors import DataError

KEYS = {
    BenchmarkName.HUMAN_EVAL: ("task_id", "prompt", "entry_point", "test"),
    BenchmarkName.MBPP: ("task_id", "test_list"),
}
HUMAN_EVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Chen et al. 2021, section 2.1."""
MBPP_STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n#")
"""As the BigCode evaluation harness has them: the prompt ends after a docstring, a whole function is the answer."""
FENCE = "```"
"""Opens and closes a code block."""
_BLOCK = rf"{FENCE}(?:python|py)?[ \t]*\n(.*?)"
_CLOSED = re.compile(_BLOCK + FENCE, re.DOTALL | re.IGNORECASE)
_CLOSED_OR_LAST = re.compile(rf"{_BLOCK}(?:{FENCE}|\Z)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Problem:
    """One problem, in the two ways of asking it."""

    task_id: str
    prompt: str
    """What a base model continues."""
    question: str
    """What a chat model is asked."""
    stops: tuple[str, ...]
    """Where a base model's continuation ends."""
    head: str
    """What stands before a function that an answer defines: imports and helpers."""
    entry_point: str | None
    """The function that is asked for; None where an answer always defines all of it (MBPP)."""
    checks: str
    """What stands after the answer."""

    def program_of_continuation(self, text: str) -> str:
        """The program that a base model's continuation makes; it ends at the first stop."""
        return f"{self.head if self.entry_point is None else self.prompt}{cut(text, self.stops)}\n{self.checks}"

    def programs_of_answer(self, text: str) -> list[str]:
        """The programs that a chat model's answer may mean, the likeliest first; the first that is Python is the answer.

        The code is the first code block, or what stands before the first fence: models close blocks that they never opened. If
        code defines the function, all of it is meant, or else all up to the function's end: what follows may be an explanation,
        or an example that was cut off. Otherwise it is taken for the function's body, whose indentation templates and models
        tend to lose: of the first line, or of all.
        """
        block = _CLOSED_OR_LAST.search(text)
        found = (block.group(1) if block else "", text.partition(FENCE)[0])
        codes = [textwrap.dedent(code).strip("\n") for code in found if code.strip()]
        if self.entry_point is None:
            readings = [self.head + code for code in codes]
        elif defining := [code for code in codes if _definition(self.entry_point).search(code)]:
            readings = [self.head + part for code in defining for part in (code, _to_end_of(self.entry_point, code))]
        else:
            bodies = [body for code in codes for body in (textwrap.indent(code, "    "), "    " + code)]
            readings = [f"{self.prompt}\n{body}" for body in bodies]
        return [f"{reading}\n{self.checks}" for reading in dict.fromkeys(readings)] or [self.checks]


def _definition(name: str) -> re.Pattern[str]:
    return re.compile(rf"^([ \t]*)(?:async\s+)?def\s+{name}\b.*$", re.MULTILINE)


def _to_end_of(function: str, code: str) -> str:
    """The code without what follows the function: the first line that is indented no deeper and does not end its signature."""
    found = _definition(function).search(code)
    assert found is not None, "asked for where it is defined"
    following = re.compile(rf"^(?!{found[1]}[ \t])[ \t]*[^\s)]", re.MULTILINE).search(code, found.end())
    return textwrap.dedent(code[: following.start()] if following else code)


def is_complete(text: str) -> bool:
    """Whether nothing that a chat model may add to its answer would be looked at: a code block has ended."""
    return _CLOSED.search(text) is not None or _definition(r"\w+").search(text.partition(FENCE)[0]) is not None


def cut(text: str, stops: tuple[str, ...]) -> str:
    """The text before the first of some strings."""
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]


def read_problems(path: Path, benchmark: BenchmarkName, uri: str, max_samples: int | None) -> list[Problem]:
    """Reads a file of problems: .jsonl.gz as HumanEval is published, or whatever data sets may be.

    Raises:
        DataError: it is missing, broken, empty, or its records are not this benchmark's.
    """
    records = _gzipped(path) if path.name.endswith(".jsonl.gz") else read_records(path, uri)
    problems = [_problem(record, benchmark) for record in islice(records, max_samples)]
    if not problems:
        raise DataError(f"{path} ({uri}): the file has no problem")
    return problems


def _gzipped(path: Path) -> Iterator[Record]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield Record(json.loads(line), f"{path}:{number}")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (gzip.BadGzipFile, EOFError, ValueError) as error:
        raise DataError(f"{path}: not a gzipped file of JSON lines: {error}") from error


def _problem(record: Record, benchmark: BenchmarkName) -> Problem:
    for key in KEYS[benchmark]:
        if not (isinstance(record.value, dict) and key in record.value):
            raise DataError(f"{record.place}: the key `{key}` is missing; a {benchmark} problem has it")
    return _human_eval(record) if benchmark is BenchmarkName.HUMAN_EVAL else _mbpp(record)


def _human_eval(record: Record) -> Problem:
    prompt, entry = _text(record, "prompt"), _text(record, "entry_point")
    head, found, _ = prompt.partition(f"def {entry}")
    if not found:
        raise DataError(f"{record.place}: `prompt` does not define the `entry_point` `{entry}`")
    return Problem(
        task_id=str(record.value["task_id"]),
        prompt=prompt.rstrip(),
        question=f"Complete this function.\n\n{prompt.strip()}",
        stops=HUMAN_EVAL_STOPS,
        head=head,
        entry_point=entry,
        checks=f"{_text(record, 'test')}\ncheck({entry})\n",
    )


def _mbpp(record: Record) -> Problem:
    value = record.value
    key = "text" if "text" in value else "prompt"
    if key not in value:
        raise DataError(f"{record.place}: the key `text` (or `prompt`) is missing; an MBPP problem has it")
    task, tests = _text(record, key).strip(), value["test_list"]
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise DataError(f"{record.place}: `test_list` must be a list of assertions")
    imports, setup = "\n".join(value.get("test_imports") or []), value.get("test_setup_code") or ""
    listed = "\n".join(tests)
    return Problem(
        task_id=str(value["task_id"]),
        prompt=f'"""\n{task}\n{tests[0]}\n"""',
        question=f"{task}\n\nYour code should pass these tests:\n\n{listed}",
        stops=MBPP_STOPS,
        head=f"{imports}\n" if imports else "",
        entry_point=None,
        checks=f"{setup}\n{listed}\n" if setup else f"{listed}\n",  # the setup may use what the answer defines
    )


def _text(record: Record, key: str) -> str:
    value = record.value[key]
    if not isinstance(value, str):
        raise DataError(f"{record.place}: `{key}` must be a string, got {type(value).__name__}")
    return value
