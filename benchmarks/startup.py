"""How long a job takes from its start to its first step: cold, with a warm compile cache, and without compilation.

    python benchmarks/startup.py [--shape 7b] [--json out.json]

Writes a random model of the shape as sharded bf16 safetensors, and starts the trainer as a process on it, as its pod does: LoRA
r16, packed rows of 4,096 tokens, micro-batch 2, three steps. `cold` begins with an empty cache folder and without the model in
the page cache (with --drop-caches, as root, without anything in it); Python's bytecode is there, as in an image. Phases are the
trainer's own (`startup_seconds` in train_result.json): they add up to the time from the process's start to the end of the first
step.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.jobs import SHAPES, Done, compile_bytecode, forget_pages, run_job, write_chats, write_model
from benchmarks.throughput import lora

RUNS: dict[str, dict[str, Any]] = {"cold": {}, "warm": {}, "warm, not compiled": {"training__compile": False}}
STEPS = 3
PHASES = (
    "supervisor",
    "imports",
    "gang",
    "sources",
    "data",
    "weights",
    "engine",
    "resume",
    "evaluation",
    "compile",
    "first_step",
)
"""In their order; `compile` is the part of the first step that went to compilation, `first_step` the rest."""
TOLD = ("device", "tokenised", "attention:", "adapters:", "compile:")
"""Lines of the log with these words are part of the result."""


def main() -> int:
    """Runs the three starts one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="of the model")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument(
        "--drop-caches", action="store_true", help="of the whole machine, the libraries' files included"
    )
    parser.add_argument("--folder", type=Path, help="holds the model and all else meanwhile; default: /tmp")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="startup-", dir=options.folder) as folder:
        root = Path(folder)
        started = time.perf_counter()
        model = write_model(root / "model", SHAPES[options.shape])
        train = write_chats(root / "train.jsonl", options.length)
        result: dict[str, Any] = {
            "shape": options.shape,
            "length": options.length,
            "weights_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
            "writing_seconds": round(time.perf_counter() - started, 1),
        }
        compile_bytecode()
        forget_pages(model)
        if options.drop_caches:
            Path("/proc/sys/vm/drop_caches").write_text("3", encoding="utf-8")
        runs = result["runs"] = {}
        for number, (name, changes) in enumerate(RUNS.items()):
            changes = {**lora(16), **changes, "cacheDir": str(root / "cache")}
            changes |= {"training__maxSteps": STEPS, "checkpoint__everySteps": STEPS}
            runs[name] = _told(run_job(root / str(number), model, train, options.length, changes))
            print(json.dumps({name: runs[name]}), file=sys.stderr, flush=True)
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text, encoding="utf-8")
    return 0


def _told(done: Done) -> dict[str, Any]:
    phases = done.result["startup_seconds"]
    lines = [line.partition(" INFO ")[2] for line in done.log.splitlines()]
    return {
        "first_step_after_seconds": round(sum(phases.values()), 2),
        "phases": {name: phases[name] for name in sorted(phases, key=PHASES.index)},
        "step_seconds": list(done.step_seconds.values()),
        "process_seconds": done.seconds,
        "log": [line for line in lines if any(word in line for word in TOLD)],
    }


if __name__ == "__main__":
    sys.exit(main())
