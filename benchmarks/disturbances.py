"""What breaks a job on this machine's GPUs, how soon it is found and trains again, and whether the result is the same.

    python benchmarks/disturbances.py [--shape 1.3b] [--ranks 2] [--stage 2] [--only rank-hung] [--parallel 2] [--json out.json]

One job under `finetune run` (LoRA r16, BF16) is trained once undisturbed and then once for each disturbance:

- rank-killed: SIGKILL to the last rank.
- rank-hung: SIGSTOP to the last rank; `recovery.hangTimeoutSeconds` is `--hang`.
- out-of-memory: another process takes what is free on every GPU, and a step later the last rank has a row that is much longer
  than all before; only with GPUs.
- interrupted: Ctrl-C, then the same command.
- fewer-ranks: Ctrl-C, then the same command with half of the ranks.

Seconds since the disturbance (when the rank has no memory, or when the job that was interrupted has left): `detected` when the
supervisor has named the cause and ended all ranks, `training_again` when the first step of the next attempt is done. `identical`
compares the exported weights' bytes with the undisturbed job's, and `loss_difference` is the largest relative difference of a
step's loss from its journal. Exit status 1 if a cause is not the one that it should be, a rank is left, weights differ where they
must not, or the losses of fewer ranks by more than the journal tolerates.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.jobs import SHAPES, weights_digest, write_model
from benchmarks.local_job import CPUS, LocalJob, inputs, jobs_folder
from finetune_trainer.data.order import RowOrder
from finetune_trainer.journal import ROUNDING
from tests.trainer import tiny

SEED = 42
STEPS, BREAK_AT, LONG_AT, EVERY = 16, 7, 12, 5
"""Of the job; where it is broken; the step with the long row; steps between checkpoints."""
HOG = """
import sys, torch
devices = range(torch.cuda.device_count())
for device in devices:
    torch.cuda.mem_get_info(device)
sys.stdin.readline()
held = []
for device in devices:
    free, _ = torch.cuda.mem_get_info(device)
    held.append(torch.empty(free - (256 << 20), dtype=torch.uint8, device=f"cuda:{device}"))
print("ready", flush=True)
sys.stdin.read()
"""
"""Told to, takes the GPUs' free memory, but for what a collective may still want, until its standard input is closed."""
Helper = subprocess.Popen[str]


@dataclass(frozen=True)
class Disturbance:
    """Something that is done to a running job."""

    act: Callable[[LocalJob, Helper | None], object]
    reason: str
    """That the first attempt has to end with."""
    helper: str = ""
    """A program that is started before the job, since it takes as long to be ready as some steps do."""


def main() -> int:
    """Runs the undisturbed job and the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="of the model")
    parser.add_argument("--ranks", type=int, default=2, help="GPUs")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the long row; the others have a sixteenth")
    parser.add_argument("--hang", type=int, default=15, help="recovery.hangTimeoutSeconds")
    parser.add_argument("--only", choices=(*DISTURBANCES, *RESUMED), action="append", help="repeat for several")
    parser.add_argument("--parallel", type=int, default=1, help="disturbances at a time; each has its own job")
    parser.add_argument("--folder", type=Path, help="holds the model and all else meanwhile; default: /tmp")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    wanted = options.only or [
        n for n in (*DISTURBANCES, *RESUMED) if (cuda or n != ALONE) and (options.ranks > 1 or n != FEWER)
    ]
    if ALONE in wanted and not cuda:
        parser.error(f"--only {ALONE}: needs GPUs, and there is none")
    if FEWER in wanted and options.ranks == 1:
        parser.error(f"--only {FEWER}: needs --ranks of 2 or more")
    results: dict[str, Any] = {"device": torch.cuda.get_device_name() if cuda else "cpu", "ranks": options.ranks}
    with jobs_folder("disturbances-", options.folder) as root:
        write_model(root / "model", SHAPES[options.shape])
        _write_rows(root / "train.jsonl", options)
        unbroken = LocalJob(root / "unbroken", "unbroken", _spec(root, options, options.ranks))
        unbroken.start()
        status = unbroken.exit_status(400)
        assert status == 0, f"{unbroken.said}\n{unbroken.log[-3000:]}"
        runs: dict[str, Callable[[LocalJob], dict[str, Any]]] = {
            **{name: partial(_disturb, disturbance=d) for name, d in DISTURBANCES.items()},
            "interrupted": partial(_interrupt, ranks=options.ranks),
            FEWER: partial(_interrupt, ranks=options.ranks // 2),
        }
        turn = threading.Lock()

        def record(name: str) -> None:
            job = LocalJob(root / name, name, _spec(root, options, options.ranks))
            try:
                result = {**runs[name](job), **_compared(job, unbroken)}
            except Exception as error:  # whatever it is, the other disturbances are told
                job.end()
                result = {"error": f"{type(error).__name__}: {error}"}
            with turn:
                results[name] = result
                print(json.dumps({name: result}), file=sys.stderr, flush=True)
                if options.json:
                    options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")

        # No `with`, which would wait for the others when this program is told to end.
        list(ThreadPoolExecutor(options.parallel).map(record, [name for name in wanted if name != ALONE]))
        if ALONE in wanted:
            record(ALONE)
    print(json.dumps(results, indent=1))
    return 0 if all(_good(name, results[name]) for name in wanted) else 1


def _good(name: str, result: dict[str, Any]) -> bool:
    same = result.get("loss_difference", 1) <= ROUNDING if name == FEWER else result.get("identical", False)
    return bool(result.get("as_it_should_be") and same)


def _kill(job: LocalJob, _helper: Helper | None) -> None:
    os.kill(job.states()[-1].pid, signal.SIGKILL)


def _stop(job: LocalJob, _helper: Helper | None) -> None:
    os.kill(job.states()[-1].pid, signal.SIGSTOP)


def _take_memory(_job: LocalJob, helper: Helper | None) -> None:
    assert helper is not None and helper.stdin is not None and helper.stdout is not None
    helper.stdin.write("now\n")
    helper.stdin.flush()
    assert helper.stdout.readline() == "ready\n"


ALONE = "out-of-memory"
"""It takes the memory of all that run."""
DISTURBANCES = {
    "rank-killed": Disturbance(_kill, "RankKilled"),
    "rank-hung": Disturbance(_stop, "Hang"),
    ALONE: Disturbance(_take_memory, "OutOfMemoryGPU", HOG),
}
FEWER = "fewer-ranks"
RESUMED = ("interrupted", FEWER)


def _disturb(job: LocalJob, disturbance: Disturbance) -> dict[str, Any]:
    """Breaks a job on its way and waits for its end."""
    helper = None
    if disturbance.helper:
        command = [sys.executable, "-c", disturbance.helper]
        helper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    job.start()
    try:
        job.wait(lambda: len(job.steps) >= BREAK_AT, 300, what=f"step {BREAK_AT}")
        ranks = [state.pid for state in job.states()]
        at = time.time()
        disturbance.act(job, helper)
        report = job.records / "attempt-1.report.json"
        if helper is not None:
            at = _failed_at(job)  # the memory was taken some steps before it is needed
        detected = job.wait(report.exists, 300, what="the end of the first attempt")
        gone = job.wait(
            lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), 30, what="the end of all ranks"
        )
    finally:
        if helper is not None:
            helper.communicate("")
    again = _trains_again(job)
    status = job.exit_status(300)
    first = job.status["attempts"][0]
    told = json.loads(report.read_text(encoding="utf-8"))
    return {
        "as_it_should_be": status == 0 and first["reason"] == disturbance.reason and told["rank"] == len(ranks) - 1,
        "reason": first["reason"],
        "rank": told["rank"],
        "message": told["message"],
        "lost_steps": first.get("lostSteps"),
        "detected_seconds": round(max(detected, gone) - at, 2),
        "training_again_seconds": round(again - at, 2),
    }


def _interrupt(job: LocalJob, ranks: int) -> dict[str, Any]:
    """Interrupts a job on its way and goes on with so many ranks."""
    job.start()
    job.wait(lambda: len(job.steps) >= BREAK_AT, 300, what=f"step {BREAK_AT}")
    interrupted = job.interrupt()
    at = time.time()
    job.spec["trainer"] = {**job.spec["trainer"], "numProcPerNode": ranks}
    job.start()
    again = _trains_again(job)
    status = job.exit_status(300)
    return {
        "as_it_should_be": (interrupted, status) == (130, 0),
        "ranks_then": ranks,
        "message": job.status["message"],
        "training_again_seconds": round(again - at, 2),
    }


def _compared(job: LocalJob, unbroken: LocalJob) -> dict[str, Any]:
    """With the undisturbed job: exported bytes, and the losses of all steps, those that were done twice as well."""
    expected = {step["step"]: step["loss"] for step in unbroken.steps}
    difference = max(abs(step["loss"] / expected[step["step"]] - 1) for step in job.steps)
    ours, theirs = (weights_digest(each.folder / "output") for each in (job, unbroken))
    return {"identical": ours == theirs, "loss_difference": difference}


def _failed_at(job: LocalJob) -> float:
    """When the first rank has said why it ends."""
    times: list[float] = []

    def failed() -> bool:
        times.extend(job.failure_times())
        return bool(times)

    job.wait(failed, 300, what="a rank's own words", pause=0.005)
    return min(times)


def _trains_again(job: LocalJob) -> float:
    """When the second attempt has done its first step."""
    return job.wait(lambda: any(step["attempt"] == 2 for step in job.steps), 300, what="a step of the second attempt")


def _spec(root: Path, options: argparse.Namespace, ranks: int) -> dict[str, Any]:
    return {
        **inputs(root),
        "method": "LoRA",
        "adapter": {"rank": 16, "alpha": 32},
        "training": {
            "maxLength": options.length,
            "microBatchSize": 1,
            "globalBatchSize": 2 * ranks,
            "maxSteps": STEPS,
            "learningRate": "1e-4",
            "seed": SEED,
        },
        "deepspeed": {"zeroStage": options.stage},
        "trainer": {"numProcPerNode": ranks, "resourcesPerNode": CPUS},
        "recovery": {"hangTimeoutSeconds": options.hang},
        "checkpoint": {"everySteps": EVERY},
    }


def _write_rows(file: Path, options: argparse.Namespace) -> None:
    """One row for each place of all steps; the long one comes to the last rank in the step `LONG_AT`."""
    batch = 2 * options.ranks
    order = RowOrder(STEPS * batch, SEED, batch, epochs=None, max_steps=STEPS)
    long = order.rows(LONG_AT)[-1]
    words = [options.length if row == long else options.length // 16 for row in range(STEPS * batch)]
    texts = (" ".join(tiny.WORDS[(row + at) % len(tiny.WORDS)] for at in range(n)) for row, n in enumerate(words))
    tiny.write_jsonl(file, [{"text": text} for text in texts])


if __name__ == "__main__":
    sys.exit(main())
