"""Do the published configurations train at their real widths? Each is cut to a few layers and trained for a few steps.

    python benchmarks/published.py [--tiny] [--layers 4] [--steps 4] [--only codellama-34b] [--folder /scratch] [--json out.json]

Each goes the whole way: `finetune convert` of the LLaMA-Factory file in tests/convert/cases, the FineTuneJob, its LaunchSpec, and
the trainer as a process of its own, on one rank of this machine's device. Weights are random, written to a temporary folder (8 GB
for four layers of Llama-2-70B). What is changed in a converted job stands beside its result. Where flash-attn is not installed
attention is `Auto`; where the sandbox cannot work there are no benchmarks; both are said. `--tiny` takes tiny models, on the CPU.
Needs no cluster and no network. Prints one JSON object; exit status 1 if a configuration did not finish.
"""

import argparse
import importlib.util
import io
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.jobs import write_model
from benchmarks.throughput import LLAMA_2_70B
from tests.trainer import published, tiny

CODELLAMA_34B = {**LLAMA_2_70B, "intermediate_size": 22016, "max_position_embeddings": 16384}
VICUNA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_key_value_heads": 40,
              "vocab_size": 32064, "max_position_embeddings": 4096}  # fmt: skip
CLIP_L_336 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
              "image_size": 336, "patch_size": 14, "projection_dim": 768}  # fmt: skip
TINY_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "image_size": 56, "patch_size": 14, "projection_dim": 32}  # fmt: skip
SHAPES = {"llama2-70b-lora-zero3": LLAMA_2_70B, "codellama-34b": CODELLAMA_34B, "llava-13b": VICUNA_13B}
HUMAN_EVAL = [
    {
        "task_id": "Published/0",
        "prompt": 'def add(a: int, b: int) -> int:\n    """Return the sum."""\n',
        "entry_point": "add",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    }
]
MBPP = [{"task_id": 1, "text": "Write a function `add` that adds two numbers.", "test_list": ["assert add(1, 2) == 3"]}]
FACTS = {
    "memory": r"memory: (.*)",
    "attention": r"attention: (.*)",
    "liger": r"ligerKernel: (.*)",
    "cross_entropy": r"cross-entropy: (.*)",
    "engine": r"engine: (.*)",
    "trained_parameters": r"([\d,]+) parameters are trained",
    "train_data": r"rank 0 INFO train (?:file|pvc)\S+: (.*)",
    "benchmarks": r"(\w+: \d+ of \d+ programs passed)",
}
"""What the trainer's log says about what it does, by the name in the result."""


def main() -> int:
    """Trains the configurations one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models, on the CPU")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of each model")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps; the first is not measured")
    parser.add_argument("--only", action="append", choices=SHAPES, help="one of them; repeat for several")
    parser.add_argument("--limit", type=float, default=240, help="seconds for each configuration's trainer")
    parser.add_argument("--folder", type=Path, help="where models and results are written; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    import torch

    options.device = "cuda" if torch.cuda.is_available() and not options.tiny else "cpu"
    if options.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["WANDB_MODE"] = "offline"
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "flash_attn": importlib.util.find_spec("flash_attn") is not None,
    }
    with tempfile.TemporaryDirectory(prefix="published-", dir=options.folder) as scratch:
        for name in options.only or SHAPES:
            folder = Path(scratch) / name
            try:
                results[name] = train(name, folder, options)
            except Exception as error:  # the others are still worth their time
                results[name] = {"finished": False, "error": f"{type(error).__name__}: {error}"}
            print(json.dumps({name: results[name]}), file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))
    return 0 if all(value["finished"] for value in results.values() if isinstance(value, dict)) else 1


def train(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Converts one configuration, trains it, and returns what came of it."""
    import torch

    from finetune_api.job import FineTuneJob
    from finetune_operator.core.resolve import resolve
    from finetune_operator.core.settings import PlanConfig
    from tests.trainer import jobs

    folder.mkdir(parents=True)
    os.environ["WANDB_DIR"] = str(folder)
    places = {"model": "model", "data": "data", "benchmark": "data", "output": "output", "cache": "cache"}
    arguments = [part for key, place in places.items() for part in (f"--{key}-uri", f"file://{folder / place}")]
    body = published.convert(name, *arguments)
    changes, notes = smaller(body, options)
    body = published.change(body, changes)
    del body["spec"]["training"]["epochs"]  # `maxSteps` is in its place
    body["metadata"] |= {"namespace": "bench", "uid": "uid-1"}
    job = FineTuneJob.from_object(body)
    spec = resolve(job, 1, PlanConfig(trainer_image="this machine")).launch.model_dump(mode="json", by_alias=True)
    spec |= {"httpPort": jobs.free_port(), "rendezvous": {"host": "localhost", "port": jobs.free_port()}}

    started = time.monotonic()
    make_model(name, folder / "model", options)
    torch.cuda.empty_cache()  # the trainer needs the room
    make_data(name, folder / "data", body, options)
    made = time.monotonic()
    with redirect_stdout(io.StringIO()):
        pod = jobs.Pod(folder / "run", spec, None)
    peak = watch(pod, made + options.limit)
    ended = {"model_seconds": round(made - started, 1), "trainer_seconds": round(time.monotonic() - made, 1)}
    report = pod.report if pod.report_file.exists() else {"message": pod.log[-2000:]}
    facts = {key: found for key, pattern in FACTS.items() if (found := re.findall(pattern, pod.log))}
    return {
        "finished": pod.exit_code() == 0,
        **({} if pod.exit_code() == 0 else {"error": report["message"], "log": pod.log[-3000:]}),
        **measured(spec, options),
        "peak_memory_gib": round(peak / 2**30, 2),
        **ended,
        "changed_in_the_job": changes,
        "notes": notes,
        "said_by_the_trainer": {key: found[-1] if len(set(found)) == 1 else found for key, found in facts.items()},
        **outputs(spec),
    }


def smaller(body: dict[str, Any], options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """What has to be changed for a short run on one rank of this machine, and why."""
    spec, notes = body["spec"], []
    changes: dict[str, Any] = {
        "training.maxSteps": options.steps,
        "checkpoint.everySteps": options.steps,
        "trainer.resourcesPerNode": {"limits": {"cpu": str(os.cpu_count() or 1)}},
    }
    if spec["training"]["attention"] == "FlashAttention2":
        if options.device == "cpu":
            notes.append("attention: Auto, since FlashAttention 2 needs a GPU")
            changes["training.attention"] = "Auto"
        elif importlib.util.find_spec("flash_attn") is None:
            notes.append("attention: Auto, since flash-attn is not installed here")
            changes["training.attention"] = "Auto"
    if spec["datasets"].get("evaluation"):
        changes |= {"training.evalEverySteps": options.steps // 2, "evaluation.generation": {"maxNewTokens": 32}}
        if (obstacle := no_sandbox()) is not None:
            notes.append(f"no benchmarks, since the sandbox cannot work here: {obstacle}")
            changes = {k: v for k, v in changes.items() if "eval" not in k} | {"datasets.evaluation": []}
            del spec["training"]["evalEverySteps"]
    return changes, notes


def no_sandbox() -> str | None:
    """Why generated programs cannot be run on this machine; None if they can."""
    from finetune_trainer.evaluation.benchmark import open_sandbox

    with tempfile.TemporaryDirectory() as folder:
        try:
            open_sandbox(Path(folder))
        except Exception as error:
            return str(error)
    return None


def make_model(name: str, folder: Path, options: argparse.Namespace) -> None:
    """Random weights in the real shape, but for the number of layers."""
    shape = published.LLAMA if options.tiny else {**SHAPES[name], "num_hidden_layers": options.layers}
    tokenizer = published.make_tokenizer()
    if name != "llava-13b":
        write_model(folder, {"vocab_size": len(tokenizer), **shape}, tokenizer=tokenizer)
        return
    import torch
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tower = TINY_CLIP if options.tiny else CLIP_L_336
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    text = LlamaConfig(**{"vocab_size": len(tokenizer), **shape}, pad_token_id=tokenizer.pad_token_id)
    config = LlavaConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(**tower),
        image_token_index=image_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    side = tower["image_size"]
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=tower["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)


def make_data(name: str, folder: Path, body: dict[str, Any], options: argparse.Namespace) -> None:
    """Records of between half the longest length and all of it; few and short ones with `--tiny`."""
    training = body["spec"]["training"]
    rows = training["globalBatchSize"] * options.steps
    longest = 20 if options.tiny else training["maxLength"] * 9 // 10
    folder.mkdir()
    tiny.write_jsonl(folder / "humaneval.jsonl", HUMAN_EVAL)
    tiny.write_jsonl(folder / "mbpp.jsonl", MBPP)
    if name == "llava-13b":
        make_images(folder, rows, longest - (0 if options.tiny else 576))
        return
    keys = ("question", "context", "answer") if name == "codellama-34b" else ("instruction", "input", "output")
    records = published.questions(rows, keys, words=(longest // 2, longest))
    (folder / "alpaca_en_demo.json").write_text(json.dumps(records))
    tiny.write_jsonl(folder / "code.jsonl", [{**record, "system": "Be brief."} for record in records])


def make_images(folder: Path, rows: int, longest: int) -> None:
    """Questions about squares of one colour."""
    from PIL import Image

    columns = ("user", "more", "assistant")
    records = []
    for index, record in enumerate(published.questions(rows, columns, words=(longest // 2, longest))):
        file = folder / f"{index % 16}.png"
        if not file.exists():
            Image.new("RGB", (400, 300), (16 * index, 128, 255 - 16 * index)).save(file)
        turns = [
            {"role": "user", "content": f"<image>{record['user']}"},
            {"role": "assistant", "content": record["assistant"]},
        ]
        records.append({"messages": turns, "images": [file.name]})
    (folder / "llava_mix.json").write_text(json.dumps(records))


def watch(pod: Any, deadline: float) -> int:
    """Waits for the trainer's end, or ends it at the deadline. Returns the most memory that rank 0 has reported, in bytes."""
    peak = 0
    while pod.exit_code() is None:
        state = pod.state()
        peak = max(peak, state.memory_peak_bytes if state is not None else 0)
        if time.monotonic() > deadline:
            pod.terminate()
            pod.wait(60)
        time.sleep(0.05)
    return peak


def measured(spec: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Losses, speed without the first step, and evaluations, from the trainer's journal."""
    file = Path(spec["checkpoint"]["dir"]) / "journal.jsonl"
    if not file.exists():
        return {}
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    later = steps[1:]
    return {
        "steps": len(steps),
        "losses": [round(line["loss"], 4) for line in steps],
        "tokens_per_step": [line["tokens"] for line in steps],
        "tokens_per_second": round(sum(s["tokens"] for s in later) / sum(s["seconds"] for s in later))
        if later
        else None,
        "step_seconds_median": round(statistics.median(s["seconds"] for s in later), 3) if later else None,
        "evaluations": {line["step"]: line["metrics"] for line in lines if "metrics" in line},
    }


def outputs(spec: dict[str, Any]) -> dict[str, Any]:
    """What the exported adapter says about itself, and of what type the newest checkpoint's tensors are."""
    config = Path(spec["outputDir"]) / "adapter_config.json"
    if not config.exists():
        return {}
    from safetensors import safe_open

    adapter = json.loads(config.read_text(encoding="utf-8"))
    with safe_open(config.with_name("adapter_model.safetensors"), "pt") as file:
        names = list(file.keys())
        shapes = {name.split(".")[-3]: file.get_slice(name).get_shape() for name in names if "lora_A" in name}
    checkpoint = max(Path(spec["checkpoint"]["dir"]).glob("step-*"))
    with safe_open(checkpoint / "rank-00000.safetensors", "pt") as file:
        kept = list(file.keys())
        types = {name.partition(".")[2]: file.get_slice(name).get_dtype() for name in kept}
    return {
        "adapter": {"rank": adapter["r"], "alpha": adapter["lora_alpha"], "dropout": adapter["lora_dropout"]},
        "adapter_tensors": len(names),
        "lora_A": shapes,
        "optimizer_types": types,
    }


if __name__ == "__main__":
    sys.exit(main())
