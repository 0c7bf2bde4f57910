"""What the Dockerfile promises, as far as it can be read from it."""

import re
import subprocess
from pathlib import Path

import pytest

from demo.commands import ROOT
from demo.environment import UV_VERSION

TEXT = (ROOT / "Dockerfile").read_text()
LINES = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", TEXT)).splitlines()


def _stage(name: str) -> list[str]:
    starts = [number for number, line in enumerate(LINES) if line.startswith("FROM ")]
    ends = [*starts[1:], len(LINES)]
    bodies = {LINES[start].split(" AS ")[1]: LINES[start:end] for start, end in zip(starts, ends, strict=True)}
    return bodies[name]


@pytest.mark.parametrize(("target", "uid"), [("operator", 65532), ("trainer", 1000)])
def test_image_runs_without_root(target: str, uid: int) -> None:
    users = [line for line in _stage(target) if line.startswith("USER ")]
    assert users[-1] == f"USER {uid}:{uid}"


@pytest.mark.parametrize("target", ["operator", "trainer"])
def test_code_comes_after_all_dependencies(target: str) -> None:
    """Else an edit of code would rebuild, and move, gigabytes."""
    lines = _stage(target)
    code = min(n for n, line in enumerate(lines) if line.startswith(("COPY operator/", "COPY trainer_image/")))
    installs = [n for n, line in enumerate(lines) if "/tools/install" in line or "apt-get" in line]
    assert max(installs) < code


def test_everything_installed_is_pinned() -> None:
    assert f"ARG UV_VERSION={UV_VERSION}" in LINES
    assert re.search(r"ARG BASE=python:\d+\.\d+\.\d+-slim-bookworm", TEXT)
    assert "--locked" in TEXT
    assert "--require-hashes" in (ROOT / "images" / "install").read_text()


@pytest.mark.parametrize(
    ("asked", "given"),
    [("-march=native", "-march=x86-64-v3"), ("-D__AVX512__", "-D__AVX256__"), ("-O3", "-O3")],
)
def test_ops_are_compiled_for_a_baseline_processor(asked: str, given: str, tmp_path: Path) -> None:
    fake = {"g++": '#!/bin/sh\necho "$@"\n', "uname": "#!/bin/sh\necho x86_64\n"}
    for name, script in fake.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    said = subprocess.run(
        [ROOT / "images" / "portable-c++", asked, "a b.cpp"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.strip() == f"{given} a b.cpp"
