"""The cases and what they become: `python -m tests.convert.golden` writes the expected files anew.

A case is a LLaMA-Factory file whose first line is its command. Beside it stands `NAME.expected.yaml`, the manifest, or
`NAME.refused.txt`, the messages.
"""

import io
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from finetune_cli.__main__ import main

CASES = Path(__file__).parent / "cases"
NAMES = sorted(path.stem for path in CASES.glob("*.yaml") if not path.stem.endswith(".expected"))


class Outcome(NamedTuple):
    status: int
    stdout: str
    stderr: str

    @property
    def file(self) -> str:
        return ".expected.yaml" if self.status == 0 else ".refused.txt"

    @property
    def text(self) -> str:
        return self.stdout if self.status == 0 else self.stderr


def run(name: str) -> Outcome:
    """Runs a case's command in the folder of cases."""
    first = (CASES / f"{name}.yaml").read_text().splitlines()[0]
    program, *arguments = first.removeprefix("# ").split()
    assert program == "finetune", first
    stdout, stderr, before = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(CASES)
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            status = main(arguments)
    finally:
        os.chdir(before)
    return Outcome(status, stdout.getvalue(), stderr.getvalue())


def write() -> None:
    """Writes all expected files anew and removes those of cases that are gone."""
    written = {f"{name}{outcome.file}": outcome.text for name in NAMES for outcome in [run(name)]}
    for path in [*CASES.glob("*.expected.yaml"), *CASES.glob("*.refused.txt")]:
        path.unlink()
    for file, text in written.items():
        (CASES / file).write_text(text)


if __name__ == "__main__":
    write()
