"""How long training stands still for a checkpoint: written in the background, or not.

    python benchmarks/checkpoint_stall.py [--cases 7b-lora,1.3b-full] [--every 40] [--json out.json]

Each case runs the trainer as a process twice on a random model of the shape, with checkpoints that are written in the
background, and with some that are waited for. `stall_seconds` are the trainer's own, for each checkpoint on the way: the time
between two steps. While one is written, steps may also be slower than at other times of the run (`step_seconds`, the median):
`lost_seconds` is all that a checkpoint costs, its stall and what the steps beside its writing took beyond that.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.jobs import SHAPES, Done, run_job, write_chats, write_model
from benchmarks.throughput import FULL, lora

METHODS: dict[str, dict[str, Any]] = {"lora": lora(16), "full": FULL}
CASES = [f"{shape}-{method}" for shape in SHAPES for method in METHODS]
NUM_CHECKPOINTS = 2
"""On the way; one more is written at the end."""


def main() -> int:
    """Runs the cases one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="tiny-lora,tiny-full", help=f"of {', '.join(CASES)}")
    parser.add_argument(
        "--every", type=int, default=40, help="steps between checkpoints, longer than one takes to write"
    )
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row; a step has two")
    parser.add_argument("--folder", type=Path, help="holds models and checkpoints meanwhile; default: /tmp")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for case in options.cases.split(","):
        with tempfile.TemporaryDirectory(prefix="checkpoint-stall-", dir=options.folder) as folder:
            results[case] = _case(Path(folder), case, options)
        print(json.dumps({case: results[case]}), file=sys.stderr, flush=True)
    text = json.dumps(results, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text, encoding="utf-8")
    return 0


def _case(root: Path, case: str, options: argparse.Namespace) -> dict[str, Any]:
    shape, _, method = case.rpartition("-")
    model = write_model(root / "model", SHAPES[shape])
    train = write_chats(root / "train.jsonl", options.length)
    every = options.every
    changes = {
        **METHODS[method],
        "cacheDir": str(root / "cache"),
        "training__maxSteps": every * (NUM_CHECKPOINTS + 1),
        "checkpoint__everySteps": every,
        "checkpoint__keep": 1,
        "training__compile": shape != "tiny",
    }
    result: dict[str, Any] = {"every_steps": every}
    for name, background in (("background", True), ("waited_for", False)):
        own = {**changes, "checkpoint__background": background}
        done = run_job(root / name, model, train, options.length, own)
        result[name] = _told(done, every, background=background)
    result["checkpoint_bytes"] = _size(root / "background" / "checkpoints")
    return result


def _told(done: Done, every: int, *, background: bool) -> dict[str, Any]:
    stalls = {
        line["step"]: line["checkpoint_stall_seconds"] for line in done.journal if "checkpoint_stall_seconds" in line
    }
    steps = done.step_seconds
    on_the_way = [every * number for number in range(1, NUM_CHECKPOINTS + 1)]
    written = {
        int(step): float(seconds) for step, seconds in re.findall(r"step (\d+)  checkpoint saved in (\S+) s", done.log)
    }
    beside: dict[int, list[int]] = {}
    for at in on_the_way:
        left, step, beside[at] = written[at] if background else 0.0, at + 1, []
        while left > 0 and step in steps:
            beside[at].append(step)
            left, step = left - steps[step], step + 1
    assert all(len(found) < every for found in beside.values()), (
        f"checkpoints take longer than {every} steps: give a larger --every"
    )
    others = [s for step, s in steps.items() if step > every and not any(step in found for found in beside.values())]
    usual = statistics.median(others)
    return {
        "step_seconds": round(usual, 4),
        "steps_beside_the_writing": [len(beside[at]) for at in on_the_way],
        "stall_seconds": [stalls[at] for at in on_the_way],
        "lost_seconds": [round(stalls[at] + sum(steps[s] - usual for s in beside[at]), 3) for at in on_the_way],
        "next_step_seconds": [steps[at + 1] for at in on_the_way],
        "until_it_counts_seconds": [written[at] for at in on_the_way],
    }


def _size(checkpoints: Path) -> int:
    (newest,) = checkpoints.glob("step-*")
    return sum(file.stat().st_size for file in newest.iterdir())


if __name__ == "__main__":
    sys.exit(main())
