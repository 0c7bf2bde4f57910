"""Whole jobs for benchmarks: random models of real shapes in Hugging Face layout, and the trainer as a process on them."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [str(ROOT / name) for name in (".", "operator", "trainer_image")]
sys.path[:0] = SOURCES
os.environ["PYTHONPATH"] = os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")])
# Images have compiled bytecode; without it imports take several times as long.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("PYTHONPYCACHEPREFIX", str(Path.home() / ".cache" / "finetune-operator" / "pycache"))

import torch  # noqa: E402

from benchmarks.throughput import LLAMA_2_7B, LLAMA_2_70B, LLAMA_3_8B, TINY  # noqa: E402
from finetune_trainer.tensor_file import Kind, TensorFile  # noqa: E402
from tests.trainer import tiny  # noqa: E402
from tests.trainer.jobs import Pod, launch  # noqa: E402

SHAPES: dict[str, dict[str, Any]] = {
    "7b": LLAMA_2_7B,
    "8b": LLAMA_3_8B,
    "1.3b": {**LLAMA_2_7B, "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24,
             "num_attention_heads": 16, "num_key_value_heads": 16},
    "70b": LLAMA_2_70B,
    "tiny": TINY,
}  # fmt: skip
SHARD_BYTES = 5_000_000_000
STANDARD_DEVIATION = 0.02


@dataclass(frozen=True)
class Done:
    """What a job left behind."""

    result: dict[str, Any]
    """train_result.json"""
    journal: list[dict[str, Any]]
    log: str
    seconds: float
    """From the start of the process to its end."""

    @property
    def step_seconds(self) -> dict[int, float]:
        return {line["step"]: line["seconds"] for line in self.journal if "seconds" in line}


def run_job(folder: Path, model: Path, train: Path, length: int, changes: dict[str, Any]) -> Done:
    """Packed rows of a length, two in a micro-batch and a step; compiled; with all CPUs."""
    settings: dict[str, Any] = {
        "training__maxLength": length,
        "training__packing": True,
        "training__microBatchSize": 2,
        "training__globalBatchSize": 2,
        "training__learningRate": 1e-5,
        "training__compile": True,
        "training__ligerKernel": True,
        "threadsPerProcess": os.cpu_count(),
        "hangTimeoutSeconds": 600,
        "communicationTimeoutSeconds": 600,
    }
    started = time.perf_counter()
    pod = Pod(folder, launch(folder, model, train, **{**settings, **changes}), None)
    code = pod.wait(timeout=600)
    seconds = time.perf_counter() - started
    assert code == 0, f"exit code {code}:\n{pod.log[-5000:]}"
    journal = (folder / "checkpoints" / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    result = json.loads((folder / "output" / "train_result.json").read_text(encoding="utf-8"))
    return Done(result, [json.loads(line) for line in journal], pod.log, round(seconds, 1))


def compile_bytecode() -> None:
    """Of all that a job imports, by importing it."""
    what = "from finetune_trainer import startup; startup.import_libraries(); startup.import_compiler()"
    subprocess.run([sys.executable, "-c", what], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def write_chats(file: Path, length: int) -> Path:
    """A few rows of a length; steps go through them again and again."""
    return tiny.write_jsonl(file, tiny.chats(max(64, length // 4), seed=1))


def write_documents(file: Path, length: int) -> Path:
    """Plain texts of a seventh of a length on average, some 64 rows full of them."""
    rng = random.Random(1)
    words = (rng.choices(tiny.WORDS, k=rng.randint(length // 28 + 1, length // 4)) for _ in range(64 * 7))
    return tiny.write_jsonl(file, [{"text": " ".join(text)} for text in words])


def write_model(folder: Path, shape: dict[str, Any], *, tokenizer: Any = None, spill: Path | None = None) -> Path:
    """Writes a Llama; all matrices repeat the same random values.

    Args:
        folder: is made, and is there once all is written.
        shape: its configuration.
        tokenizer: is saved beside it; None: a small one.
        spill: a folder on another disk for the files that the first has no room for; links to them are in `folder`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    whole, folder = folder, folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = tokenizer or tiny.make_tokenizer()
    tokenizer.save_pretrained(folder)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(**shape, **ids, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        kinds = {n: Kind(torch.bfloat16, tuple(t.shape)) for n, t in LlamaForCausalLM(config).state_dict().items()}
    shards = _shards(kinds)
    if spill is not None:
        _link(folder, shards, spill)
    values = torch.empty(1 << 24, dtype=torch.bfloat16).normal_(0, STANDARD_DEVIATION)
    with ThreadPoolExecutor(len(shards)) as threads:
        list(threads.map(lambda shard: _write(folder / shard[0], shard[1], values), shards.items()))
    index = {
        "metadata": {"total_size": sum(kind.size_bytes for kind in kinds.values())},
        "weight_map": {name: file for file, content in shards.items() for name in content},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder.rename(whole)


def weights_digest(output: Path) -> str:
    """SHA-256 of all exported weights."""
    digest = hashlib.sha256()
    for file in sorted(output.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def forget_pages(folder: Path) -> None:
    """Takes a folder's files out of the page cache; no right is needed for that."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _shards(kinds: dict[str, Kind]) -> dict[str, dict[str, Kind]]:
    groups: list[dict[str, Kind]] = [{}]
    for name, kind in kinds.items():
        if sum(k.size_bytes for k in groups[-1].values()) + kind.size_bytes > SHARD_BYTES:
            groups.append({})
        groups[-1][name] = kind
    return {f"model-{i + 1:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups)}


def _link(folder: Path, shards: dict[str, dict[str, Kind]], spill: Path) -> None:
    """Makes links to a folder elsewhere for the last files, if all of them would fill more than two thirds of what is free."""
    room = shutil.disk_usage(folder).free * 2 // 3
    for name, content in shards.items():
        room -= sum(kind.size_bytes for kind in content.values())
        if room < 0:
            (folder / name).symlink_to(spill / name)


def _write(file: Path, kinds: dict[str, Kind], values: torch.Tensor) -> None:
    with TensorFile(file, kinds) as stream:
        for name in reversed(stream.names):  # not in order: nobody asks for the hash
            kind = kinds[name]
            if name.endswith("norm.weight"):
                tensor = torch.ones(kind.shape, dtype=kind.dtype)
            else:
                tensor = values.repeat(-(-kind.num_values // len(values)))[: kind.num_values].view(kind.shape)
            stream.write(name, tensor)
