"""The operator of the cluster tests, with a Prometheus beside it."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from demo import ours
from demo.setup import forget_unfinished
from tests.chart import helm
from tests.e2e import volume
from tests.e2e.cluster import RELEASE, cluster_command, provider
from tests.e2e.kube import Kubectl
from tests.observability import discovery, prometheus, scrape

NAMESPACE = "finetune-observability"
INTERVAL = "1s"
MONITORS = {
    kind: {"enabled": True, "interval": INTERVAL, "scrapeTimeout": INTERVAL}
    for kind in ("serviceMonitor", "podMonitor")
}


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubectl]:
    """kubectl in a namespace of its own with an operator and a volume."""
    client = Kubectl(cluster_command("tool", "kubectl").strip(), cluster_command("up").strip(), NAMESPACE)
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    ours.make_namespace(client, NAMESPACE, labels, provider=provider())
    images = {
        target: cluster_command("image", "build", "--target", target).strip() for target in ("operator", "trainer")
    }
    for reference in images.values():
        cluster_command("image", "load", reference)
    values: dict[str, Any] = {
        "fullnameOverride": RELEASE,
        "image": _image(images["operator"]),
        "trainer": {"image": _image(images["trainer"])},
        # Another release of the cluster may manage the CRD.
        "crds": {"install": client("get", "crd", ours.CRD, "--ignore-not-found").strip() == ""},
    }
    forget_unfinished(client, RELEASE)
    _helm(client, "upgrade", "--install", RELEASE, str(helm.CHART), "-f", "-", "--wait", stdin=json.dumps(values))
    volume.fill(client, images["trainer"], tmp_path_factory.mktemp("volume") / "log")
    yield client
    client("delete", "finetunejobs", "--all", "--wait=true")
    _helm(client, "uninstall", RELEASE, "--wait")


@pytest.fixture(scope="module")
def scraping(kubectl: Kubectl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[prometheus.Prometheus]:
    """A Prometheus with the configuration that the chart's monitors stand for."""
    folder = tmp_path_factory.mktemp("prometheus")
    values = folder / "values.yaml"
    values.write_text(json.dumps({"fullnameOverride": RELEASE, "metrics": MONITORS}))
    rendered = helm.render(values=values, namespace=NAMESPACE)
    monitors = [body for body in rendered if body["kind"] in ("ServiceMonitor", "PodMonitor")]
    assert len(monitors) == 2
    config, discoveries = scrape.config(monitors, folder)
    with discovery.running(discoveries, kubectl), prometheus.running(config, folder) as found:
        yield found


def _image(reference: str) -> dict[str, str]:
    repository, tag = reference.rsplit(":", 1)
    return {"repository": repository, "tag": tag}


def _helm(kubectl: Kubectl, *arguments: str, stdin: str | None = None) -> str:
    command = [helm.binary(), "--kubeconfig", kubectl.kubeconfig, "--namespace", kubectl.namespace, *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return done.stdout
