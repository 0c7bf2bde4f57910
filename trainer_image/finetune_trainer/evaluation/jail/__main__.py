"""The supervisor of one program: starts the child, watches its limits, kills it and what it left, and reports.

It is as unprivileged as the child, but has all the rights that the child gave up; it reads nothing of what the child writes
but bytes, and believes a success only with the request's token.
"""

import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import sys
import time
from typing import Any

from finetune_trainer.evaluation.jail import inmate, landlock, seccomp

PR_SET_CHILD_SUBREAPER = 36
POLL_SECONDS = 0.02
RESULT_BYTES = 4096


def main() -> None:
    """Reads the request, writes the verdict."""
    libc = ctypes.CDLL(None)
    libc.prctl(inmate.PR_SET_PDEATHSIG, signal.SIGKILL)  # the rank's death
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a child leaves behind becomes ours
    request = json.loads(sys.stdin.buffer.read())
    if os.getppid() != request["parent"]:
        return
    if request.get("probe"):
        verdict: dict[str, Any] = probe()
    else:
        verdict = supervise(request)
    sys.stdout.write(json.dumps(verdict))
    sys.stdout.flush()


def probe() -> dict[str, Any]:
    """What this kernel, in this container, has."""
    return {"landlock": landlock.abi(), "seccomp": seccomp.available(), "user_namespace": _namespaces_work()}


def _namespaces_work() -> bool:
    pid = os.fork()
    if pid == 0:
        try:
            inmate.enter_namespaces()
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def supervise(request: dict[str, Any]) -> dict[str, Any]:
    """Runs the program to its end, whoever brings that about."""
    _first_to_go()
    if not request["landlock"]:
        for name in inmate.PRELOADED.split():
            importlib.import_module(name)
    output, output_end = os.pipe()
    result, result_end = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        inmate.become(request, output_end, result_end)
    os.close(output_end)
    os.close(result_end)
    watch = Watch(pid, output, result, request)
    try:
        killed = watch.run(started)
    finally:
        watch.end()
        strays = _kill_strays()
    return {**watch.verdict(killed), "strays": strays, "wall_seconds": round(time.monotonic() - started, 3)}


class Watch:
    """The child, its pipes and its limits."""

    def __init__(self, pid: int, output: int, result: int, request: dict[str, Any]) -> None:
        self.pid, self.request, self.limits = pid, request, request["limits"]
        self.pipes = {output: b"", result: b""}
        self.output, self.result = output, result
        self.open = [output, result]
        self.num_output = 0
        self.status: int | None = None
        self.cpu_seconds = 0.0

    def run(self, started: float) -> str | None:
        """Watches until the end. Returns the limit that the program had to be killed for."""
        while not self._ended():
            readable, _, _ = select.select(self.open, [], [], POLL_SECONDS)
            self._read(readable)
            if self.num_output > self.limits["output_bytes"]:
                return f"wrote more than {self.limits['output_bytes']} bytes of output"
            if time.monotonic() - started > self.limits["wall_seconds"]:
                return f"ran for more than {self.limits['wall_seconds']} s"
            if problem := self._folder():
                return problem
        while self.result in self.open and select.select([self.result], [], [], 0)[0]:
            self._read([self.result])
        return None

    def _ended(self) -> bool:
        """It is not reaped yet: its number must stay its own until its session has been killed."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def end(self) -> None:
        """Kills the child and its session, and takes note of how it ended."""
        with contextlib.suppress(ProcessLookupError):  # it has not come to its `setsid`
            os.killpg(self.pid, signal.SIGKILL)
        os.kill(self.pid, signal.SIGKILL)
        _, self.status, usage = os.wait4(self.pid, 0)
        self.cpu_seconds = usage.ru_utime + usage.ru_stime

    def _read(self, readable: list[int]) -> None:
        for pipe in readable:
            data = os.read(pipe, 65536)
            if not data:
                self.open.remove(pipe)
            elif pipe == self.output:
                self.num_output += len(data)
                self.pipes[pipe] = (self.pipes[pipe] + data)[-RESULT_BYTES:]
            else:
                self.pipes[pipe] = (self.pipes[pipe] + data)[:RESULT_BYTES]

    def _folder(self) -> str | None:
        """One file is bounded by RLIMIT_FSIZE; their number and sum are bounded here, up to what fits between two looks."""
        total = count = 0
        for entry in os.scandir(self.request["folder"]):
            count += 1
            with contextlib.suppress(FileNotFoundError):  # the program may have removed it since
                total += entry.stat(follow_symlinks=False).st_size
        if count > self.limits["folder_files"] or total > self.limits["folder_bytes"]:
            return f"wrote more than {self.limits['folder_files']} files or {self.limits['folder_bytes']} bytes"
        return None

    def verdict(self, killed: str | None) -> dict[str, Any]:
        """What happened, in one sentence."""
        said = self.pipes[self.result].decode(errors="replace")
        ready, _, rest = said.partition("ready\n")
        token, _, answer = rest.partition(" ")
        if token != self.request["token"]:  # not from `inmate`, whose answers begin with it
            answer = ""
        if "ready\n" not in said and killed is None:
            return {"passed": False, "broken": True, "reason": ready or f"the child ended early ({self.status})"}
        passed = killed is None and answer == "passed" and self.status == 0
        return {
            "passed": passed,
            "broken": False,
            "reason": "passed" if passed else killed or self._reason(answer),
            "cpu_seconds": round(self.cpu_seconds, 3),
            "output": self.pipes[self.output].decode(errors="replace"),
        }

    def _reason(self, answer: str) -> str:
        assert self.status is not None
        code = os.waitstatus_to_exitcode(self.status)
        if code == -signal.SIGKILL and self.cpu_seconds > self.limits["cpu_seconds"] - 0.5:
            return f"used more than {self.limits['cpu_seconds']} s of CPU time"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return answer or f"left with exit code {code} before its end"


def _first_to_go() -> None:
    """Where memory runs out, this goes before the trainer does."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
            file.write("1000")
    except OSError:
        return


def _kill_strays() -> int:
    """Kills what the child left behind and has become ours, until nothing is. Returns how many there were."""
    strays = 0
    while children := _children():
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        strays += len(children)
    return strays


def _children() -> list[int]:
    """By their parent's number in /proc: the list of children is not compiled into every kernel."""
    me, found = os.getpid(), []
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if parent == me:
                found.append(int(name))
    return found


if __name__ == "__main__":
    main()
