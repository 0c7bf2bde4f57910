"""The refused combinations: one table for the API server, for local runs and for the docs."""

import re
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from finetune_api import combinations, crd, deepspeed_config
from finetune_api.base import VALIDATIONS
from finetune_api.combinations import FIELDS, REFUSALS, Combination, check
from finetune_api.job import FineTuneJob
from finetune_api.reference import CHOICES
from tests.contract.manifests import GOOD, broken


def schema_rules() -> dict[str, str]:
    """Message to rule, of the spec as a whole."""
    root = crd.custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return {rule["message"]: rule["rule"] for rule in root["properties"]["spec"][VALIDATIONS]}


def accepts(rule: str, combination: Combination) -> bool:
    """Evaluates a rule of the small part of CEL that these have: `in`, `&&`, `!` and `has` on fields."""
    python = re.sub(r"has\(self\.\w+\)", "True", rule).replace("&&", "and").replace("!(", "not (")
    for name, path in FIELDS.items():
        python = re.sub(rf"self\.{re.escape(path)}\b", repr(getattr(combination, name)), python)
    assert "self" not in python, python
    return bool(eval(python, {"__builtins__": {}}))


def test_the_api_server_and_python_agree_on_every_combination() -> None:
    rules = schema_rules()
    assert [rules[refusal.message] for refusal in REFUSALS] == [refusal.cel for refusal in REFUSALS]
    seen = set()
    for values in product(*CHOICES.values()):
        combination = Combination(**dict(zip(CHOICES, values, strict=True)))
        reason = check(combination)
        refused_by = [refusal.message for refusal in REFUSALS if not accepts(refusal.cel, combination)]
        assert (reason is None) == (not refused_by)
        if reason is not None:
            assert reason == refused_by[0]
            seen.add(reason)
    assert len(seen) == len(REFUSALS), "a refusal that never applies"


def test_choices_are_those_of_the_schema() -> None:
    for name, path in FIELDS.items():
        node: Any = crd.custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        for part in ["spec", *path.split(".")]:
            node = node["properties"][part]
        assert list(CHOICES[name]) == node["enum"], path


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.message[:60])
def test_a_refusal_says_what_and_why(refusal: combinations.Refusal) -> None:
    first = replace(Combination(), **{name: values[0] for name, values in refusal.when.items()})
    assert check(first) == refusal.message
    assert all(FIELDS[name] in refusal.message for name in refusal.when)
    assert refusal.message.endswith(f"use {refusal.instead}"), "say what to do"


@pytest.mark.parametrize("path", deepspeed_config.REFUSED, ids=".".join)
def test_a_raw_deepspeed_key_is_refused_in_both_places(path: tuple[str, ...]) -> None:
    value: Any = 1
    for key in reversed(path):
        value = {key: value}
    message = deepspeed_config.message(path, deepspeed_config.REFUSED[path])
    with pytest.raises(ValueError, match=re.escape(message)):
        FineTuneJob.from_object(broken("spec.deepspeed.config", value))
    node = deepspeed_config.schema()
    for key in path[:-1]:
        node = node["properties"][key]
    rules = {rule["rule"]: rule["message"] for rule in node[VALIDATIONS]}
    assert rules[f"!has(self.{path[-1]})"] == message
    assert path[-1] in node["properties"], "CEL sees only what the schema names"


def test_other_deepspeed_keys_pass_as_they_are() -> None:
    block = {"zero_optimization": {"zero_hpz_partition_size": 8, "offload_optimizer": {"pin_memory": False}}}
    job = FineTuneJob.from_object({**GOOD, "spec": {**GOOD["spec"], "deepspeed": {"zeroStage": 3, "config": block}}})
    assert job.to_wire()["spec"]["deepspeed"]["config"] == block
