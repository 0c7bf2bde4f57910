"""How a step scales over the GPUs of this machine, by ZeRO stage, beside one GPU in the same run.

    python benchmarks/scaling.py [--shape 8b] [--methods lora,full] [--ranks 1,2] [--stages 0,1,2,3] [--json out.json]

Each run is `finetune run` on a random model of the shape: rows packed to `--length` tokens from documents of about a seventh of
that, so many rows for each rank whatever their number (weak scaling), one micro-batch a step, which exposes communication most.
LoRA is r16 in BF16, two rows; full is PureBF16, one row. Speed is that of the median step after `tracking.profiler` has taken its
trace; efficiency is the speed of a GPU divided by that of the one alone; memory is each rank's own peak. Communication is told
from every rank's trace (see traces.py). A run is ended when it has been measured, without its last checkpoint, and none is begun
anew. On a machine without GPUs the ranks are processes, which shows that the program works and nothing else.
"""

import argparse
import json
import shutil
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import traces
from benchmarks.jobs import SHAPES, write_documents, write_model
from benchmarks.local_job import CPUS, LocalJob, inputs, jobs_folder

WAIT, WARMUP, ACTIVE = 3, 1, 2
"""Steps of the profiler; the first ones compile."""
METHODS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "lora": (2, {"method": "LoRA", "adapter": {"rank": 16, "alpha": 32}}, {"precision": "BF16"}),
    "full": (1, {"method": "Full"}, {"precision": "PureBF16"}),
}
"""Rows of a micro-batch, and what the job says."""
TOLD = ("attention:", "adapters:", "cross-entropy:", "engine:", "compile:", "memory:")
"""Lines of the log with these words are part of the result."""


def main() -> int:
    """Runs every combination, one rank first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="of the model")
    parser.add_argument("--methods", type=_methods, default="lora,full", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--ranks", default="1,2", help="GPUs; one alone is the measure for the others")
    parser.add_argument("--stages", default="0,1,2,3", help="ZeRO stages on several ranks; one rank has stage 0")
    parser.add_argument("--steps", type=int, default=6, help="measured steps")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--no-compile", action="store_true", help="everywhere")
    parser.add_argument("--deepspeed", default="{}", help='`deepspeed.config`, such as {"zero_optimization": {...}}')
    parser.add_argument("--limit", type=float, default=180, help="seconds for each run")
    parser.add_argument("--folder", type=Path, help="holds the model and all else meanwhile; default: /tmp")
    parser.add_argument(
        "--keep", type=Path, help="a folder that keeps the model, compiled code, logs and traces for the next call"
    )
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with jobs_folder("scaling-", options.folder) as folder:
        root = options.keep.absolute() if options.keep else folder
        if not (root / _model(options.shape)).exists():
            write_model(root / _model(options.shape), SHAPES[options.shape])
        write_documents(root / "train.jsonl", options.length)
        for method in options.methods:
            alone: float | None = None
            for ranks in map(int, options.ranks.split(",")):
                for stage in [0] if ranks == 1 else map(int, options.stages.split(",")):
                    run = _run(root, method, ranks, stage, options)
                    speed = run.get("tokens_per_second_per_gpu")
                    alone = speed if ranks == 1 else alone
                    if alone and speed:
                        run["efficiency"] = round(speed / alone, 4)
                    runs.append(run)
                    print(json.dumps(run), file=sys.stderr, flush=True)
                    if options.json:
                        options.json.write_text(json.dumps(runs, indent=1), encoding="utf-8")
    print(json.dumps(runs, indent=1))
    return 0 if all("error" not in run for run in runs) else 1


def _methods(text: str) -> list[str]:
    if wrong := set(text.split(",")) - set(METHODS):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(METHODS)}, not {', '.join(wrong)}")
    return text.split(",")


def _model(shape: str) -> str:
    return f"model-{shape}"


def _run(root: Path, method: str, ranks: int, stage: int, options: argparse.Namespace) -> dict[str, Any]:
    name = f"{method}-{ranks}-zero{stage}"
    rows, choice, precision = METHODS[method]
    before = WAIT + WARMUP + ACTIVE
    training = {
        "maxLength": options.length,
        "packing": True,
        "microBatchSize": rows,
        "globalBatchSize": rows * ranks * options.accumulation,
        "maxSteps": 100000,
        "learningRate": "1e-5",
        "compile": not options.no_compile,
        "ligerKernel": True,
        **precision,
    }
    profiler = {"uri": f"file://{root / 'traces'}", "wait": WAIT, "warmup": WARMUP, "active": ACTIVE}
    spec = {
        **inputs(root, _model(options.shape)),
        **choice,
        "training": training,
        "deepspeed": {"zeroStage": stage, "config": json.loads(options.deepspeed)},
        "trainer": {"numProcPerNode": ranks, "resourcesPerNode": CPUS},
        "checkpoint": {"everySteps": 100000},
        "recovery": {"backoffLimit": 0},
        "tracking": {"profiler": profiler},
    }
    settings = {**training, **spec["deepspeed"]}
    result: dict[str, Any] = {"shape": options.shape, "method": method, "ranks": ranks, "settings": settings}
    for old in [root / name, *(root / "traces").glob(f"{name}-*")]:
        shutil.rmtree(old, ignore_errors=True)
    job = LocalJob(root / name, name, spec)
    job.start()
    try:
        job.wait(lambda: len(job.steps) >= before + options.steps, options.limit, what="the last step", pause=0.1)
    except RuntimeError as error:
        return {**result, "step_seconds": [round(step["seconds"], 4) for step in job.steps], "error": str(error)}
    finally:
        job.end()
    steps = job.steps[before : before + options.steps]
    seconds = statistics.median(step["seconds"] for step in steps)
    speed = statistics.median(step["tokens"] for step in steps) / seconds
    files = sorted((root / "traces").glob(f"{name}-*/attempt-1/rank-*.json.gz"))
    with ProcessPoolExecutor() as pool:
        traced = list(pool.map(traces.read, files))
    return {
        **result,
        "tokens_per_second": round(speed, 1),
        "tokens_per_second_per_gpu": round(speed / ranks, 1),
        "step_seconds": [round(step["seconds"], 4) for step in steps],
        "losses": [round(step["loss"], 4) for step in job.steps],
        "peak_gib": [round(job.peak_bytes[rank] / 2**30, 2) for rank in range(ranks)],
        "communication": [{k: v and round(v, 4) for k, v in asdict(rank).items()} for rank in traced],
        "log": told(job.log),
    }


def told(log: str) -> list[str]:
    """What the trainer said about how it computes."""
    lines = [line.partition(" INFO ")[2] for line in log.splitlines()]
    return [line for line in lines if any(word in line for word in TOLD)]


if __name__ == "__main__":
    sys.exit(main())
