"""Is a resumed run the same run? Trains each mode twice on this machine's device, once with a rank killed on the way.

    python benchmarks/resume_exactness.py [--num-proc 1] [--model FOLDER] [--steps 12] [--only WORD]

Needs no cluster. Prints one JSON object: for each mode whether the exported weights are byte-identical, both final losses with
every digit, the device, and how long the attempts took. Exit status 1 if a mode differs. Without --model it makes a small random
Llama; its speed says nothing, its exactness does.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.trainer import tiny
from tests.trainer.jobs import Pod, launch, next_attempt

FULL: dict[str, Any] = {"method": "Full", "adapter": None}
MODES: dict[str, dict[str, Any]] = {
    "LoRA, BF16, ZeRO-0": {},
    "LoRA, BF16, ZeRO-0, packing, dropout 0.1": {"training__packing": True, "adapter__dropout": 0.1},
    "LoRA, FP32, ZeRO-0": {"training__precision": "FP32"},
    "LoRA, BF16, ZeRO-2": {"deepspeed__zeroStage": 2},
    "LoRA, BF16, ZeRO-3": {"deepspeed__zeroStage": 3},
    "LoRA, BF16, activation checkpointing": {"training__activationCheckpointing": "Full"},
    "Full, BF16, ZeRO-1": {**FULL, "deepspeed__zeroStage": 1},
    "Full, BF16, ZeRO-2": {**FULL, "deepspeed__zeroStage": 2},
    "Full, BF16, ZeRO-3": {**FULL, "deepspeed__zeroStage": 3},
    "Full, BF16, ZeRO-2, optimizer offloaded": {
        **FULL,
        "deepspeed__zeroStage": 2,
        "deepspeed__offloadOptimizer": "CPU",
    },
    "Full, BF16, ZeRO-3, all offloaded": {
        **FULL,
        "deepspeed__zeroStage": 3,
        "deepspeed__offloadOptimizer": "CPU",
        "deepspeed__offloadParameters": "CPU",
    },
}


def main() -> int:
    """Runs the modes and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-proc", type=int, default=1, help="ranks; on CUDA one for each GPU")
    parser.add_argument("--model", type=Path, help="a model in Hugging Face layout; default: a small random Llama")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of each run")
    parser.add_argument("--only", default="", help="only modes that contain this word")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="resume-exactness-") as folder:
        root = Path(folder)
        model = options.model or tiny.make_model(root / "model", layers=4)
        train = tiny.write_jsonl(root / "train.jsonl", tiny.chats(64, seed=1))
        held_out = tiny.write_jsonl(root / "held-out.jsonl", tiny.chats(16, seed=2))
        for number, (mode, changes) in enumerate(MODES.items()):
            if options.only in mode:
                results[mode] = _compare(root / str(number), model, train, held_out, options, changes)
                print(
                    f"{mode}: {'identical' if results[mode]['identical'] else results[mode]}",
                    file=sys.stderr,
                    flush=True,
                )
    print(json.dumps({"steps": options.steps, "num_proc": options.num_proc, "modes": results}, indent=1))
    return 0 if all(result["identical"] for result in results.values()) else 1


def _compare(
    folder: Path, model: Path, train: Path, held_out: Path, options: argparse.Namespace, changes: dict[str, Any]
) -> dict[str, Any]:
    changes = {"numProcPerNode": options.num_proc, "training__maxSteps": options.steps, **changes}
    try:
        unbroken = _run(folder / "unbroken", model, train, held_out, changes, kill_after=None)
        broken = _run(folder / "broken", model, train, held_out, changes, kill_after=options.steps // 2 + 1)
    except AssertionError as error:
        return {"identical": False, "error": str(error)[-1500:]}
    return {"identical": unbroken["sha256"] == broken["sha256"], "unbroken": unbroken, "broken": broken}


def _run(
    folder: Path, model: Path, train: Path, held_out: Path, changes: dict[str, Any], kill_after: int | None
) -> dict[str, Any]:
    spec = launch(folder, model, train, held_out, **changes)
    started = time.perf_counter()
    pod = Pod(folder, spec, None)
    if kill_after is not None:
        pod.wait_for_step(kill_after)
        pod.kill_rank()
        code = pod.wait()
        assert code == 90, f"exit code {code} after the kill:\n{pod.log}"
        pod = Pod(folder, next_attempt(spec), None)
    code = pod.wait()
    assert code == 0, f"exit code {code}:\n{pod.log}"
    state = json.loads((folder / "output" / "train_result.json").read_text())
    digest = hashlib.sha256()
    for path in sorted((folder / "output").glob("*.safetensors")):
        digest.update(path.read_bytes())
    return {
        "sha256": digest.hexdigest(),
        "loss": state["loss"],
        "eval_loss": state["eval_loss"],
        "resumed_from_step": pod.report.get("resumedFromStep"),
        "seconds": round(time.perf_counter() - started, 1),
        "log_tail": [line for line in pod.log.splitlines() if "device" in line or "tokens/s" in line][:3],
    }


if __name__ == "__main__":
    sys.exit(main())
