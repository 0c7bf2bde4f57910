"""Runs helm on the chart."""

import functools
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.cluster import ROOT, cluster_command

CHART = ROOT / "charts" / "finetune-operator"
VALUES = sorted((Path(__file__).parent / "values").glob("*.yaml"))
NAMESPACE = "chart-test"


@functools.cache
def binary() -> str:
    """Path of helm."""
    return cluster_command("tool", "helm").strip()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs helm, whatever its exit status."""
    return subprocess.run([binary(), *arguments], capture_output=True, text=True, timeout=60, check=False)


def render(*arguments: str, values: Path | None = None, namespace: str = NAMESPACE) -> list[dict[str, Any]]:
    """The objects of `helm template`."""
    return [body for body in yaml.safe_load_all(_template(arguments, values, namespace)) if body]


@functools.cache
def _template(arguments: tuple[str, ...], values: Path | None, namespace: str) -> str:
    files = ["--values", str(values)] if values else []
    done = run("template", "finetune-operator", str(CHART), "--namespace", namespace, *files, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def one(objects: list[dict[str, Any]], kind: str, name: str | None = None) -> dict[str, Any]:
    """The only object of a kind (and name)."""
    found = [body for body in objects if body["kind"] == kind and name in (None, body["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} objects of kind {kind}"
    return found[0]
