"""How fast a step is: our own setup and a plain transformers + peft loop, on random weights in real shapes.

    python benchmarks/throughput.py [--cases 7b-lora-r16,plain-7b-lora-r16] [--steps 8] [--limit 170] [--json out.json]

Each case runs in a process of its own with a time limit, and has the device to itself: the next one imports its libraries
meanwhile. Its result is printed as one JSON line when it is there, and all of them at the end. Rows are packed to `--length`
tokens from documents of about a seventh of that, never seeing each other. Ours goes LaunchSpec -> engine -> train_step; the plain
loop is SDPA (isolated through position_ids), all of Liger's kernels where there is a GPU, and fused AdamW. Rates are those of the
median step after `--warmup`: kernels that are compiled late, for a number that has not been there before, would count in some
cases and not in others, which find them in a cache.

FLOPs of a step, recomputation not counted: for each token 2 for every weight of a matrix product in the forward pass, the same
for the gradient of its input and, where the weight is trained, for its own; and for attention 6 x layers x heads x head size x
n^2 for a document of n tokens (forward and backward pass of two products, half of each masked). MFU is that, divided by the
time, against the nominal peak (989 TFLOP/s, H100 SXM, dense bf16) and against the rate of 8192^3 products measured in this run.
"""

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "operator"))
sys.path.insert(0, str(ROOT / "trainer_image"))

NOMINAL = 989e12
DEVICE = threading.Lock()
LLAMA_2_7B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096}  # fmt: skip
LLAMA_3_8B = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
              "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}  # fmt: skip
LLAMA_2_70B = {"vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
               "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 4096}  # fmt: skip
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {"7b": LLAMA_2_7B, "8b": LLAMA_3_8B, "tiny": TINY}
FAST: dict[str, Any] = {"training__compile": True, "training__ligerKernel": True}
FULL: dict[str, Any] = {"method": "Full", "adapter": None}


def lora(rank: int) -> dict[str, Any]:
    """Changes of the launch file."""
    return {"adapter__rank": rank, "adapter__alpha": 2 * rank}


QLORA: dict[str, Any] = {"method": "QLoRA", "quantization": {"bits": 4, "doubleQuantization": True}}
CHECKPOINTED = {"training__activationCheckpointing": "Full"}
PURE = {**FULL, "training__precision": "PureBF16"}

# name: (shape, loop, rows of a micro-batch, changes of the launch file)
# "bare" is ours without DeepSpeed's engine: the same model and kernels, torch's own AdamW.
CASES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "plain-7b-lora-r16": ("7b", "plain", 2, lora(16)),
    "7b-lora-r16": ("7b", "ours", 2, {**FAST, **lora(16)}),
    "7b-lora-r16-no-compile": ("7b", "ours", 2, {**lora(16), "training__ligerKernel": True}),
    "7b-lora-r64": ("7b", "ours", 2, {**FAST, **lora(64)}),
    "7b-qlora-r16": ("7b", "ours", 2, {**FAST, **lora(16), **QLORA}),
    "plain-7b-lora-r16-checkpointed": ("7b", "plain", 2, {**lora(16), **CHECKPOINTED}),
    "7b-lora-r16-checkpointed": ("7b", "ours", 2, {**FAST, **lora(16), **CHECKPOINTED}),
    "plain-8b-lora-r16": ("8b", "plain", 2, lora(16)),
    "8b-lora-r16": ("8b", "ours", 2, {**FAST, **lora(16)}),
    "plain-7b-full": ("7b", "plain", 2, FULL),
    "7b-full": ("7b", "ours", 2, {**FAST, **PURE}),
    "plain-7b-full-checkpointed": ("7b", "plain", 2, {**FULL, **CHECKPOINTED}),
    "7b-full-checkpointed": ("7b", "ours", 2, {**FAST, **PURE, **CHECKPOINTED}),
    "bare-7b-full": ("7b", "bare", 2, {**FAST, **PURE}),
    "plain-8b-full": ("8b", "plain", 1, FULL),
    "8b-full": ("8b", "ours", 1, {**FAST, **PURE}),
    "bare-7b-lora-r16": ("7b", "bare", 2, {**FAST, **lora(16), "training__precision": "PureBF16"}),
    "plain-tiny-lora": ("tiny", "plain", 2, lora(4)),
    "tiny-lora": ("tiny", "ours", 2, lora(4)),
    "bare-tiny-lora": ("tiny", "bare", 2, {**lora(4), "training__precision": "PureBF16"}),
    "tiny-qlora": ("tiny", "ours", 2, {**lora(4), **QLORA}),
    "tiny-lora-compiled": ("tiny", "ours", 2, {**FAST, **lora(4)}),
}
DEFAULT_CASES = "plain-7b-lora-r16,7b-lora-r16,7b-lora-r64,8b-lora-r16"


def main() -> int:
    """Runs the cases one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=DEFAULT_CASES, help=f"of {', '.join(CASES)}")
    parser.add_argument("--steps", type=int, default=8, help="measured steps")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them; compilation happens here")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--set", action="append", default=[], metavar="training__attention=SDPA", help="for our cases")
    parser.add_argument("--limit", type=float, default=170, help="seconds for each case")
    parser.add_argument("--cache", type=Path, help="keeps compiled code; default: one for this run")
    parser.add_argument("--profile", action="store_true", help="also where a step's time goes")
    parser.add_argument("--json", type=Path, help="also write all results here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("RESULT " + json.dumps(run_case(options)), flush=True)
        return 0
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="throughput-") as scratch:
        options.cache = options.cache or Path(scratch) / "cache"
        results["matmul"] = _in_process(options, "matmul")
        print(json.dumps({"matmul": results["matmul"]}), flush=True)
        names = options.cases.split(",")
        with ThreadPoolExecutor(2) as pool:
            for name, result in zip(names, pool.map(partial(_in_process, options), names), strict=True):
                rate = results["matmul"].get("flops_per_second")
                if rate and "flops_per_second" in result:
                    result["mfu_measured"] = round(result["flops_per_second"] / rate, 4)
                results[name] = result
                print(json.dumps({name: result}), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))
    return 0 if all("error" not in result for result in results.values()) else 1


def _in_process(options: argparse.Namespace, name: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", name, "--cache", str(options.cache)]
    for key in ("steps", "warmup", "length", "layers"):
        if getattr(options, key) is not None:
            command += [f"--{key}", str(getattr(options, key))]
    command += ["--profile"] if options.profile else []
    command += [part for change in options.set for part in ("--set", change)]
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = _with_the_device(process, options.limit)
    except subprocess.TimeoutExpired as error:
        tail = (error.stderr or b"")[-1500:]
        return {"error": f"not within {options.limit} s", "log": tail.decode(errors="replace")}
    for line in output.splitlines():
        if line.startswith("RESULT "):
            result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return {**result, "process_seconds": round(time.monotonic() - started, 1)}
    return {"error": f"exit status {process.returncode}", "log": (output + errors)[-3000:]}


def _with_the_device(process: "subprocess.Popen[str]", limit: float) -> tuple[str, str]:
    with DEVICE:
        try:
            return process.communicate("go\n", timeout=limit)
        finally:
            process.kill()
            process.wait()


def run_case(options: argparse.Namespace) -> dict[str, Any]:
    """One case, in this process."""
    import_libraries()
    sys.stdin.readline()  # until the process before has ended, and its memory is free
    return matmul_rate() if options.one == "matmul" else measure_case(options)


def import_libraries() -> None:
    """What takes seconds and no device."""
    import peft  # noqa: F401
    import transformers  # noqa: F401

    from finetune_trainer.quirks import tame_deepspeed

    tame_deepspeed()
    import deepspeed  # noqa: F401

    from finetune_trainer import engine, kernels, setup, step  # noqa: F401


def measure_case(options: argparse.Namespace) -> dict[str, Any]:
    """One case, with the device to itself."""
    shape_name, loop, rows, changes = CASES[options.one]
    changes = dict(changes)
    for item in options.set:
        key, _, value = item.partition("=")
        changes[key] = json.loads(value) if value[:1] in '0123456789[{tfn"' else value
    shape = SHAPES[shape_name]
    shape = {**shape, "num_hidden_layers": options.layers or shape["num_hidden_layers"]}
    with tempfile.TemporaryDirectory(prefix="throughput-case-") as folder:
        spec = launch_spec(Path(folder), options, rows, changes)
        set_environment(spec, Path(folder))
        if loop == "plain":
            return plain_loop(spec, shape, options)
        return our_loop(spec, shape, options, bare=loop == "bare")


def launch_spec(folder: Path, options: argparse.Namespace, rows: int, changes: dict[str, Any]) -> Any:
    from finetune_api.launch import LaunchSpec
    from tests.trainer.jobs import launch

    total = options.warmup + options.steps
    settings = {
        "training__maxLength": options.length,
        "training__packing": True,
        "training__microBatchSize": rows,
        "training__globalBatchSize": rows,
        "training__maxSteps": total + 1,
        "training__learningRate": 1e-4,
        "cacheDir": str(options.cache),
        "threadsPerProcess": max(1, (os.cpu_count() or 2) // 2),
    }
    return LaunchSpec.model_validate(launch(folder, folder / "model", folder / "data.jsonl", **{**settings, **changes}))


def set_environment(spec: Any, scratch: Path) -> None:
    from finetune_trainer.gang import rank_environment

    os.environ.update(rank_environment(spec, 0, 0, scratch))


def random_model(shape: dict[str, Any], dtype: Any, device: Any) -> Any:
    """A Llama with random weights, made where it will be used."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**shape, pad_token_id=0, use_cache=False), dtype=dtype)


def quantized(model: Any, config: Any, device: Any) -> Any:
    """As `from_pretrained` does it with weights from files."""
    import bitsandbytes as bnb
    import torch
    from transformers.quantizers.quantizers_utils import get_module_from_name

    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if type(layer) is not torch.nn.Linear or layer is head:
            continue
        four = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=config.bnb_4bit_compute_dtype,
            compress_statistics=config.bnb_4bit_use_double_quant, quant_type=config.bnb_4bit_quant_type, device="meta",
        )  # fmt: skip
        four.weight = bnb.nn.Params4bit(
            layer.weight.data.cpu(), requires_grad=False, quant_type=config.bnb_4bit_quant_type,
            compress_statistics=config.bnb_4bit_use_double_quant, module=four,
        ).to(device)  # fmt: skip
        parent, child = get_module_from_name(model, name)
        setattr(parent, child, four)
    model.config.quantization_config = config
    model.is_loaded_in_4bit = model.is_quantized = True
    return model


class Bare:
    """What a step needs of DeepSpeed's engine, with torch's optimizer and nothing else."""

    def __init__(self, model: Any, spec: Any, _config: dict[str, Any]) -> None:
        from finetune_trainer.optimizers import build_optimizer

        self.module, self.optimizer = model, build_optimizer(model, spec)
        self.training = True

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def eval(self) -> None:
        self.train(False)

    def train(self, mode: bool = True) -> None:
        self.training = mode
        self.module.train(mode)

    def backward(self, loss: Any, **_options: Any) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def packed_rows(spec: Any, vocabulary: int, device: Any) -> Any:
    """Rows of documents of different lengths, nearly full; every token but a document's first is a target."""
    import numpy as np

    from finetune_trainer.data.batches import Rows
    from finetune_trainer.data.packing import SampleRows, pack_rows
    from finetune_trainer.data.store import TokenStore
    from finetune_trainer.kernels import pad_to

    length = spec.training.max_length
    needed = (spec.training.max_steps + 1) * spec.training.global_batch_size
    random = np.random.default_rng(0)
    lengths = random.integers(length // 28 + 1, length // 4, size=8 * needed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = random.integers(1, vocabulary, size=int(offsets[-1]), dtype=np.int32)
    targets = np.ones(len(ids), dtype=bool)
    targets[offsets[:-1]] = False
    rows = sorted(pack_rows(lengths, length), key=lambda row: -int(lengths[row].sum()))[:needed]
    fullest = SampleRows(np.concatenate(rows), np.cumsum([0, *map(len, rows)]))
    return Rows(TokenStore(ids, targets, offsets), fullest, packed=True, pad_to=pad_to(spec, device))


def our_loop(spec: Any, shape: dict[str, Any], options: argparse.Namespace, *, bare: bool) -> dict[str, Any]:
    """Through the trainer's own functions, from the launch file on; `bare` leaves out DeepSpeed's engine alone."""
    import transformers

    from finetune_trainer import distributed, setup
    from finetune_trainer import engine as ds
    from finetune_trainer.logs import setup_logging
    from finetune_trainer.step import micro_batches, own_rows, train_step

    setup_logging(0)
    world = distributed.connect(spec)

    def without_files(*_args: Any, dtype: Any = None, quantization_config: Any = None, **_kwargs: Any) -> Any:
        model = random_model(shape, dtype, world.device)
        return model if quantization_config is None else quantized(model, quantization_config, world.device)

    folder = Path(spec.model.source.path)
    transformers.LlamaConfig(**shape).save_pretrained(folder)  # what kind of model it is stands there
    transformers.AutoModelForCausalLM.from_pretrained = without_files
    if bare:
        ds.build_engine = Bare  # type: ignore[assignment]
    sources = setup.Sources(folder, None, [], [], [])
    started = time.perf_counter()
    engine = setup.build_engine(spec, sources, world)
    built = time.perf_counter() - started
    rows = packed_rows(spec, shape["vocab_size"], world.device)
    size = spec.training.global_batch_size
    groups = [list(range(at, at + size)) for at in range(0, len(rows) - size + 1, size)]
    plan = (part for group in groups for part in own_rows(group, world, spec.training.micro_batch_size))
    batches = micro_batches(engine, rows, world.device, plan, spec.training.loader_workers)

    def step(index: int) -> tuple[float, list[int]]:
        ds.set_learning_rate(engine, spec.training.learning_rate)
        result = train_step(
            engine,
            rows,
            groups[index],
            world,
            step=index + 1,
            seed=1,
            micro_batch_size=spec.training.micro_batch_size,
            max_grad_norm=spec.training.max_grad_norm,
            stop_requested=lambda: False,
            beat=lambda: None,
            batches=batches,
        )
        return result.loss, groups[index]

    return {"engine_seconds": round(built, 1), **measure(step, rows, engine.module, spec, shape, world.device, options)}


def plain_loop(spec: Any, shape: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What people write: from_pretrained, get_peft_model, Liger, AdamW."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(shape, dtype, device)
    if device.type == "cuda":
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    if spec.adapter is not None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=spec.adapter.rank, lora_alpha=spec.adapter.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    if spec.training.activation_checkpointing == "Full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    rows = packed_rows(spec, shape["vocab_size"], device)
    size = spec.training.global_batch_size

    def step(index: int) -> tuple[float, list[int]]:
        group = list(range(index * size, (index + 1) * size))
        batch = rows.batch(group)
        # Their loss shifts labels by itself; ours are shifted already.
        labels = torch.cat([torch.full((size, 1), -100), batch.labels[:, :-1]], dim=1)
        loss = model(
            input_ids=batch.input_ids.to(device),
            position_ids=batch.position_ids.to(device),
            labels=labels.to(device),
            use_cache=False,
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), group

    return measure(step, rows, model, spec, shape, device, options)


def measure(
    step: Any, rows: Any, model: Any, spec: Any, shape: dict[str, Any], device: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """Times the steps and works out the rates."""
    import torch

    cuda = device.type == "cuda"
    times, tokens, flops, losses, warmup = [], 0, 0.0, [], []
    weights = matrix_weights(model, shape)
    for index in range(options.warmup + options.steps):
        if index == options.warmup:
            gc.collect()
            gc.freeze()  # else it holds some step up for 0.3 s; the trainer does the same after its first step
            if cuda:
                torch.cuda.reset_peak_memory_stats()
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        loss, group = step(index)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        losses.append(round(loss, 4))
        if index < options.warmup:
            warmup.append(round(seconds, 2))
            continue
        times.append(seconds)
        lengths = [int(rows.store.lengths[s]) for row in group for s in rows.samples[row]]
        tokens += sum(lengths)
        flops += step_flops(lengths, weights, shape)
    total = statistics.median(times) * len(times)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    profile = {"profile": profiled(lambda: step(options.warmup))} if options.profile else {}
    return {
        "tokens_per_second": round(tokens / total, 1),
        "step_seconds": [round(seconds, 4) for seconds in times],
        "step_seconds_median": round(statistics.median(times), 4),
        "flops_per_second": flops / total,
        "mfu_nominal": round(flops / total / NOMINAL, 4),
        "peak_gib": round(peak / 2**30, 2) if peak is not None else None,
        "warmup_seconds": warmup,
        "losses": losses,
        "fill": round(tokens / (len(times) * spec.training.global_batch_size * spec.training.max_length), 4),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        **profile,
    }


def profiled(work: Any, count: int = 30) -> list[str]:
    """The kernels (on a CPU: operators) that a piece of work spends most time in."""
    from torch._C._autograd import DeviceType
    from torch.profiler import profile

    with profile() as profiler:
        work()
    events = profiler.key_averages()
    kernels = [e for e in events if e.device_type == DeviceType.CUDA] or list(events)
    spent = sorted(((e.self_device_time_total or e.self_cpu_time_total, e) for e in kernels), key=lambda x: -x[0])
    total = sum(time for time, _ in spent) or 1
    return [f"{100 * t / total:5.1f} % {t / 1e3:8.2f} ms {e.count:5d} x {e.key[:110]}" for t, e in spent[:count]]


def matrix_weights(model: Any, shape: dict[str, Any]) -> tuple[int, int]:
    """Weights that take part in matrix products, and how many of them are trained. The embedding is a look-up."""
    total = trained = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or "embed_tokens" in name:
            continue
        state = getattr(parameter, "quant_state", None)  # two weights in a byte
        total += parameter.numel() if state is None else math.prod(state.shape)
        trained += parameter.numel() if parameter.requires_grad else 0
    return total, trained


def step_flops(lengths: list[int], weights: tuple[int, int], shape: dict[str, int]) -> int:
    """FLOPs of a step over documents of these lengths, by the formula at the top."""
    total, trained = weights
    linear = sum(lengths) * (4 * total + 2 * trained)
    return linear + 6 * shape["num_hidden_layers"] * shape["hidden_size"] * sum(n * n for n in lengths)


def matmul_rate(size: int = 8192, seconds: float = 2.0) -> dict[str, Any]:
    """Rate of bf16 products of random square matrices."""
    import torch

    if not torch.cuda.is_available():
        return {"flops_per_second": None, "device": "cpu"}
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(20):
            a @ b
        torch.cuda.synchronize()
        count += 20
    rate = 2 * size**3 * count / (time.perf_counter() - started)
    return {"flops_per_second": rate, "device": torch.cuda.get_device_name()}


if __name__ == "__main__":
    sys.exit(main())
