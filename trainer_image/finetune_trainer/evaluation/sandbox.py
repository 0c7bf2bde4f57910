"""Runs untrusted programs, from the trainer's side: what may be used on this machine, limits, and verdicts.

A program runs in a process of its own (see `jail`), with an empty environment, no network, no other process, no file but the
standard library and a private folder, and limits of memory, CPU time, wall-clock time and output. Must not import torch.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

JAIL = "finetune_trainer.evaluation.jail"
CODE_ROOT = Path(__file__).resolve().parents[2]
MARGIN_SECONDS = 30
"""A jail that does not answer so long after its program's last moment is killed: something is wrong with the machine."""


class SandboxError(RuntimeError):
    """Programs cannot be run safely here; the message says why."""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    cpu_seconds: int
    """Of CPU time: a verdict that does not depend on how busy the machine is."""
    wall_seconds: float
    """For a program that sleeps, and for a machine that is too busy."""
    memory_bytes: int = 512 * 2**20
    """Address space, the interpreter's 30 MB included."""
    output_bytes: int = 2**20
    file_bytes: int = 8 * 2**20
    folder_files: int = 64
    folder_bytes: int = 32 * 2**20
    open_files: int = 64

    @classmethod
    def of(cls, timeout_seconds: int) -> "Limits":
        """The limits of a benchmark's program: its CPU time, and four times as much until it is given up."""
        return cls(cpu_seconds=timeout_seconds, wall_seconds=4.0 * timeout_seconds)


@dataclass(frozen=True)
class Verdict:
    """How a program ended."""

    passed: bool
    """It came to its end: nothing was raised, and it did not leave before."""
    reason: str
    """`passed`, the error, or the limit that it met."""
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    output: str = ""
    """The end of what it printed."""
    strays: int = 0
    """Processes that it left behind, which were killed."""


@dataclass(frozen=True)
class Protection:
    """The kernel's means that a sandbox uses."""

    landlock: int
    """Version of its interface; 0: none, so that no file at all can be opened."""
    seccomp: bool = True
    user_namespace: bool = False

    def describe(self) -> str:
        """For the log."""
        files = (
            f"Landlock (version {self.landlock})"
            if self.landlock
            else "no Landlock here, so programs open no file and import only a fixed list of modules"
        )
        namespaces = "user and network namespaces" if self.user_namespace else "no user namespaces here (not needed)"
        return f"seccomp; {files}; {namespaces}; resource limits"


class Sandbox:
    """A place to run programs in.

    Args:
        folder: gets each program's private folder, for as long as the program runs.
        protection: from `find_protection`.
        python: the interpreter; None: the one under this process, without its virtual environment.
    """

    def __init__(self, folder: Path, protection: Protection, python: str | None = None) -> None:
        self.protection = protection
        self._folder = folder
        self._python = python or base_python()

    def run(self, program: str | Sequence[str], limits: Limits) -> Verdict:
        """Runs one program to its end. May be called from several threads.

        Args:
            program: its text; of several, readings of one answer, the first that is Python is run.
            limits: what it may use.

        Raises:
            SandboxError: the program could not be run at all; nothing is known about it.
        """
        with tempfile.TemporaryDirectory(prefix="program-", dir=self._folder) as folder:
            request = {
                "programs": [program] if isinstance(program, str) else list(program),
                "folder": folder,
                "token": secrets.token_hex(16),
                "limits": asdict(limits),
                **asdict(self.protection),
            }
            answer = _ask(self._python, request, limits.wall_seconds + MARGIN_SECONDS)
        if answer.pop("broken"):
            raise SandboxError(f"a program could not be run: {answer['reason']}")
        return Verdict(**answer)

    def check(self) -> None:
        """Proves with real programs that the sandbox holds what it promises here; a second at most.

        Raises:
            SandboxError: a program that should pass does not, or one that should be stopped is not.
        """
        limits = Limits.of(5)
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix="canary-") as canary:
            for name, program, wanted in (
                ("an empty program", "import re, math", True),
                ("opening a file", f"open({canary.name!r}).read()", False),
                ("opening a socket", "import socket; socket.socket()", False),
                ("starting a process", "import os; os.fork()", False),
                ("a signal to the parent", "import os; os.kill(os.getppid(), 0)", False),
            ):
                verdict = self.run(program, limits)
                if verdict.passed is not wanted:
                    raise SandboxError(f"the self-test `{name}` {'failed' if wanted else 'was not stopped'}: {verdict}")


def find_protection(python: str | None = None) -> Protection:
    """What this kernel and container offer.

    Raises:
        SandboxError: not enough to run an untrusted program.
    """
    facts = _ask(python or base_python(), {"probe": True}, MARGIN_SECONDS)
    if not facts["seccomp"]:
        raise SandboxError(
            "this kernel has no seccomp filters (CONFIG_SECCOMP_FILTER, on x86-64 or arm64), so a program that a model "
            "wrote could not be kept from the network and from other processes; run on nodes that have them"
        )
    return Protection(**facts)


def base_python() -> str:
    """The interpreter below a virtual environment: its standard library is all that programs get."""
    path: str = getattr(sys, "_base_executable", None) or sys.executable
    return path


def _ask(python: str, request: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
    """Starts a jail. It gets no environment of ours, no descriptor but its three, and no module outside the standard library."""
    command = [python, "-s", "-S", "-P", "-B", "-X", "utf8", "-m", JAIL]
    # A fixed hash seed: the order of a set of strings, and with it a verdict, is the same in every run.
    environment = {"PYTHONPATH": str(CODE_ROOT), "PYTHONHASHSEED": "0"}
    text = json.dumps({**request, "parent": os.getpid()})
    try:
        done = subprocess.run(
            command,
            input=text.encode(errors="surrogatepass"),
            env=environment,
            capture_output=True,
            timeout=timeout_seconds,
            check=False,
            cwd="/",
        )
        answer: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise SandboxError(f"the jail did not answer within {timeout_seconds:.0f} s") from error
    except ValueError as error:
        raise SandboxError(
            f"the jail ended with code {done.returncode}: {done.stderr.decode(errors='replace')[-500:]}"
        ) from error
    return answer
