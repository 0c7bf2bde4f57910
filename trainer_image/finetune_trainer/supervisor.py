"""The parent of a pod's ranks: starts them, watches them, and tells the world how it went.

Owns signals, the hang watch, the choice of the first cause among several, the termination message and the exit code. Must not
import torch: it has to answer and to act while the ranks load, hang or die.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from finetune_api.launch import LaunchSpec, PathSource
from finetune_api.reasons import EXIT_CODES, FAILURES, Reason
from finetune_api.reports import TRACEBACK_LIMIT, Activity
from finetune_trainer import hang, server
from finetune_trainer.config import read_launch
from finetune_trainer.errors import TrainerError, classify, short_traceback
from finetune_trainer.gang import Gang
from finetune_trainer.hang import HangWatch, Suspect
from finetune_trainer.logs import setup_logging
from finetune_trainer.readahead import read_ahead
from finetune_trainer.report import termination_report
from finetune_trainer.state import RankState, read_failure, read_state

POLL_SECONDS = 0.05
SETTLE_SECONDS = 0.3
"""A lost peer is noticed by the others within milliseconds: so long a better cause than `CommunicationError` is awaited."""
OF_ONE_RANK = (Reason.OUT_OF_MEMORY_GPU, Reason.HARDWARE_FAULT, Reason.COMMUNICATION_ERROR, Reason.CODE_ERROR)
"""Which rank it was says which GPU to look at; what is wrong with a field or a file is wrong on all of them."""
log = logging.getLogger("finetune_trainer")


@dataclass(frozen=True)
class Outcome:
    """How this pod's share ended; `reason` None is success."""

    reason: Reason | None = None
    message: str = ""
    rank: int | None = None
    traceback: str = ""


def main(arguments: list[str], stop_requests: list[int]) -> int:
    """Runs one pod's share of a job and returns its exit code.

    Args:
        arguments: the command line.
        stop_requests: gets an entry for each SIGTERM or SIGINT that arrived.
    """
    parser = argparse.ArgumentParser(prog="python -m finetune_trainer", description=__doc__)
    parser.add_argument("--launch", type=Path, required=True, help="the LaunchSpec, a JSON file")
    parser.add_argument(
        "--termination-log", type=Path, default=Path("/dev/termination-log"), help="where the report goes"
    )
    parser.add_argument("--http-host", default="", help="address of /progress and /metrics; default: all interfaces")
    options = parser.parse_args(arguments)
    setup_logging(rank=None)
    with tempfile.TemporaryDirectory(prefix="finetune-", ignore_cleanup_errors=True) as folder:
        scratch, gang = Path(folder), Gang()
        state: RankState | None = None
        try:
            spec = read_launch(options.launch)
            listener = server.bind(spec.http_port, options.http_host)
            node_rank = int(os.environ.get("JOB_COMPLETION_INDEX", "0"))
            gang = Gang.start(spec, options.launch, node_rank, scratch)
            if isinstance(spec.model.source, PathSource) and (node_rank == 0 or spec.deepspeed.zero_stage < 3):
                read_ahead(Path(spec.model.source.path))  # under ZeRO-3 rank 0 reads for all
            ranks = sorted(gang.processes)
            server.serve(listener, lambda: [s for r in ranks if (s := read_state(scratch, r))], spec.attempt)
            outcome = watch(spec, gang, scratch, stop_requests)
            state = read_state(scratch, ranks[0])
        except TrainerError as error:
            outcome = Outcome(error.reason, str(error))
        except Exception as error:
            log.exception("the supervisor failed")
            reason, message = classify(error)
            outcome = Outcome(reason, message, traceback=short_traceback(error, TRACEBACK_LIMIT))
        finally:
            _write_report(options.termination_log, state, outcome)
            gang.kill()
    return _exit_code(outcome)


def watch(spec: LaunchSpec, gang: Gang, scratch: Path, stop_requests: list[int]) -> Outcome:
    """Waits for the ranks' end, whatever it is."""
    kill_at = float("inf")
    hangs = HangWatch(gang, scratch, spec.hang_timeout_seconds, alone=spec.num_nodes == 1)
    while True:
        exits = gang.exits()
        if any(exits.values()):
            return _first_cause(spec, gang, scratch)
        if len(exits) == len(gang.processes):
            return Outcome()
        if stop_requests and kill_at == float("inf"):
            if _loading(gang, scratch):
                return Outcome(Reason.TERMINATED, "asked to stop while loading: nothing to save yet")
            # A margin for the report and for Kubernetes' own clock.
            kill_at = time.monotonic() + max(1.0, spec.termination_grace_seconds - 3)
            log.info("asked to stop (signal %d): the ranks finish their step", stop_requests[0])
            gang.signal(signal.SIGTERM)
        if time.monotonic() > kill_at:
            return Outcome(Reason.TERMINATED, "asked to stop; the step or its checkpoint outlasted the grace period")
        if suspect := hangs.look():
            return _of_hang(spec, suspect)
        time.sleep(POLL_SECONDS)


def _loading(gang: Gang, scratch: Path) -> bool:
    states = [read_state(scratch, rank) for rank in gang.processes]
    return any(state is None or state.activity == Activity.LOADING for state in states)


def _of_hang(spec: LaunchSpec, suspect: Suspect) -> Outcome:
    rank, stack = suspect.state.rank, suspect.stack[:TRACEBACK_LIMIT]
    if spec.num_nodes > 1 and suspect.waits:
        message = f"all ranks of this pod wait for other pods: {suspect.message}"
        return Outcome(Reason.COMMUNICATION_ERROR, message, rank, stack)
    return Outcome(Reason.HANG, suspect.message, rank, stack)


def _first_cause(spec: LaunchSpec, gang: Gang, scratch: Path) -> Outcome:
    """The cause among the ranks that ended: a lost peer makes the others fail too, and they may be faster to say so.

    Where all that ended have only waited for too long, it is a rank that did not end.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        causes = [_cause(spec, rank, code, scratch) for rank, code in gang.exits().items() if code != 0]
        firsts = [c for c in causes if c[1].reason is not Reason.COMMUNICATION_ERROR]
        if firsts or time.monotonic() > deadline:
            limit = spec.communication_timeout_seconds - SETTLE_SECONDS
            hung = None if firsts else hang.suspect(gang, scratch, limit)
            return _of_hang(spec, hung) if hung else min(firsts or causes, key=lambda c: c[0])[1]
        time.sleep(0.01)


def _cause(spec: LaunchSpec, rank: int, code: int, scratch: Path) -> tuple[float, Outcome]:
    """When and why one rank ended."""
    failure = read_failure(scratch, rank)
    if failure is not None:
        where = f"rank {rank}: " if failure.reason in OF_ONE_RANK and spec.world_size > 1 else ""
        return failure.time, Outcome(failure.reason, where + failure.message, rank, failure.traceback)
    state, limit = read_state(scratch, rank), spec.communication_timeout_seconds
    if code == -signal.SIGABRT and state is not None and hang.silence_seconds(state) > limit - SETTLE_SECONDS:
        # NCCL's watchdog aborts the process without a word to Python.
        message = f"no answer from the other ranks within {limit} s"
        return time.monotonic(), Outcome(Reason.COMMUNICATION_ERROR, message, rank)
    if code < 0:
        name = signal.Signals(-code).name
        return time.monotonic(), Outcome(Reason.RANK_KILLED, f"rank {rank} was killed by {name}{_oom_hint()}", rank)
    message = f"rank {rank} ended with exit code {code} and no report in {scratch}"
    return time.monotonic(), Outcome(EXIT_CODES.get(code, Reason.CODE_ERROR), message, rank)


def _oom_hint() -> str:
    """Says so if the container's memory limit has killed a process (cgroup v2, else v1)."""
    for name in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        with contextlib.suppress(OSError):
            for line in Path(name).read_text().splitlines():
                key, _, count = line.partition(" ")
                if key == "oom_kill" and int(count) > 0:
                    return " (the container's memory limit was reached: raise trainer.resourcesPerNode.limits.memory)"
    return ""


def _write_report(path: Path, state: RankState | None, outcome: Outcome) -> None:
    note = state.note if state is not None and outcome.reason is None else ""
    report = termination_report(state, outcome.reason, outcome.message or note, outcome.rank, outcome.traceback)
    if outcome.reason is None:
        log.info("done: step %d, eval loss %s", report.step, report.eval_loss)
    else:
        log.error("%s: %s", outcome.reason, outcome.message)
    try:
        path.write_text(report.to_json(), encoding="utf-8")
    except OSError as error:
        log.error("%s: the termination report cannot be written: %s", path, error.strerror)
        print(report.to_json(), file=sys.stderr)


def _exit_code(outcome: Outcome) -> int:
    if outcome.reason is None:
        return 0
    return FAILURES[outcome.reason].exit_code or FAILURES[Reason.CODE_ERROR].exit_code or 1
