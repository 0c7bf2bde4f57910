"""The published configurations: their LLaMA-Factory files converted, changed only where this machine is too small, and run.

The way is the user's: `finetune convert`, then `finetune run`. Also used by `benchmarks/published.py`.
"""

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune_cli.__main__ import main
from tests.convert.golden import CASES
from tests.trainer import jobs, tiny
from tests.trainer.conftest import Assets
from tests.trainer.hub import TOKEN
from tests.trainer.test_local import Machine

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}
"""Tiny: heads share keys and values as in Llama-2-70B and CodeLlama-34B, and there are positions for the longest rows."""


def source(case: str) -> dict[str, Any]:
    """LLaMA-Factory's file."""
    text: dict[str, Any] = yaml.safe_load((CASES / f"{case}.yaml").read_text(encoding="utf-8"))
    return text


def convert(case: str, *options: str) -> dict[str, Any]:
    """What `finetune convert` makes of a case's file with other options than its first line has."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        status = main(["convert", str(CASES / f"{case}.yaml"), *options])
    assert status == 0, stderr.getvalue()
    body: dict[str, Any] = yaml.safe_load(stdout.getvalue())
    return body


def change(body: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of the manifest with values under `spec` set by dotted path."""
    copy: dict[str, Any] = json.loads(json.dumps(body))
    for path, value in changes.items():
        *parents, last = path.split(".")
        place = copy["spec"]
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
    return copy


def make_llama(folder: Path, *, device: str = "cpu", **shape: int) -> Path:
    """Saves a random Llama in bf16 with a tokenizer that has Llama 2's marks."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = tiny.make_tokenizer(template=None)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"})
    config = LlamaConfig(
        **{"vocab_size": len(tokenizer), **LLAMA, **shape},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def questions(count: int, columns: tuple[str, str, str], seed: int = 1, longest: int = 0) -> list[dict[str, str]]:
    """Records with a question, an input and an answer; with `longest` the first one's question has so many words."""
    import random

    rng = random.Random(seed)

    def say(low: int, high: int) -> str:
        return " ".join(rng.choices(tiny.WORDS, k=rng.randint(low, high)))

    records = [dict(zip(columns, (say(3, 9), say(1, 3), say(2, 9)), strict=True)) for _ in range(count)]
    if longest:
        records[0][columns[0]] = say(longest, longest)
    return records


class Published(Machine):
    """A converted job in a folder of its own: volume `data` is the folder, Secrets are files in it."""

    def __init__(self, folder: Path, server: jobs.ForkServer, assets: Assets, body: dict[str, Any], hook: str) -> None:
        super().__init__(folder, server, assets)
        (folder / "token").write_text(TOKEN)
        (folder / "key").write_text("0123456789abcdef0123456789abcdef01234567")
        self.facts_folder = folder / "facts"
        self.facts_folder.mkdir()
        variables = {"TEST_HOOK": hook, "TEST_FACTS": self.facts_folder, "WANDB_MODE": "offline", "WANDB_DIR": folder}
        env = [{"name": name, "value": str(value)} for name, value in variables.items()]
        self.body = change(body, {"trainer.env": env, "cache.uri": "pvc://data/cache"})
        self.volumes = [f"data={folder}"]
        self.secrets = [f"hub/token={folder / 'token'}", f"wandb/api-key={folder / 'key'}"]

    @property
    def output(self) -> Path:
        return self.folder / self.body["spec"]["output"]["uri"].removeprefix("pvc://data/")

    @property
    def runs(self) -> Path:
        """The folder in which the run is kept, beside its checkpoints."""
        return next(self.output.parent.glob("checkpoints/*.run"))

    @property
    def log(self) -> str:
        return (self.runs / "attempt-1.log").read_text(errors="replace")

    @property
    def launch(self) -> dict[str, Any]:
        launch: dict[str, Any] = json.loads((self.runs / "attempt-1.launch.json").read_text())
        return launch

    def result(self) -> "Result":
        """What a finished run has left."""
        checkpoints = Path(self.launch["checkpoint"]["dir"])
        lines = [json.loads(line) for line in (checkpoints / "journal.jsonl").read_text().splitlines()]
        ranks = sorted(self.facts_folder.glob("rank-*.json"))
        return Result(self, checkpoints, lines, [json.loads(path.read_text()) for path in ranks])


@dataclass(frozen=True)
class Result:
    """A finished run."""

    machine: Published
    checkpoints: Path
    lines: list[dict[str, Any]]
    """Of the journal."""
    ranks: list[dict[str, Any]]
    """What each rank wrote down, see `facts_hook`."""

    @property
    def launch(self) -> dict[str, Any]:
        return self.machine.launch

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "loss" in line]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "metrics" in line]

    @property
    def adapter(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.machine.output / "adapter_config.json").read_text())
        return config

    def tensors(self) -> dict[str, Any]:
        """The exported adapter."""
        from safetensors.torch import load_file

        return load_file(self.machine.output / "adapter_model.safetensors")

    def optimizer_state(self, *names: str) -> list[Any]:
        """What all ranks keep under these names (`master`, `exp_avg`, `exp_avg_sq`) in the newest checkpoint."""
        from safetensors.torch import load_file

        files = max(self.checkpoints.glob("step-*")).glob("rank-*")
        tensors = [item for file in files for item in load_file(file).items()]
        return [tensor for name, tensor in tensors if name.partition(".")[2] in names]

    def samples(self) -> Iterator[tuple[str, str]]:
        """The tokenised training samples as text, and the part of each that is learnt."""
        from transformers import AutoTokenizer

        tokenizer, store = AutoTokenizer.from_pretrained(self.machine.output), self.store()
        for begin, end in zip(store.offsets[:-1], store.offsets[1:], strict=True):
            ids, targets = store.ids[begin:end], store.targets[begin:end]
            yield tokenizer.decode(ids), tokenizer.decode(ids[targets])

    def store(self) -> Any:
        from finetune_trainer.data.store import TokenStore

        (folder,) = (self.machine.folder / "cache" / "tokens").iterdir()
        return TokenStore.load(folder)
