"""A manifest is refused here as the API server refuses it, with file and line."""

import json
from typing import Any

import pytest

from finetune_api import crd
from finetune_api.base import VALIDATIONS
from finetune_cli.manifest import ManifestError, parse
from finetune_operator.local import admission
from tests.contract.manifests import BAD, CHANGES, GOOD, after, before, manifest


@pytest.mark.parametrize("case", BAD)
def test_refused_with_the_words_of_the_api_server(case: str) -> None:
    """The table of tests/e2e/test_manifests.py, which asks the real one."""
    document = parse(json.dumps(manifest(case), indent=1), "job.yaml")
    with pytest.raises(ManifestError) as refusal:
        document.admit()
    for part in BAD[case].says:
        assert part in str(refusal.value)
    line = int(str(refusal.value).split(":")[1])
    assert line >= 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": 12}, "metadata.name: must be of type string, got `12`"),
        ({"namespace": 123}, "metadata.namespace: must be of type string, got `123`"),
    ],
)
def test_names_are_texts(change: dict[str, Any], says: str) -> None:
    body = {**GOOD, "metadata": {**GOOD["metadata"], "labels": {"team": "a"}, **change}}
    assert [str(violation) for violation in admission.admit(body)[1]] == [says]


def test_a_key_that_is_no_text_is_refused_with_its_line() -> None:
    with pytest.raises(ManifestError, match=r"job.yaml:2: a key must be a text, not a list or a mapping"):
        parse("kind: FineTuneJob\n? [a]\n: 1\n", "job.yaml")


def test_a_quantity_beyond_all_numbers_is_compared_all_the_same() -> None:
    assert admission._quantity("1e400") == float("inf") and admission._quantity("1500m") == 1.5
    assert admission._quantity("2Gi") == 2**31 and admission._quantity("1e3") == 1000


def test_good_manifest_gets_the_defaults_of_the_crd() -> None:
    taken, violations = admission.admit(GOOD)
    assert violations == []
    assert taken["spec"]["training"]["scheduler"] == "Cosine" and taken["spec"]["adapter"]["dropout"] == "0"
    assert "status" not in taken and "eval" not in taken["spec"]["training"]


def _all_rules(node: dict[str, Any]) -> set[tuple[str, str]]:
    found = {(entry["rule"], entry["message"]) for entry in node.get(VALIDATIONS, [])}
    children = [*node.get("properties", {}).values(), node.get("items"), node.get("additionalProperties")]
    return found.union(*(_all_rules(child) for child in children if isinstance(child, dict)))


def test_every_cel_rule_has_refused_something() -> None:
    """A rule that this evaluator cannot read, or that no case of the table breaks, would be found by a user."""
    root = crd.custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    rules = {message for _, message in _all_rules(root)}
    seen = {v.message for case in BAD for v in admission.admit(manifest(case))[1]}
    seen |= {v.message for change in CHANGES.values() for v in admission.admit(after(change), before(change))[1]}
    unseen = {message for message in rules if not any(text.startswith(message) for text in seen)}
    assert unseen == set(), "add a case to tests/contract/manifests.py"


@pytest.mark.parametrize("case", CHANGES)
def test_what_may_not_change_is_refused_as_on_an_update(case: str) -> None:
    """The table of tests/e2e/test_manifests.py, too."""
    change = CHANGES[case]
    old, _ = admission.admit(before(change))
    said = "\n".join(map(str, admission.admit(after(change), old)[1]))
    assert bool(said) == bool(change.says), said
    for part in change.says:
        assert part in said


TEXT = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: tune}
spec:
  model: {uri: pvc://a/model}
  datasets:
    train:
      - uri: pvc://a/train.jsonl
        maxSamples: 0
  training:
    learningRate: 1e-4
    batchsize: 3
    gradAccum: 2
  output: {uri: pvc://a/out}
  zeroStage: 2
"""


def test_every_mistake_is_told_with_its_line_and_the_nearest_name() -> None:
    with pytest.raises(ManifestError) as told:
        parse(TEXT, "job.yaml").admit()
    lines = str(told.value).splitlines()
    assert 'job.yaml:12: spec.training.batchsize: unknown field "spec.training.batchsize"; did you mean' in lines[0]
    assert "microBatchSize" in lines[0]
    assert any(line.startswith("job.yaml:13: spec.training.gradAccum: unknown field") for line in lines)
    assert any(line.startswith("job.yaml:15:") and "did you mean `spec.deepspeed.zeroStage`?" in line for line in lines)
    assert any(line.startswith("job.yaml:9: spec.datasets.train[0].maxSamples:") for line in lines)
    # `1e-4` without quotes is a number to kubectl, and text to PyYAML.
    assert any(line.startswith("job.yaml:11: spec.training.learningRate: must be of type string") for line in lines)


NOT_ONE_JOB = {
    "syntax": ("kind: [", "f.yaml:1: not YAML"),
    "twice": ("kind: A\nspec: {}\nkind: B\n", "f.yaml:3: kind: stands here twice"),
    "none": ("---\nkind: Secret\n", "f.yaml:2: one FineTuneJob is needed, the file has none"),
    "empty": ("", "f.yaml:1: one FineTuneJob is needed"),
    "two": ("kind: FineTuneJob\n---\nkind: FineTuneJob\n", "the file has 2 of them"),
    "version": (
        "kind: FineTuneJob\napiVersion: v1\n",
        "f.yaml:2: apiVersion: must be `finetune.dev/v1alpha1`, got `v1`",
    ),
}


@pytest.mark.parametrize(("text", "says"), NOT_ONE_JOB.values(), ids=NOT_ONE_JOB)
def test_a_file_without_exactly_one_job_is_refused(text: str, says: str) -> None:
    with pytest.raises(ManifestError) as told:
        parse(text, "f.yaml")
    assert says in str(told.value)


def test_scalars_and_merges_mean_what_they_mean_to_kubectl() -> None:
    text = (
        "kind: FineTuneJob\napiVersion: finetune.dev/v1alpha1\n"
        "x: &base {a: 1, b: 2}\ny: {<<: *base, b: 3}\ndate: 2026-01-01\ntime: 1:30\nnumber: 1e-4\nhex: 0x10\nyes: yes\nno:\n"
        "---\nkind: Secret\n"
    )
    document = parse(text, "f")
    assert document.body["y"] == {"a": 1, "b": 3}
    assert {key: document.body[key] for key in ("date", "time", "number", "hex", "yes", "no")} == {
        "date": "2026-01-01",
        "time": "1:30",
        "number": 1e-4,
        "hex": 16,
        "yes": True,
        "no": None,
    }
    assert document.skipped == ("Secret",)
