"""Each case's manifest or messages, word for word. `python -m tests.convert.golden` writes them anew."""

import re

import pytest
import yaml

from tests.convert.golden import CASES, NAMES, run

CONVERTED, REFUSED = 0, 2


@pytest.mark.parametrize("name", NAMES)
def test_case(name: str) -> None:
    outcome = run(name)
    expected = CASES / f"{name}{outcome.file}"
    assert expected.exists(), f"exit {outcome.status}\n{outcome.text}"
    assert outcome.text == expected.read_text()
    if outcome.status == CONVERTED:
        body = yaml.safe_load(outcome.stdout)
        assert body["kind"] == "FineTuneJob"
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?", body["metadata"]["name"])
        notes = [line.removeprefix("note: ") for line in outcome.stderr.splitlines()]
        comment = [line.removeprefix("# - ") for line in outcome.stdout.splitlines() if line.startswith("# - ")]
        assert notes == comment
    else:
        assert (outcome.status, outcome.stdout) == (REFUSED, "")


def test_there_are_enough_cases_and_no_leftovers() -> None:
    expected = {path.name.split(".")[0] for path in (*CASES.glob("*.expected.yaml"), *CASES.glob("*.refused.txt"))}
    assert expected == set(NAMES)
    assert len(NAMES) >= 40


def test_secrets_are_never_repeated() -> None:
    written = "".join(path.read_text() for path in (*CASES.glob("*.expected.yaml"), *CASES.glob("*.refused.txt")))
    assert "hf_abcdef" not in written
    assert "key-that-is-not-shown" not in written
