"""The sandbox against hostile programs, as a trainer pod would run it: uid 1000, no capability, no user namespace."""

import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.evaluation import sandbox as sb
from finetune_trainer.evaluation.jail import seccomp
from finetune_trainer.evaluation.sandbox import Limits, Protection, Sandbox
from tests.trainer.hostile import HOSTILE, Hostile

ROOT = Path(__file__).parents[2]
SECOND = Limits(cpu_seconds=1, wall_seconds=60.0)
UID = 1000


def _reachable(path: Path) -> bool:
    """Whether any user may run a program."""
    return path.exists() and all(p.stat().st_mode & stat.S_IXOTH for p in (path, *path.resolve().parents))


@pytest.fixture(scope="module")
def pod() -> Iterator[Any]:
    """Runs `tests.trainer.hostile` as a pod's user would; the code is copied to where that user can read it."""
    folder = Path(tempfile.mkdtemp(prefix="finetune-pod-"))
    for name in ("trainer_image/finetune_trainer/evaluation", "tests/trainer/hostile.py"):
        target = folder / name.removeprefix("trainer_image/")
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        target.parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, target)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    root = os.getuid() == 0
    pythons = [Path(sb.base_python()), Path("/usr/local/bin/python3"), Path("/usr/bin/python3")]
    python = next(path for path in pythons if not root or _reachable(path))
    user = (
        f"setpriv --reuid {UID} --regid {UID} --clear-groups --bounding-set=-all --inh-caps=-all --no-new-privs".split()
    )
    command = [*(user if root else []), str(python), "-m", "tests.trainer.hostile", "--as-in-a-pod"]

    def start(*options: str) -> subprocess.Popen[bytes]:
        environment = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": "/tmp"}
        return subprocess.Popen(
            [*command, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/"
        )

    yield start
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def results(pod: Any) -> dict[str, Any]:
    """Rows by name: with all means, without Landlock, and whether a program has its effect without a sandbox."""
    runs = {"all": pod("--json"), "no-landlock": pod("--json", "--no-landlock"), "controls": pod("--controls")}
    found = {}
    for name, process in runs.items():
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err.decode()
        found[name] = json.loads(out)
    return found


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda h: h.name)
def test_hostile_program_is_stopped(hostile: Hostile, results: dict[str, Any]) -> None:
    everything = results["all"]
    assert everything["uid"] != 0 and not everything["protection"]["user_namespace"]
    row = next(row for row in everything["rows"] if row["name"] == hostile.name)
    assert not row["passed"] and row["damage"] == [], row
    assert re.search(hostile.says, row["reason"]), f"stopped by something else: {row}"
    if hostile.control:
        assert results["controls"][hostile.name], "it does nothing without a sandbox either, so it proves nothing"
    if hostile.without_landlock:
        row = next(row for row in results["no-landlock"]["rows"] if row["name"] == hostile.name)
        assert not row["passed"] and row["damage"] == [], row
        assert re.search(hostile.without_landlock, row["reason"]), row


BENIGN = {
    "modules": "import re, math, collections, itertools, functools, heapq, bisect, string, decimal, fractions, statistics\n"
    "import datetime, json, random, copy, typing, dataclasses, hashlib, enum, operator, sys, time, os\n"
    "assert re.findall('[a-z]+', 'ab1c') == ['ab', 'c'] and hashlib.md5(b'x').hexdigest()",
    "dataclass": "import dataclasses\n@dataclasses.dataclass\nclass A:\n x: int = 1\nassert A() == A(1)",
    "doctest-style main": "ran = []\nif __name__ == '__main__': ran.append(1)\nassert ran",
    "recursion": "def f(n): return 1 if n == 0 else f(n - 1)\nassert f(900) == 1",
    "large but allowed": "x = bytearray(2**27)\nassert sum(x[:10]) == 0",
    "unicode and output": "print('ü' * 1000)\nimport sys\nsys.stderr.write('x')",
    "its own alarm": "import signal, time\nhit = []\nsignal.signal(signal.SIGALRM, lambda *a: hit.append(1))\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.01)\ntime.sleep(0.05)\nassert hit",
    "asyncio": "import asyncio\nasync def f():\n await asyncio.sleep(0.001)\n return 7\nassert asyncio.run(f()) == 7",
    "unittest": "import unittest\nclass T(unittest.TestCase):\n def test(self): self.assertEqual(1, 1)\n"
    "assert unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T)).wasSuccessful()",
    "a temporary file": "import tempfile\nwith tempfile.TemporaryFile('w+') as f:\n"
    " f.write('a')\n f.seek(0)\n assert f.read() == 'a'",
    "files that come and go": "import os\nfor _ in range(2000):\n open('x', 'w').close()\n os.remove('x')",
    "the same draw and the same hashes every time": "import random\nassert random.random() == 0.8444218515250481\n"
    "assert hash('a') == HASH",
}
FILELESS = ("asyncio", "a temporary file", "files that come and go")
"""What cannot run where no file can be opened."""


@pytest.mark.parametrize("landlock", [True, False], ids=["landlock", "no-landlock"])
def test_benign_programs_pass(landlock: bool, tmp_path: Path) -> None:
    protection = sb.find_protection()
    sandbox = Sandbox(tmp_path, protection if landlock else Protection(landlock=0))
    command = [sb.base_python(), "-S", "-c", "print(hash('a'))"]
    seeded = int(subprocess.check_output(command, env={"PYTHONHASHSEED": "0"}))
    for name, program in BENIGN.items():
        if landlock or name not in FILELESS:
            verdict = sandbox.run(program.replace("HASH", str(seeded)), SECOND)
            assert verdict.passed, f"{name}: {verdict}"
    assert list(tmp_path.iterdir()) == []


WITHOUT_FILTER: dict[str, tuple[str, str]] = {
    "Landlock: TCP": ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "Permission denied|unreachable"),
    "Landlock: signals": ("import os\nos.kill(os.getppid(), 0)", "not permitted"),
    "Landlock: ptrace": ("open('/proc/1/environ')", "Permission denied"),
    "namespace: no interface is up": (
        "import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
        "unreachable",
    ),
}


@pytest.mark.parametrize(("program", "says"), WITHOUT_FILTER.values(), ids=WITHOUT_FILTER.keys())
def test_the_other_layers_hold_without_the_filter(program: str, says: str, tmp_path: Path) -> None:
    protection = sb.find_protection()
    if protection.landlock < 6 or not protection.user_namespace:
        pytest.skip(f"this kernel has not all layers: {protection}")
    verdict = Sandbox(tmp_path, Protection(protection.landlock, False, True)).run(program, SECOND)
    assert not verdict.passed and re.search(says, verdict.reason), verdict


def test_a_daemon_that_gets_away_is_killed(tmp_path: Path) -> None:
    """Without the filter, and as root, whom RLIMIT_NPROC does not hold: the supervisor finds what was left behind."""
    program = (
        "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0: time.sleep(60)\n os._exit(0)\nos.wait()"
    )
    verdict = Sandbox(tmp_path, Protection(landlock=sb.find_protection().landlock, seccomp=False)).run(program, SECOND)
    if os.getuid() == 0:
        assert verdict.strays == 1 and verdict.passed, verdict
    else:
        assert "temporarily unavailable" in verdict.reason, verdict


def test_a_killed_rank_takes_its_program_along(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom finetune_trainer.evaluation.sandbox import *\n"
        f"Sandbox(Path({str(tmp_path)!r}), find_protection()).run('import time; time.sleep(60)', Limits.of(60))"
    )
    rank = subprocess.Popen([sb.base_python(), "-S", "-c", code], env={"PYTHONPATH": str(ROOT / "trainer_image")})
    jails: list[int] = []
    while len(jails) < 2:
        jails = _descendants(rank.pid)
        assert rank.poll() is None
    rank.kill()
    rank.wait()
    while any(Path(f"/proc/{pid}/cmdline").exists() and _alive(pid) for pid in jails):
        pass  # pytest-timeout is the limit


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _descendants(pid: int) -> list[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def test_the_self_test_notices_a_sandbox_that_leaks(tmp_path: Path) -> None:
    Sandbox(tmp_path, sb.find_protection()).check()
    for broken, name in ((Protection(landlock=0, seccomp=False), "opening a file"),):
        with pytest.raises(sb.SandboxError, match=name):
            Sandbox(tmp_path, broken).check()


def test_a_kernel_without_filters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"landlock": 7, "seccomp": False, "user_namespace": True}
    monkeypatch.setattr(sb, "_ask", lambda *_: facts)
    with pytest.raises(sb.SandboxError, match="no seccomp filters"):
        sb.find_protection()


def test_arm64_has_a_number_for_everything_but_old_names() -> None:
    """glibc and CPython on arm64 use the `*at` forms; a hole would break programs there. The table is the kernel's headers'."""
    holes = {name for name, (_, arm) in seccomp.BOTH.items() if arm is None}
    old = "access alarm dup2 epoll_wait getpgrp lstat open pause pipe poll readlink rename select stat time unlink"
    assert " ".join(sorted(holes)) == old
    assert len(seccomp.assemble(1, machine="aarch64")) % 8 == 0
    headers = Path("/usr/include/asm-generic/unistd.h"), Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not all(path.exists() for path in headers):
        pytest.skip("no kernel headers here")
    generic, x86 = (dict(re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", path.read_text())) for path in headers)
    for name, (on_x86, on_arm) in seccomp.BOTH.items():
        assert on_x86 is None or int(x86[name]) == on_x86, name
        theirs = {"newfstatat": "fstatat"}.get(name, name)
        assert on_arm is None or int(generic[theirs]) == on_arm, name
