"""Which combinations train? Runs two steps of each on this machine's device, in the forms that its tables have.

    python benchmarks/combinations.py [--num-proc 2] [--only WORD ...] [--all] [--refused] [--sees] [--json FILE]

A case is a method, how the state is spread, a precision, an optimizer and what activations are kept. By default every pair of
values occurs, with the usual values for the rest (half an hour on two free cores); `--all` takes the whole product (hours). A
refused combination is not run; `--refused` runs those too, to see that they end with the reason. With `--sees` the model is of
LLaVA's kind, its tower and projector are trained too, and two of three records have no image. Needs no cluster. Prints a line a
case and a summary; exit status 1 if one did not do as said.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune_api.combinations import Combination, check
from tests import easy_vqa
from tests.trainer import jobs, tiny

FREEZE = {"trainableLayers": 1, "trainableModules": ["All"], "extraModules": ["norm"]}
METHODS: dict[str, dict[str, Any]] = {
    "Full": {"method": "Full", "adapter": None},
    "Freeze": {"method": "Freeze", "adapter": None, "freeze": FREEZE},
    "LoRA": {},
    "LoRA+": {"adapter__loraPlusRatio": 4.0},
    "RSLoRA": {"adapter__variant": "RSLoRA"},
    "DoRA": {"adapter__variant": "DoRA"},
    "QLoRA-4": {"method": "QLoRA", "quantization": {"bits": 4, "doubleQuantization": True}},
    "QLoRA-8": {"method": "QLoRA", "quantization": {"bits": 8, "doubleQuantization": True}},
    "QDoRA-4": {
        "method": "QLoRA",
        "adapter__variant": "DoRA",
        "quantization": {"bits": 4, "doubleQuantization": False},
    },
}
LAYOUTS: dict[str, tuple[int, str, str]] = {
    "ZeRO-0": (0, "None", "None"),
    "ZeRO-1": (1, "None", "None"),
    "ZeRO-2": (2, "None", "None"),
    "ZeRO-3": (3, "None", "None"),
    "ZeRO-1 optimizer on CPU": (1, "CPU", "None"),
    "ZeRO-2 optimizer on CPU": (2, "CPU", "None"),
    "ZeRO-3 optimizer on CPU": (3, "CPU", "None"),
    "ZeRO-3 parameters on CPU": (3, "None", "CPU"),
    "ZeRO-3 both on CPU": (3, "CPU", "CPU"),
}
PRECISIONS = ("BF16", "PureBF16", "FP32")
OPTIMIZERS = ("AdamW", "AdamW8bit", "PagedAdamW", "PagedAdamW8bit")
ACTIVATIONS = ("None", "SelectiveOp", "SelectiveLayer", "Full", "FullOffload")

SEES: dict[str, Any] = {
    "vision": {"freezeTower": False, "projectorLearningRate": 0.001},
    "training__maxLength": 120,
    "training__packing": True,
}
USUAL = ("LoRA", "ZeRO-0", "BF16", "AdamW", "None")


def cases(*, whole: bool) -> Iterator[tuple[str, dict[str, Any], Combination]]:
    """Name, changes to the launch file, and the combination."""
    for method, layout, precision, optimizer, kept in product(METHODS, LAYOUTS, PRECISIONS, OPTIMIZERS, ACTIVATIONS):
        unusual = sum(a != b for a, b in zip((method, layout, precision, optimizer, kept), USUAL, strict=True))
        if not whole and unusual > 2:
            continue
        stage, offload_optimizer, offload_parameters = LAYOUTS[layout]
        changes = {
            **METHODS[method],
            "deepspeed__zeroStage": stage,
            "deepspeed__offloadOptimizer": offload_optimizer,
            "deepspeed__offloadParameters": offload_parameters,
            "training__precision": precision,
            "training__optimizer": optimizer,
            "training__activationCheckpointing": kept,
        }
        combination = Combination(
            method=changes.get("method", "LoRA"),
            variant=changes.get("adapter__variant", "LoRA"),
            zero_stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            precision=precision,
            optimizer=optimizer,
            activation_checkpointing=kept,
        )
        yield f"{method} | {layout} | {precision} | {optimizer} | {kept}", changes, combination


def main() -> int:
    """Runs the cases and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-proc", type=int, default=2, help="ranks; on CUDA one for each GPU")
    parser.add_argument("--only", nargs="*", default=[], help="only cases with all of these words")
    parser.add_argument("--all", action="store_true", help="the whole product instead of every pair")
    parser.add_argument("--refused", action="store_true", help="run the refused ones as well")
    parser.add_argument("--sees", action="store_true", help="a model that sees, all of it trained")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    wanted = [case for case in cases(whole=options.all) if all(word in case[0] for word in options.only)]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="combinations-") as folder:
        root = Path(folder)
        records = tiny.chats(16, seed=1)
        if options.sees:
            model = tiny.make_llava(root / "model")
            records = [
                record for record, seen in zip(records, pictures(root), strict=True) for record in (record, *seen)
            ]
        else:
            model = tiny.make_model(root / "model", layers=3)
        train = tiny.write_jsonl(root / "train.jsonl", records)
        server = _server(root)
        for number, (name, changes, combination) in enumerate(wanted):
            reason = check(combination)
            if reason and not options.refused:
                results[name] = {"refused": reason}
                continue
            results[name] = {"refused": reason, **_run(root / str(number), model, train, server, options, changes)}
            print(f"{name}: {results[name]}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))
        if server is not None:
            server.stop()
    failed = {name: r for name, r in results.items() if not r.get("trains") and not r["refused"]}
    ran = [r for r in results.values() if "trains" in r]
    print(f"{len(results)} cases: {sum(r['trains'] for r in ran)} of {len(ran)} train, ", end="")
    print(f"{sum(bool(r['refused']) for r in results.values())} refused, {len(failed)} failed that should not")
    for name, result in failed.items():
        print(f"FAILED {name}: {result['error']}")
    return 1 if failed else 0


def pictures(root: Path) -> list[list[dict[str, Any]]]:
    """A record with a picture of one colour at every second place, and none at the others."""
    import PIL.Image

    found: list[list[dict[str, Any]]] = []
    for number in range(16):
        PIL.Image.new("RGB", (64, 64), (16 * number, 0, 255 - 16 * number)).save(root / f"{number}.png")
        record = easy_vqa.record("how red?", f"{number} of 16", f"{number}.png")
        found.append([record] if number % 2 else [])
    return found


def _server(root: Path) -> jobs.ForkServer | None:
    """On a CPU ranks are forked, which saves their imports; CUDA does not survive a fork."""
    import torch

    return None if torch.cuda.is_available() else jobs.ForkServer(root)


def _run(
    folder: Path, model: Path, train: Path, server: Any, options: argparse.Namespace, changes: dict[str, Any]
) -> dict[str, Any]:
    started = time.perf_counter()
    changes = {
        "numProcPerNode": options.num_proc,
        "training__globalBatchSize": 2 * options.num_proc,
        "training__microBatchSize": 1,
        "training__maxSteps": 2,
        **(SEES if options.sees else {}),
        **changes,
    }
    pod = jobs.Pod(folder, jobs.launch(folder, model, train, **changes), server)
    code = pod.wait()
    seconds = round(time.perf_counter() - started, 1)
    if code == 0:
        return {"trains": True, "loss": pod.report.get("loss"), "seconds": seconds}
    message = pod.report["message"] if pod.report_file.exists() else pod.log[-300:]
    return {"trains": False, "error": message[:300], "exit_code": code, "seconds": seconds}


if __name__ == "__main__":
    sys.exit(main())
