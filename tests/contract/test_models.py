"""The models and what is generated from them; no cluster."""

from typing import Any

import pytest
from pydantic import ValidationError

from finetune_api import crd, reference
from finetune_api.base import VALIDATIONS
from finetune_api.job import FineTuneJob
from finetune_api.reasons import EXIT_CODES, FAILURES, Reason
from finetune_api.reports import TERMINATION_MESSAGE_LIMIT_BYTES, TRACEBACK_LIMIT, TerminationReport
from tests.contract.manifests import GOOD, broken


def test_committed_crds_equal_the_models() -> None:
    stale = [path.name for path in crd.TARGETS if path.read_text() != crd.render()]
    assert not stale, "run `make generate`"


def test_committed_reference_equals_the_models() -> None:
    stale = [path.name for path, render in reference.PAGES.items() if path.read_text() != render()]
    assert not stale, "run `make generate`"


def test_good_manifest_round_trips() -> None:
    job = FineTuneJob.from_object(GOOD)
    again = FineTuneJob.from_object(job.to_wire())
    assert again == job
    assert job.spec.training.scheduler == "Cosine"


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("spec.model.uri", "s3://bucket", "hf://org/name"),
        ("spec.model.uri", "pvc://claim/a/../b", "without `..`"),
        ("spec.training.learningRate", "fast", "decimal number"),
        ("spec.adapter.dropout", "1", "not including, 1"),
        ("spec.training.batchSize", 4, "Extra inputs"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_python_refuses_what_the_api_server_refuses(path: str, value: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says.replace("[", r"\[")):
        FineTuneJob.from_object(broken(path, value))


def test_every_reason_has_a_row_and_exit_codes_are_unique() -> None:
    assert set(FAILURES) == set(Reason)
    assert len(EXIT_CODES) == sum(failure.exit_code is not None for failure in FAILURES.values())
    assert all(failure.hint.endswith(".") for failure in FAILURES.values())


def test_largest_termination_report_fits() -> None:
    report = TerminationReport(
        reason=Reason.CODE_ERROR, message="m" * 1500, traceback="t" * TRACEBACK_LIMIT, step=10**9
    )
    assert len(report.to_json().encode()) <= TERMINATION_MESSAGE_LIMIT_BYTES


def _walk(node: dict[str, Any], path: str = "spec") -> list[tuple[str, dict[str, Any]]]:
    found = [(path, node)]
    for name, child in node.get("properties", {}).items():
        found += _walk(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            found += _walk(node[key], f"{path}[]")
    return found


def test_schema_is_bounded_and_described() -> None:
    root = crd.custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for path, node in _walk(root["properties"]["spec"]):
        if node.get("type") == "string" and "enum" not in node:
            assert "maxLength" in node, f"{path} needs a maximum length"
        if node.get("type") == "array":
            assert "maxItems" in node, f"{path} needs a maximum number of items"
        assert node.get("type") != "number" or ".config." in path, f"{path}: no floats in spec"
        if path.count(".") and not path.endswith("[]"):
            assert node.get("description"), f"{path} needs a description"
        for rule in node.get(VALIDATIONS, []):
            assert rule["message"], f"{path}: a rule without a message"
