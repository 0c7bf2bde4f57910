"""Runs other programs, and turns a failure into an error that says what was run and what it said."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.errors import ClusterError

# Where iptables, runc and the like live, whatever the caller's PATH says.
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Parts see no proxy settings: their traffic never leaves the machine, and a proxy would swallow it.
PART_ENV: Mapping[str, str] = {"PATH": SYSTEM_PATH, "HOME": "/root", "LANG": "C.UTF-8"}


def run(
    argv: Sequence[str | Path],
    *,
    input: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
    hint: str | None = None,
    timeout_seconds: float | None = None,
) -> str:
    """Runs a program to its end and returns its stdout.

    Args:
        argv: The program and its arguments.
        input: Text for its stdin.
        env: Added to this process's environment.
        cwd: Where it runs.
        log: A file that receives stdout and stderr instead; the result is then empty.
        hint: What to do when it fails.
        timeout_seconds: When to give up.

    Raises:
        ClusterError: It is not there, failed, or took too long.
    """
    command = [str(word) for word in argv]
    try:
        if log is None:
            done = subprocess.run(
                command, input=input, env=_env(env), cwd=cwd, capture_output=True, text=True, timeout=timeout_seconds
            )
        else:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w") as out:
                done = subprocess.run(
                    command,
                    input=input,
                    env=_env(env),
                    cwd=cwd,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=timeout_seconds,
                )
    except FileNotFoundError as error:
        raise ClusterError(f"`{command[0]}` is not installed", hint=hint) from error
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"`{_short(command)}` took more than {timeout_seconds:.0f} s", hint=hint, log=log) from error
    if done.returncode:
        said = (done.stderr or done.stdout or "") if log is None else _tail(log)
        raise ClusterError(
            f"`{_short(command)}` failed with {done.returncode}: {said.strip()[-2000:]}", hint=hint, log=log
        )
    return done.stdout or ""


def succeeds(argv: Sequence[str | Path], timeout_seconds: float = 10) -> bool:
    """Tells whether a program runs and returns 0."""
    try:
        done = subprocess.run([str(w) for w in argv], capture_output=True, timeout=timeout_seconds)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _env(extra: Mapping[str, str] | None) -> dict[str, str]:
    env = {**os.environ, **(extra or {})}
    env["PATH"] = f"{env.get('PATH', '')}:{SYSTEM_PATH}"
    return env


def _short(command: Sequence[str]) -> str:
    text = " ".join(command)
    return text if len(text) <= 160 else text[:157] + "..."


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
