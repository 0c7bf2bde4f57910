"""Generates the users' reference from the models: `python -m finetune_api.reference [--check]`.

Two pages: every field of a FineTuneJob with type, default and limits, and every failure reason with what follows from it.
"""

import sys
from pathlib import Path
from typing import Any

from finetune_api.base import VALIDATIONS
from finetune_api.crd import ROOT, custom_resource_definition
from finetune_api.reasons import FAILURES

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
        "`Restart` counts against `recovery.backoffLimit`; `RestartUncounted` does not; `Fail` ends the job at once.",
        "",
        "| reason | exit code | what follows | what to do |",
        "| --- | --- | --- | --- |",
    ]
    for reason, failure in FAILURES.items():
        code = "" if failure.exit_code is None else str(failure.exit_code)
        lines.append(f"| {reason.value} | {code} | {failure.recovery.value} | {_cell(failure.hint)} |")
    return NOTE + "\n".join(lines) + "\n"


PAGES = {ROOT / "docs" / "job-reference.md": fields_page, ROOT / "docs" / "failures.md": failures_page}


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
