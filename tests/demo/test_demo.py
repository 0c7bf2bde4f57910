"""The parts of the demo and of `make test` that need no cluster."""

import gzip
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from demo import assets, commands, local, preflight
from demo.checks import Outcome
from demo.lines import LineBoard, duration
from demo.setup import _image_values
from demo.steps import Step, StepError, run_all


class Silent:
    """A board that shows nothing."""

    def refresh(self, steps: Sequence[Step]) -> None:
        pass


def _step(name: str, run: Callable[[Path], str], after: Sequence[str] = (), log: Path = Path("/dev/null")) -> Step:
    return Step(name, "does it", "1 s", run, after, log)


def test_steps_run_side_by_side_and_after_what_they_need() -> None:
    together, ended = threading.Barrier(2), list[str]()

    def meet(name: str) -> Callable[[Path], str]:
        def run(_: Path) -> str:
            together.wait(60)  # breaks unless both run at the same time
            ended.append(name)
            return name

        return run

    def last(_: Path) -> str:
        return "after " + " and ".join(sorted(ended))

    steps = [_step("a", meet("a")), _step("b", meet("b")), _step("c", last, after=["a", "b"])]
    run_all(steps, Silent(), 0.01)
    assert [step.result for step in steps] == ["a", "b", "after a and b"]


def test_a_failing_step_says_what_to_do_and_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_stopped", type(commands._stopped)())

    def slow(_: Path) -> str:
        return commands.run(["sleep", "60"], tmp_path / "slow.log")

    def bad(log: Path) -> str:
        time.sleep(0.2)
        return commands.run(["sh", "-c", "echo no space left >&2; exit 3"], log, hint="free some space")

    log = tmp_path / "bad.log"
    begun = time.monotonic()
    with pytest.raises(StepError) as failure:
        run_all([_step("slow", slow), _step("bad", bad, log=log)], Silent(), 0.01)
    assert time.monotonic() - begun < 15
    for part in ("bad:", "status 3", "hint: free some space", str(log), "no space left"):
        assert part in str(failure.value)


def test_programs_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    """Also when that one is killed: nothing may be left that is in the way of the next run."""
    marker = tmp_path / "pid"
    program = (
        "import pathlib; from demo import commands;"
        f"commands.run(['sh', '-c', 'echo $$ > {marker}; exec sleep 60'], pathlib.Path('{tmp_path}/log'))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=commands.ROOT)
    while not marker.exists() or not marker.read_text():
        time.sleep(0.05)
    child = Path("/proc") / marker.read_text().strip()
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not child.exists() or " Z " in (child / "stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the child outlived its parent")


def test_closing_line_sums_up_all_runs(tmp_path: Path) -> None:
    outcome = Outcome()
    for name, counts in (("fast", (10, 1, 0, 2)), ("cluster", (5, 0, 1, 0))):
        report = tmp_path / f"{name}.xml"
        tests, failures, errors, skipped = counts
        attributes = f'tests="{tests}" failures="{failures}" errors="{errors}" skipped="{skipped}"'
        report.write_text(f"<testsuites><testsuite {attributes}/></testsuites>")
        outcome.reports.append(report)
    assert " 1 failed, 11 passed, 2 skipped, 1 errors in 61.00s (1 min 01 s) " in outcome.summary(61)


def test_humaneval_is_split_into_conversations(tmp_path: Path) -> None:
    source = tmp_path / "source.jsonl.gz"
    with gzip.open(source, "wt") as file:
        for number in range(164):
            file.write(json.dumps({"prompt": f"def f{number}():\n", "canonical_solution": "    return 1\n"}) + "\n")
    assets._write_humaneval(source, tmp_path)
    train, held_out = (
        [json.loads(line)["messages"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    )
    assert (len(train), len(held_out)) == (128, 36)
    assert [message["role"] for message in train[0]] == ["user", "assistant"]
    assert "def f128()" in held_out[0][0]["content"]
    assert held_out[0][1]["content"] == "    return 1"
    problems = (tmp_path / "heldout-problems.jsonl").read_text().splitlines()
    assert len(problems) == 36 and json.loads(problems[0])["prompt"] == "def f128():\n"


@pytest.mark.parametrize(
    ("reference", "values"),
    [
        ("10.0.0.1:5001/op/trainer:abc", {"repository": "10.0.0.1:5001/op/trainer", "tag": "abc"}),
        ("host/trainer@sha256:00", {"repository": "host/trainer", "digest": "sha256:00"}),
    ],
    ids=["tag", "digest"],
)
def test_image_reference_as_chart_values(reference: str, values: dict[str, str]) -> None:
    assert _image_values(reference) == values


@pytest.mark.parametrize(("seconds", "text"), [(6.6, "7 s"), (59.4, "59 s"), (185, "3 min 05 s")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_name_step_result_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    step = _step("cluster", lambda _: "2 nodes")
    run_all([step], LineBoard(), 0.01)
    first, last = capsys.readouterr().out.splitlines()
    assert "cluster  does it (usually 1 s)" in first
    assert "done in 0 s: 2 nodes" in last


def test_what_is_missing_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(preflight, "_docker_answers", lambda: False)
    monkeypatch.setattr(preflight, "FREE_GIB", 0)
    (problem,) = preflight.problems()
    assert "KUBECONFIG" in problem and "Docker" in problem and "sudo make demo" in problem


def test_a_folder_is_filled_once_as_the_volume_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make run` without what takes long: packages and conversion are there already."""
    cached = assets.Assets(tmp_path / "0123", tmp_path / "model-0123", tmp_path / "data-0123")
    for folder, name in ((cached.model, "model.safetensors"), (cached.humaneval, "train.jsonl")):
        folder.mkdir()
        (folder / name).write_text("x")
    monkeypatch.setattr(assets, "fetch", lambda _: cached)
    target = tmp_path / "volume"
    local.fill(target, Path("/no/python"), tmp_path / "log")
    model = target / "models" / assets.MODEL / "model.safetensors"
    assert model.read_text() == "x" and (target / "datasets" / "humaneval" / "train.jsonl").read_text() == "x"
    model.write_text("kept")
    local.fill(target, Path("/no/python"), tmp_path / "log")
    assert model.read_text() == "kept", "the same assets are not copied again"
    (target / local.MARKER).write_text("older")
    local.fill(target, Path("/no/python"), tmp_path / "log")
    assert model.read_text() == "x"


def test_what_make_run_starts_is_the_job_of_the_demo() -> None:
    from demo.run import EXAMPLE
    from demo.volume import CLAIM

    assert (local.EXAMPLE, local.CLAIM) == (EXAMPLE, CLAIM)
