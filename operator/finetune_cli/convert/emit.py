"""Writes the manifest: a FineTuneJob in YAML, its notes in a comment above it."""

import re
from collections.abc import Iterable
from typing import Any

import yaml

API_VERSION = "finetune.dev/v1alpha1"
_ORDER = (
    "model",
    "datasets",
    "method",
    "adapter",
    "quantization",
    "freeze",
    "vision",
    "training",
    "deepspeed",
    "trainer",
    "checkpoint",
    "evaluation",
    "tracking",
    "output",
    "cache",
)
_NUMBER = re.compile(r"^[-+]?[0-9]")


class _Dumper(yaml.SafeDumper):
    """Decimal strings get double quotes: some YAML readers take `1e-8` for a number, others for a string."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = '"' if _NUMBER.match(value) else "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def manifest(name: str, namespace: str | None, spec: dict[str, Any]) -> dict[str, Any]:
    """The job as Kubernetes takes it, its blocks in the order of the reference."""
    return {
        "apiVersion": API_VERSION,
        "kind": "FineTuneJob",
        "metadata": {"name": name} | ({"namespace": namespace} if namespace else {}),
        "spec": {block: spec[block] for block in _ORDER if block in spec},
    }


def render(body: dict[str, Any], title: str, notes: Iterable[str]) -> str:
    """The manifest's text.

    Args:
        body: the manifest.
        title: the first line of the comment.
        notes: what a reader has to know, one line each.
    """
    comment = [f"# {title}", *(f"# - {' '.join(note.splitlines())}" for note in notes)]
    text = yaml.dump(body, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True, default_flow_style=False)
    return "\n".join(line.rstrip() for line in comment) + "\n" + text
