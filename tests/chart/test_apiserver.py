"""Every rendered object, checked by a real API server: its schemas, admission, and the restricted Pod Security level."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from demo import ours
from tests.chart.helm import NAMESPACE, VALUES, render
from tests.e2e.cluster import cluster_command, provider
from tests.e2e.kube import Kubectl

NAMESPACES = (NAMESPACE, "chart-test-team")
RESTRICTED = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
MONITORS = json.loads((Path(__file__).parent / "schemas" / "monitors.json").read_text())


@pytest.fixture(scope="module")
def kubectl() -> Iterator[Kubectl]:
    kubeconfig = cluster_command("up").strip()
    client = Kubectl(cluster_command("tool", "kubectl").strip(), kubeconfig, NAMESPACE)
    for name in NAMESPACES:
        ours.make_namespace(client, name, RESTRICTED, provider=provider())
    yield client
    client("delete", "namespace", *NAMESPACES, "--wait=false")


@pytest.mark.cluster
@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_the_api_server_takes_every_object(kubectl: Kubectl, values: Path) -> None:
    """A server-side dry run, with unknown fields refused; warnings (deprecations, Pod Security) count as failures."""
    for body in render(values=values):
        if body["apiVersion"].startswith("monitoring.coreos.com/"):
            continue
        warnings = _dry_run(kubectl, body)
        assert warnings == "", f"{body['kind']} {body['metadata']['name']}: {warnings}"


def _dry_run(kubectl: Kubectl, body: dict[str, Any]) -> str:
    options = ["--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict"]
    namespace = body["metadata"].get("namespace", NAMESPACE)
    done = subprocess.run(
        [kubectl.binary, "--kubeconfig", kubectl.kubeconfig, "--namespace", namespace, "apply", *options, "-f", "-"],
        input=json.dumps(body),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{body['kind']} {body['metadata']['name']}: {done.stderr}"
    return done.stderr


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_monitors_fit_their_schema(values: Path) -> None:
    for body in render(values=values):
        if body["apiVersion"].startswith("monitoring.coreos.com/"):
            jsonschema.validate(body, MONITORS)
