"""The published configurations: their LLaMA-Factory files converted, and models and data for them.

What the tests (`published_run`) and `benchmarks/published.py` share.
"""

import io
import json
import random
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from finetune_cli.__main__ import main
from tests.convert.golden import CASES
from tests.trainer import tiny

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


def make_tokenizer() -> Any:
    """With Llama 2's marks."""
    tokenizer = tiny.make_tokenizer(template=None)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"})
    return tokenizer


def make_llama(folder: Path, **shape: int) -> Path:
    """Saves a random Llama in bf16 with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        **{"vocab_size": len(tokenizer), **LLAMA, **shape},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def questions(
    count: int, columns: tuple[str, str, str], words: tuple[int, int] = (3, 9), longest: int = 0
) -> list[dict[str, str]]:
    """Records with a question of so many words, an input and an answer; with `longest` the first one's question has those."""
    rng = random.Random(1)

    def say(low: int, high: int) -> str:
        return " ".join(rng.choices(tiny.WORDS, k=rng.randint(low, high)))

    records = [dict(zip(columns, (say(*words), say(1, 3), say(2, 9)), strict=True)) for _ in range(count)]
    if longest:
        records[0][columns[0]] = say(longest, longest)
    return records
