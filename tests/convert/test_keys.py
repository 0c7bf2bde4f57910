"""The table has every key, and no key is dropped silently."""

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_cli.convert import page
from finetune_cli.convert.command import Result, convert
from finetune_cli.convert.conversion import Options
from finetune_cli.convert.keys import KEYS
from finetune_cli.convert.source import Source
from finetune_cli.convert.table import Fate, Key, Kind
from finetune_cli.convert.templates import BY_NAME, OWN, REASONING, SEEING, TOKENIZERS, WITHOUT_FUNCTIONS
from finetune_trainer.data import chat_templates

REFERENCE: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(
    (Path(__file__).parent / "llama_factory_keys.yaml").read_text()
)
DEFAULTS = {
    name: default for classes in REFERENCE.values() for keys in classes.values() for name, default in keys.items()
}
BASE = {
    "model_name_or_path": "org/model",
    "dataset": "a",
    "dataset_dir": {"a": {"file_name": "a.json"}, "b": {"file_name": "b.json"}},
    "output_dir": "out",
    "do_train": True,
    "save_total_limit": 3,
}
OPTIONS = Options(data_uri="pvc://data", output_uri="pvc://data")
CONTRARY = {
    "bf16": {"use_cpu": True},
    "gradient_checkpointing": {"disable_gradient_checkpointing": True},
    "activation_checkpointing": {"disable_gradient_checkpointing": True},
    "mix_strategy": {"dataset": "a,b"},
    "interleave_probs": {"dataset": "a,b", "mix_strategy": "interleave_under"},
    "eval_steps": {"eval_dataset": "b", "eval_strategy": "steps"},
    "logging_steps": {"eval_dataset": "b", "eval_strategy": "steps"},
    "double_quantization": {"quantization_bit": 4},
    "quantization_method": {"quantization_bit": 4},
    "quantization_type": {"quantization_bit": 4},
    "do_sample": {"eval_dataset": "humaneval"},
    "temperature": {"eval_dataset": "humaneval"},
    "top_p": {"eval_dataset": "humaneval"},
    "max_new_tokens": {"eval_dataset": "humaneval"},
    "mm_projector_lr": {"template": "llava"},
    "freeze_vision_tower": {"template": "llava"},
    "freeze_multi_modal_projector": {"template": "llava"},
    "metric_for_best_model": {"eval_dataset": "b", "load_best_model_at_end": True},
    "load_best_model_at_end": {"eval_dataset": "b"},
    "early_stopping_steps": {"eval_dataset": "b"},
    "greater_is_better": {"eval_dataset": "b", "load_best_model_at_end": True},
    "freeze_trainable_layers": {"finetuning_type": "freeze"},
    "freeze_trainable_modules": {"finetuning_type": "freeze"},
    "freeze_extra_modules": {"finetuning_type": "freeze"},
    "run_name": {"report_to": "wandb"},
    "project": {"report_to": "wandb"},
    "wandb_project": {"report_to": "wandb"},
    "wandb_run_name": {"report_to": "wandb"},
    "wandb_entity": {"report_to": "wandb"},
    "logging_dir": {"report_to": "tensorboard"},
}
"""What has to stand beside a key for it to have an effect."""
EFFECT = {
    "dataset": "b",
    "dataset_dir": {"a": {"file_name": "other.json"}},
    "eval_dataset": "b",
    "metric_for_best_model": "accuracy",
    "greater_is_better": True,
    "template": "llama3",
    "warmup_ratio": 0.1,
    "lr_scheduler_type": "cosine",
    "optim": "paged_adamw_8bit",
    "report_to": "tensorboard",
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "deepspeed_config": {"stage": 2},
    "interleave_probs": "0.7,0.3",
    "quantization_bit": 4,
    "num_train_epochs": 2,
    "loraplus_lr_ratio": 16,
    "adam_beta1": 0.8,
    "adam_beta2": 0.99,
    "do_train": False,
}
"""Values with an effect, where the kind alone does not give one."""


def convert_values(values: dict[str, Any]) -> Result:
    lines = {(name,): number for number, name in enumerate(values, 1)}
    return convert(Source("file.yaml", Path("/nowhere"), values, lines), OPTIONS, "file")


def another_value(key: Key) -> Any:
    """A value that is allowed and is not the default."""
    if key.name in EFFECT:
        return EFFECT[key.name]
    if key.choices:
        return next(choice for choice in key.choices if choice != key.default)
    numbers = {Kind.INT: (key.default or 1) + 1 if key.kind is Kind.INT else 0, Kind.FLOAT: 0.25}
    others = {Kind.BOOL: not key.default, Kind.TEXT: "xyz", Kind.NAMES: "x,y", Kind.MAP: {"p": 1}, Kind.ANY: "xyz"}
    return numbers.get(key.kind, others.get(key.kind))


@pytest.mark.parametrize("name", sorted(KEYS))
def test_no_key_is_dropped_silently(name: str) -> None:
    """Each key, alone with a value of its own, changes the manifest, is noted, or is refused with its line."""
    beside = BASE | CONTRARY.get(name, {})
    without = convert_values({k: v for k, v in beside.items() if k != name})
    value = another_value(KEYS[name])
    given = convert_values({k: v for k, v in beside.items() if k != name} | {name: value})
    line = f"file.yaml:{len(beside) + (name not in beside)}:"
    said = [str(entry) for entry in (*given.notes, *given.problems) if str(entry).startswith(line)]
    named = [text for text in said if f"`{name}" in text or name in ("dataset_dir", "deepspeed_config")]
    changed = given.body is not None and given.body != without.body
    fate = KEYS[name].fate
    assert changed or named, f"{name}: {value!r} has no effect, no note and no refusal"
    if fate is Fate.REFUSED:
        assert given.body is None
        assert named
    if fate in (Fate.NO_EFFECT, Fate.PART):
        assert named
        assert given.body == without.body


@pytest.mark.parametrize("name", [key.name for key in KEYS.values() if key.fate is Fate.REFUSED])
def test_what_asks_for_nothing_is_accepted(name: str) -> None:
    for off in KEYS[name].off:
        if off is not None and (off is not False or KEYS[name].kind is Kind.BOOL):
            given = convert_values(BASE | {name: off})
            assert given.problems == []
            assert any(f"`{name}" in note.text for note in given.notes)


def test_the_table_has_every_key_with_its_default() -> None:
    assert set(DEFAULTS) - set(KEYS) == set()
    assert {key.name for key in KEYS.values() if key.known} - set(DEFAULTS) == {"kt_config"}
    differing = {
        name: (KEYS[name].default, default)
        for name, default in DEFAULTS.items()
        if default != "computed" and KEYS[name].default != default
    }
    assert differing == {}


def test_the_installed_transformers_has_no_key_that_the_table_lacks() -> None:
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    for file, name in (
        ("training_args.py", "TrainingArguments"),
        ("training_args_seq2seq.py", "Seq2SeqTrainingArguments"),
    ):
        tree = ast.parse((Path(spec.origin).parent / file).read_text())
        (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        fields = {
            node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
        assert len(fields) >= 5
        assert fields - set(KEYS) == set()


def test_every_refused_key_says_what_to_use_and_every_part_has_a_refused_parent() -> None:
    for key in KEYS.values():
        assert key.text or key.to, key.name
        assert bool(key.instead) is (key.fate is Fate.REFUSED), key.name
        assert bool(key.to) is (key.fate is Fate.TRANSLATED), key.name
        if key.fate is Fate.PART:
            assert KEYS[key.part_of].fate is Fate.REFUSED, key.name


def test_templates_are_known_once() -> None:
    groups = [set(BY_NAME), TOKENIZERS, SEEING, OWN]
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert REASONING < TOKENIZERS


def test_templates_without_functions_are_those_that_say_so() -> None:
    texts = {path.stem: path.read_text() for path in Path(chat_templates.__file__).parent.glob("templates/*.jinja")}
    assert set(WITHOUT_FUNCTIONS) == {name for name, text in texts.items() if "has no form for functions" in text}


def test_the_page_is_current() -> None:
    assert page.PATH.read_text() == page.render(), "run `make generate`"
