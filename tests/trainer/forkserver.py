"""Starts supervisors and ranks by fork from a process that has imported torch, transformers, peft and DeepSpeed once.

Importing them takes 10 s and more of CPU time for each rank, which is most of a tiny job's life. Here only the interpreter's
start is left out; supervisor, ranks, signals, files and sockets are the real ones. `test_process.py` starts real interpreters.

Protocol: one JSON request a connection on a Unix socket, `{arguments, environment, log, exit_file}`; the answer is a pid.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

TICK_SECONDS = 0.01


class ForkedProcess:
    """The part of `subprocess.Popen` that `gang` uses, for a rank that is forked instead of started."""

    def __init__(self, command: list[str], env: dict[str, str], start_new_session: bool) -> None:
        assert command[1:3] == ["-m", "finetune_trainer.rank"] and start_new_session
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(env)
            if hook := env.get("TEST_HOOK"):  # a test's changes to this rank, such as a slow volume
                importlib.import_module(hook)
            _leave(lambda: __import__("finetune_trainer.rank", fromlist=["main"]).main(command[3:]))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.005)
        return self.returncode or 0


def _leave(work: Any) -> None:
    code = 70
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _supervise(request: dict[str, Any]) -> int:
    from finetune_trainer import gang, supervisor

    gang.start_process = ForkedProcess  # type: ignore[assignment,misc]
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stops.append(number))
    return supervisor.main(request["arguments"], stop_requests=stops)


def _start(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        os.setsid()
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.clear()
        os.environ.update(request["environment"])
        import tempfile

        tempfile.tempdir = None  # read TMPDIR again
        _leave(lambda: _supervise(request))
    return pid


def serve(path: str) -> None:
    """Serves until the parent is gone."""
    parent = os.getppid()
    exit_files: dict[int, Path] = {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(TICK_SECONDS)
        print("ready", flush=True)
        while os.getppid() == parent:
            while exit_files:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                file = exit_files.pop(pid)
                file.with_suffix(".new").write_text(str(os.waitstatus_to_exitcode(status)))
                file.with_suffix(".new").rename(file)
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection, connection.makefile("rw") as stream:
                request = json.loads(stream.readline())
                pid = _start(request)
                exit_files[pid] = Path(request["exit_file"])
                stream.write(f"{pid}\n")


def main() -> None:
    os.environ.update({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"})
    from finetune_trainer.logs import setup_logging

    setup_logging(None)
    from finetune_trainer.startup import import_libraries

    import_libraries()
    import deepspeed.ops.adam
    import fastapi
    import torch
    import transformers.models.llama.modeling_llama
    import uvicorn
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import finetune_trainer.metrics
    import finetune_trainer.rank
    import finetune_trainer.setup

    # Compiles a thousand patterns for all of transformers' models: half of a rank's start.
    get_checkpoint_conversion_mapping("llama")
    assert all((deepspeed, fastapi, torch, transformers, uvicorn, finetune_trainer))
    serve(sys.argv[1])


if __name__ == "__main__":
    main()
