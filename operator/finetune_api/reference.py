"""Generates the users' reference from the models: `python -m finetune_api.reference [--check]`.

Three pages: every field of a FineTuneJob with type, default and limits, every failure reason with what follows from it, and which
choices go together.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune_api.base import VALIDATIONS
from finetune_api.combinations import FIELDS, REFUSALS, Combination, check
from finetune_api.crd import ROOT, custom_resource_definition
from finetune_api.reasons import FAILURES
from finetune_api.spec import ActivationCheckpointing, AdapterVariant, Method, Offload, Optimizer, Precision, ZeroStage

NOTE = "<!-- Generated from operator/finetune_api by `make generate`. Do not edit. -->\n\n"


def fields_page() -> str:
    """The page of all spec and status fields, as Markdown."""
    schema = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    lines = [
        "# FineTuneJob, field by field",
        "",
        "`kubectl explain ftj.spec.training` prints the same from the cluster.",
    ]
    for block in ("spec", "status"):
        lines += ["", f"## {block}", "", "| field | type | default | what it is |", "| --- | --- | --- | --- |"]
        lines += _rows(schema["properties"][block], block)
        lines += ["", *_rules(schema["properties"][block], block)]
    return NOTE + "\n".join(lines).rstrip() + "\n"


def failures_page() -> str:
    """The page of all failure reasons, as Markdown."""
    lines = [
        "# Why an attempt ended, and what follows",
        "",
        "`Restart` counts against `recovery.backoffLimit`; `RestartUncounted` does not; `Fail` ends the job at once; with `Wait`",
        "nothing ends, and the job goes on by itself once the cause is gone. See also",
        "[where the log is](recovery.md#where-the-log-is).",
        "",
        "| reason | exit code | what follows | what to do |",
        "| --- | --- | --- | --- |",
    ]
    for reason, failure in FAILURES.items():
        code = "" if failure.exit_code is None else str(failure.exit_code)
        lines.append(f"| {reason.value} | {code} | {failure.recovery.value} | {_cell(failure.hint)} |")
    return NOTE + "\n".join(lines) + "\n"


CHOICES: dict[str, tuple[Any, ...]] = {
    "method": tuple(map(str, Method)),
    "variant": tuple(map(str, AdapterVariant)),
    "zero_stage": tuple(map(int, ZeroStage)),
    "offload_optimizer": tuple(map(str, Offload)),
    "offload_parameters": tuple(map(str, Offload)),
    "precision": tuple(map(str, Precision)),
    "optimizer": tuple(map(str, Optimizer)),
    "activation_checkpointing": tuple(map(str, ActivationCheckpointing)),
}
"""Every value of every choice that is combined."""


def combinations_page() -> str:
    """The page of combinations: what is refused and why, and each pair of choices as a cell."""
    lines = [
        "# Which choices go together",
        "",
        "A refused combination is refused when the job is applied, with the reason. Everything else trains:",
        "`benchmarks/combinations.py` runs two steps of each on the machine that it is started on.",
        "",
        "| refused | because |",
        "| --- | --- |",
    ]
    for refusal in REFUSALS:
        said = ", ".join(f"`{FIELDS[name]}: {' / '.join(map(str, values))}`" for name, values in refusal.when.items())
        lines.append(f"| {said} | {_cell(refusal.explanation)} |")
    lines += [
        "| `deepspeed.offloadOptimizer: CPU`, `deepspeed.zeroStage: 0` | there is no partition to offload |",
        "| `deepspeed.offloadParameters: CPU`, `deepspeed.zeroStage: 0 / 1 / 2` | only ZeRO-3 partitions parameters |",
        "",
        "## With each ZeRO stage",
        "",
        *_pairs("zero_stage"),
        "",
        "## With the optimizer's state on the CPU (`deepspeed.offloadOptimizer: CPU`)",
        "",
        *_pairs("offload_optimizer"),
        "",
        "## What is the same whatever the choice",
        "",
        "- With `precision: PureBF16` the 8-bit optimizers keep their scales in float32, and `PagedAdamW` its moments.",
        "- `PureBF16` rounds each update to bfloat16, as LLaMA-Factory's `pure_bf16` does: an update below half a bit of a",
        "  weight is lost. Prefer `BF16` where memory allows.",
        "- On a CPU the paged optimizers do not page, and say so; they compute the same.",
        "- A vision tower and a projector (`vision`) are trained or frozen with every one of these, packed or not:",
        "  `benchmarks/combinations.py --sees` runs them.",
    ]
    return NOTE + "\n".join(lines) + "\n"


def _pairs(column: str) -> list[str]:
    columns = CHOICES[column]
    rows = [f"| `{FIELDS[column]}` | {' | '.join(map(str, columns))} |", "| --- |" + " --- |" * len(columns)]
    for name, values in CHOICES.items():
        if name in (column, "zero_stage", "offload_optimizer", "offload_parameters"):
            continue
        for value in values:
            cells = ["refused" if check(_pair(column, at, name, value)) else "yes" for at in columns]
            rows.append(f"| `{FIELDS[name]}: {value}` | {' | '.join(cells)} |")
    return rows


def _pair(column: str, at: Any, name: str, value: Any) -> Combination:
    return replace(Combination(), **{column: at, name: value})


PAGES = {
    ROOT / "docs" / "job-reference.md": fields_page,
    ROOT / "docs" / "failures.md": failures_page,
    ROOT / "docs" / "combinations.md": combinations_page,
}


def _rows(node: dict[str, Any], path: str) -> list[str]:
    rows = []
    for name, child in node.get("properties", {}).items():
        here = f"{path}.{name}"
        required = " (required)" if name in node.get("required", []) else ""
        rows.append(
            f"| `{here}` | {_type(child)} | {_default(child)} | {_cell(child.get('description', ''))}{required} |"
        )
        if child.get("x-kubernetes-preserve-unknown-fields"):
            continue
        inner = child.get("items", child)
        rows += _rows(inner, here + ("[]" if "items" in child else ""))
    return rows


def _rules(node: dict[str, Any], path: str) -> list[str]:
    found = [f"- `{path}`: {rule['message']}" for rule in node.get(VALIDATIONS, []) if "properties" in node]
    for name, child in node.get("properties", {}).items():
        found += _rules(child.get("items", child), f"{path}.{name}")
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _type(node: dict[str, Any]) -> str:
    if "enum" in node:
        return " \\| ".join(str(value) for value in node["enum"])
    if node.get("x-kubernetes-int-or-string"):
        return "quantity"
    if "items" in node:
        return f"list of {_type(node['items'])}"
    if "additionalProperties" in node:
        return f"map of {_type(node['additionalProperties'])}"
    bounds = ""
    if "minimum" in node or "maximum" in node:
        bounds = f" {node.get('minimum', '')}..{node.get('maximum', '')}"
    return str(node.get("format", node["type"])) + bounds


def _default(node: dict[str, Any]) -> str:
    default = node.get("default")
    return "" if default is None or isinstance(default, dict) else f"`{default}`"


def main(arguments: list[str]) -> int:
    """Writes the pages, or with `--check` says which of them are stale."""
    stale: list[Path] = []
    for path, render in PAGES.items():
        text = render()
        if path.exists() and path.read_text() == text:
            continue
        stale.append(path)
        if "--check" not in arguments:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for path in stale:
        print(f"{'stale, run `make generate`' if '--check' in arguments else 'wrote'}: {path.relative_to(ROOT)}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
