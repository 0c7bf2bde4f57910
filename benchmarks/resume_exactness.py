"""Is a resumed run the same run? Trains each mode twice on this machine's device, once with a rank killed on the way.

    python benchmarks/resume_exactness.py [--num-proc 1] [--model FOLDER] [--steps 12] [--only WORD] [--parallel 1]

Needs no cluster. Prints one JSON object: for each mode whether it was resumed and the exported weights are byte-identical, both
final losses with every digit, the device, what computed attention, and how long it took. Exit status 1 if a mode differs. Without
--model it makes a small random Llama; its speed says nothing, its exactness does. With one rank each step has two micro-batches.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.jobs import weights_digest
from tests.trainer import tiny
from tests.trainer.jobs import FULL, QLORA, Pod, launch, next_attempt

PACKED = {"training__packing": True, "training__maxLength": 128}
COMPILED = {**PACKED, "training__precision": "PureBF16", "training__compile": True}
MODES: dict[str, dict[str, Any]] = {
    "LoRA, BF16, ZeRO-0": {},
    "LoRA, BF16, packing": PACKED,
    "LoRA, BF16, packing, dropout 0.1": {**PACKED, "adapter__dropout": 0.1},
    "LoRA, BF16, packing, compiled, Liger": {**PACKED, "training__compile": True, "training__ligerKernel": True},
    "LoRA, BF16, packing, compiled, ZeRO-3": {**PACKED, "training__compile": True, "deepspeed__zeroStage": 3},
    "LoRA, BF16, packing, compiled, dropout 0.1": {**PACKED, "training__compile": True, "adapter__dropout": 0.1},
    "LoRA, BF16, packing, Liger": {**PACKED, "training__ligerKernel": True},
    "LoRA, BF16, packing, SDPA": {**PACKED, "training__attention": "SDPA"},
    "LoRA, BF16, packing, Flex": {**PACKED, "training__attention": "Flex"},
    "LoRA, BF16, packing, Eager": {**PACKED, "training__attention": "Eager"},
    "LoRA, BF16, length grouping": {"training__groupByLength": True},
    "LoRA, FP32, ZeRO-0": {"training__precision": "FP32"},
    "LoRA, PureBF16, ZeRO-0": {"training__precision": "PureBF16"},
    "LoRA, BF16, ZeRO-1": {"deepspeed__zeroStage": 1},
    "LoRA, BF16, ZeRO-2": {"deepspeed__zeroStage": 2},
    "LoRA, BF16, ZeRO-3": {"deepspeed__zeroStage": 3},
    "LoRA, BF16, activation checkpointing": {"training__activationCheckpointing": "Full"},
    "LoRA, BF16, activation checkpointing, offloaded": {"training__activationCheckpointing": "FullOffload"},
    "LoRA, BF16, activation checkpointing by operator": {"training__activationCheckpointing": "SelectiveOp"},
    "DoRA, BF16": {"adapter__variant": "DoRA"},
    "LoRA+ and rsLoRA, BF16": {"adapter__variant": "RSLoRA", "adapter__loraPlusRatio": 16.0},
    "QLoRA, NF4, double quantisation": QLORA,
    "QLoRA, NF4, packing, compiled": {**QLORA, **PACKED, "training__compile": True},
    "QLoRA, 8 bits": {**QLORA, "quantization": {"bits": 8, "doubleQuantization": True}},
    "LoRA, AdamW8bit": {"training__optimizer": "AdamW8bit"},
    "LoRA, PagedAdamW": {"training__optimizer": "PagedAdamW"},
    "Full, PureBF16": {**FULL, "training__precision": "PureBF16"},
    "Full, PureBF16, packing, compiled": {**FULL, **COMPILED},
    "Full, PureBF16, packing, compiled, ZeRO-2": {**FULL, **COMPILED, "deepspeed__zeroStage": 2},
    "Full, PureBF16, packing, compiled, ZeRO-3": {**FULL, **COMPILED, "deepspeed__zeroStage": 3},
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
    parser.add_argument("--parallel", type=int, default=1, help="modes at a time")
    parser.add_argument("--only", default="", help="only modes that contain this word")
    parser.add_argument("--json", type=Path, help="also write the result here, after each mode")
    options = parser.parse_args()
    chosen = {mode: changes for mode, changes in MODES.items() if options.only in mode}
    if not chosen:
        parser.error(f"--only: no mode contains `{options.only}`; they are: {'; '.join(MODES)}")
    modes: dict[str, Any] = {}
    turn = threading.Lock()
    results = {"steps": options.steps, "num_proc": options.num_proc, "modes": modes}
    with tempfile.TemporaryDirectory(prefix="resume-exactness-") as folder:
        root = Path(folder)
        model = options.model or tiny.make_model(root / "model", layers=4)
        train = tiny.write_jsonl(root / "train.jsonl", tiny.chats(64, seed=1))
        held_out = tiny.write_jsonl(root / "held-out.jsonl", tiny.chats(16, seed=2))

        def compare(number: int, mode: str) -> None:
            result = _compare(root / str(number), model, train, held_out, options, chosen[mode])
            verdict = "identical" if result["identical"] else json.dumps(result)
            with turn:
                modes[mode] = result
                print(f"{mode}: {verdict}; {result.get('attention', '')}", file=sys.stderr, flush=True)
                if options.json:
                    options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")

        with ThreadPoolExecutor(options.parallel) as pool:
            list(pool.map(compare, range(len(chosen)), chosen))
    print(json.dumps(results, indent=1))
    return 0 if all(result["identical"] for result in modes.values()) else 1


def _compare(
    folder: Path, model: Path, train: Path, held_out: Path, options: argparse.Namespace, changes: dict[str, Any]
) -> dict[str, Any]:
    changes = {"numProcPerNode": options.num_proc, "training__maxSteps": options.steps, **changes}
    try:
        unbroken = _run(folder / "unbroken", model, train, held_out, changes, kill_after=None)
        broken = _run(folder / "broken", model, train, held_out, changes, kill_after=options.steps // 2 + 1)
    except AssertionError as error:
        return {"identical": False, "error": str(error)[-1500:]}
    attention = unbroken.pop("attention"), broken.pop("attention")
    return {
        "identical": unbroken["sha256"] == broken["sha256"] and bool(broken["resumed_from_step"]),
        "attention": attention[0],
        "unbroken": unbroken,
        "broken": broken,
    }


def _run(
    folder: Path, model: Path, train: Path, held_out: Path, changes: dict[str, Any], kill_after: int | None
) -> dict[str, Any]:
    spec = launch(folder, model, train, held_out, **changes)
    started = time.perf_counter()
    pod = Pod(folder, spec, None)
    try:
        if kill_after is not None:
            pod.wait_for_step(kill_after)
            pod.kill_rank()
            code = pod.wait()
            assert code == 90, f"exit code {code} after the kill:\n{pod.log}"
            pod = Pod(folder, next_attempt(spec), None)
        pod.done()
    finally:
        if pod.exit_code() is None:
            pod.terminate()
    state = json.loads((folder / "output" / "train_result.json").read_text())
    return {
        "sha256": weights_digest(folder / "output"),
        "loss": state["loss"],
        "eval_loss": state["eval_loss"],
        "resumed_from_step": pod.report.get("resumedFromStep"),
        "seconds": round(time.perf_counter() - started, 1),
        "attention": next((line.split("attention: ")[1] for line in pod.log.splitlines() if "attention: " in line), ""),
        "log_tail": [line for line in pod.log.splitlines() if "device" in line or "tokens/s" in line][:3],
    }


if __name__ == "__main__":
    sys.exit(main())
