"""`make test` and `make lint`: prepares what the tests need side by side, runs them, and closes with one summary line.

Standard library only: it starts before the Python environment is there. Tests that need no cluster run while cluster and
images are prepared, and beside the cluster's own, which wait more than they compute.
"""

import os
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from demo import commands, environment
from demo.commands import ROOT, CommandError, run
from demo.lines import LineBoard, duration
from demo.preflight import cache_dir
from demo.setup import Setup
from demo.steps import Step, run_all

ENVIRONMENT = ["--extra", "operator", "--extra", "trainer", "--extra", "cli", "--group", "assets"]
PYTHON = Path(os.environ.get("UV_PROJECT_ENVIRONMENT", ROOT / ".venv")) / "bin" / "python"
LOGS = cache_dir() / "log" / "test"
LINTERS = {
    "ruff format": ["-m", "ruff", "format", "--check", "."],
    "ruff check": ["-m", "ruff", "check", "."],
    "mypy": ["-m", "mypy", "--cache-dir", str(cache_dir() / "mypy")],
    "import-linter": ["-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
}
NO_TESTS = 5
"""pytest's exit status when a selection is empty."""


class Outcome:
    """What has failed so far, and where pytest wrote its results."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.reports: list[Path] = []

    def summary(self, seconds: float) -> str:
        """One line in pytest's form over all of its runs."""
        total = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
        for report in self.reports:
            if report.exists():
                for suite in ElementTree.parse(report).getroot().iter("testsuite"):
                    for key in total:
                        total[key] += int(suite.get(key, "0"))
        passed = total["tests"] - total["failures"] - total["errors"] - total["skipped"]
        parts = [
            (total["failures"], "failed"), (passed, "passed"), (total["skipped"], "skipped"), (total["errors"], "errors"),
        ]  # fmt: skip
        text = ", ".join(f"{count} {word}" for count, word in parts if count) or "no tests ran"
        return f" {text} in {seconds:.2f}s ({duration(seconds)}) ".center(100, "=")


def lint_only() -> int:
    """Runs the linters and returns the exit status."""
    outcome = Outcome()
    try:
        environment.prepare(ENVIRONMENT)
    except environment.PrepareError as error:
        print(error, file=sys.stderr)
        return 1
    _lint(outcome, _log("lint"))
    return 1 if outcome.failed else 0


def test(arguments: Sequence[str]) -> int:
    """Runs all linters and tests and returns the exit status.

    Args:
        arguments: for pytest, such as `-k recovery`.
    """
    started = time.monotonic()
    outcome = Outcome()
    try:
        with LineBoard() as board:
            run_all(_steps(outcome, arguments), board)
    except CommandError as error:
        hint = f"\n  hint: {error.hint}" if error.hint else ""
        print(f"\nfailed: {error}{hint}", file=sys.stderr)
        outcome.failed.append("set-up")
    if outcome.failed:
        print(f"\nfailed: {', '.join(outcome.failed)}")
    print(outcome.summary(time.monotonic() - started), flush=True)
    return 1 if outcome.failed else 0


def _steps(outcome: Outcome, arguments: Sequence[str]) -> list[Step]:
    def prepare(log: Path) -> str:
        try:
            environment.prepare(ENVIRONMENT, quiet=True)
        except environment.PrepareError as error:
            raise CommandError(str(error)) from error
        return ""

    def lint(log: Path) -> str:
        return _lint(outcome, log)

    def fast_tests(log: Path) -> str:
        # Files stay together: their module fixtures are expensive. The cluster's tests, which take longer, go first.
        options = ["-m", "not cluster and not gpu", "-n", "2", "--dist", "loadfile", "-q", *arguments]
        return _pytest(outcome, "fast", options, log, niceness=10)

    def cluster_tests(log: Path) -> str:
        return _pytest(outcome, "cluster", ["-m", "cluster", *arguments], log, show=True)  # it has measured something

    setup = [step for step in Setup().steps() if step.name in ("cluster", "build", "operator", "trainer")]
    steps = [
        Step("python", "packages from uv.lock, with torch", "8 min, then 1 s", prepare),
        *setup,
        Step("lint", "format, lint, types, import rules", "1 min", lint, ["python"]),
        Step("fast", "tests that need no cluster", "5 min", fast_tests, ["python"]),
        Step("tests", "tests in the cluster", "13 min", cluster_tests, ["python", *(step.name for step in setup)]),
    ]
    for step in steps:
        step.log = _log(step.name)
    return steps


def _lint(outcome: Outcome, log: Path) -> str:
    failed = []
    for name, command in LINTERS.items():
        try:
            run([PYTHON, *command], log)
        except CommandError:
            failed.append(name)
    if failed:
        print(log.read_text(), flush=True)
    outcome.failed += failed
    return f"failed: {', '.join(failed)}" if failed else "clean"


def _pytest(
    outcome: Outcome, name: str, options: Sequence[str], log: Path, *, niceness: int = 0, show: bool = False
) -> str:
    """Runs pytest into a log and returns its last line; the log is printed if it failed, or if `show` says so."""
    report = LOGS / f"{name}.xml"
    report.unlink(missing_ok=True)
    outcome.reports.append(report)
    command: list[str | Path] = ["nice", "-n", str(niceness), PYTHON, "-m", "pytest", f"--junitxml={report}", *options]
    with log.open("w") as output:
        status = commands.status(command, output, {**os.environ, "PYTHONPATH": str(ROOT)})
    if status not in (0, NO_TESTS):
        outcome.failed.append(f"{name} tests")
    if show or status not in (0, NO_TESTS):
        print(log.read_text(), flush=True)
    return commands.last_line(log).strip("= ")


def _log(name: str) -> Path:
    LOGS.mkdir(parents=True, exist_ok=True)
    path = LOGS / f"{name}.log"
    path.write_text("")
    return path
