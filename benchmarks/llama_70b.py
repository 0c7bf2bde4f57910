"""Llama-2-70B as it was published, under `finetune run`: LoRA rank 64 with ZeRO-3, and the two stages that came before it.

    python benchmarks/llama_70b.py --ranks 2 [--spill /dev/shm | --model FOLDER] [--layers 80] [--json out.json]

The LLaMA-Factory files in tests/convert/cases are converted. The first two stages (all weights; rank 8 without ZeRO) have to end
with what they need instead of starting, the second only where a GPU has less than 131 GiB; what they say is in the result. The
third is trained on random weights in the real size (138 GB, written to `--folder`, and to `--spill` what does not fit there) for
a few steps: two samples of `--length` tokens for each GPU, one micro-batch a step, once with the optimizer in the host's memory
as published, once without. Where flash-attn is not installed attention is `Auto`. `--layers 2 --tiny` shows on a CPU that the
program works. Each run is ended when it has been measured.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.jobs import SHAPES, write_model
from benchmarks.local_job import CPUS, LocalJob, inputs, jobs_folder
from benchmarks.scaling import told
from tests.trainer import published, tiny

FITS_NOWHERE = "llama2-70b-full"
EARLIER = (FITS_NOWHERE, "llama2-70b-lora-r8")
LAST = "llama2-70b-lora-zero3"
VARIANTS = {"as published": "CPU", "without offload": "None"}
REFUSED = "cannot fit on"
"""In what is said of a job whose state has no room (`finetune_trainer.memory`)."""
WARMUP = 2


def main() -> int:
    """Runs the stages in their order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="GPUs")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    parser.add_argument("--layers", type=int, help="fewer than 80")
    parser.add_argument("--tiny", action="store_true", help="a model of tiny width")
    parser.add_argument("--limit", type=float, default=400, help="seconds for each run")
    parser.add_argument("--only", choices=(*EARLIER, *VARIANTS), action="append", help="repeat for several")
    parser.add_argument("--model", type=Path, help="a model that is there already, of the same shape")
    parser.add_argument("--folder", type=Path, help="holds the model and all else meanwhile; default: /tmp")
    parser.add_argument("--spill", type=Path, help="a folder on another disk, for the model's last files")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    results: dict[str, Any] = {"ranks": options.ranks, "length": options.length}
    with (
        tempfile.TemporaryDirectory(prefix="llama-70b-", dir=options.spill) as spill,
        jobs_folder("llama-70b-", options.folder) as root,
    ):
        started = time.monotonic()
        shape = SHAPES["tiny" if options.tiny else "70b"]
        shape = {**shape, "num_hidden_layers": options.layers or shape["num_hidden_layers"]}
        if options.model:
            (root / "model").symlink_to(options.model.resolve())
        else:
            write_model(root / "model", shape, spill=Path(spill) if options.spill else None)
        results["writing_seconds"] = round(time.monotonic() - started, 1)
        words = [
            " ".join(tiny.WORDS[(row + at) % len(tiny.WORDS)] for at in range(options.length)) for row in range(64)
        ]
        tiny.write_jsonl(root / "train.jsonl", [{"text": text} for text in words])
        for name in options.only or (*EARLIER, *VARIANTS):
            earlier = name in EARLIER
            results[name] = _earlier(root, name, options) if earlier else _trained(root, name, options)
            _tell(results, name, options)
    print(json.dumps(results, indent=1))
    return 0 if all("error" not in value for value in results.values() if isinstance(value, dict)) else 1


def _tell(results: dict[str, Any], name: str, options: argparse.Namespace) -> None:
    print(json.dumps({name: results[name]}), file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


def _earlier(root: Path, case: str, options: argparse.Namespace) -> dict[str, Any]:
    job = LocalJob(root / case, case, _spec(root, case, options))
    started = time.time()
    job.start()
    try:
        over = job.wait(lambda: job.ended or bool(job.steps), options.limit, what="an end or a first step")
    except RuntimeError as error:
        return {"error": str(error)}
    finally:
        job.end()
    result: dict[str, Any] = {"seconds": round(over - started, 1), "trains": bool(job.steps)}
    if job.steps:
        result["log"] = told(job.log)
        return result if case != FITS_NOWHERE or options.tiny else {**result, "error": "it was not refused"}
    if REFUSED not in job.said:
        return {**result, "error": f"it ended for another reason:\n{job.said[-1500:]}"}
    return {**result, "said": job.status["message"]}


def _trained(root: Path, variant: str, options: argparse.Namespace) -> dict[str, Any]:
    spec = _spec(root, LAST, options)
    spec["deepspeed"]["offloadOptimizer"] = VARIANTS[variant]
    job = LocalJob(root / variant.replace(" ", "-"), variant.replace(" ", "-"), spec)
    started = time.time()
    job.start()
    try:
        first = job.wait(lambda: bool(job.steps), options.limit, what="the first step", pause=0.2)
        wanted = WARMUP + options.steps
        job.wait(lambda: len(job.steps) >= wanted, options.limit, what="the last step", pause=0.2)
    except RuntimeError as error:
        return {"step_seconds": [round(step["seconds"], 3) for step in job.steps], "error": str(error)}
    finally:
        job.end()
    steps = job.steps[WARMUP : WARMUP + options.steps]
    seconds = sum(step["seconds"] for step in steps)
    rate = len(steps) * spec["training"]["globalBatchSize"] / seconds
    return {
        "first_step_after_seconds": round(first - started, 1),
        "samples_per_second": round(rate, 3),
        "samples_per_second_per_gpu": round(rate / options.ranks, 3),
        "tokens_per_second_per_gpu": round(sum(step["tokens"] for step in steps) / seconds / options.ranks, 1),
        "step_seconds_median": round(statistics.median(step["seconds"] for step in steps), 3),
        "losses": [round(step["loss"], 4) for step in job.steps],
        "peak_gib": [round(job.peak_bytes[rank] / 2**30, 2) for rank in range(options.ranks)],
        "log": told(job.log),
    }


def _spec(root: Path, case: str, options: argparse.Namespace) -> dict[str, Any]:
    """The converted job, with places of this machine and a batch of one step."""
    places = ("model", "data", "output", "benchmark", "cache")
    uris = [part for place in places for part in (f"--{place}-uri", f"file://{root / place}")]
    body = published.convert(case, *uris, "--num-proc-per-node", str(options.ranks))
    spec: dict[str, Any] = body["spec"]
    for name in ("output", "tracking", "checkpoint"):
        spec.pop(name, None)
    spec |= inputs(root)
    spec["training"] |= {"globalBatchSize": 2 * options.ranks, "maxSteps": 100000, "maxLength": options.length}
    del spec["training"]["epochs"]
    if importlib.util.find_spec("flash_attn") is None:
        spec["training"]["attention"] = "Auto"
    spec["trainer"]["resourcesPerNode"] = CPUS
    spec["checkpoint"] = {"everySteps": 100000}
    spec["recovery"] = {"backoffLimit": 0}
    return spec


if __name__ == "__main__":
    sys.exit(main())
