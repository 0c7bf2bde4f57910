"""Fixtures of the cluster tests: a real cluster, the chart installed in it, and a volume with real weights and data.

Everything is set up once for the session, in a namespace that enforces the restricted Pod Security level; what an earlier
run left behind there, even one that was killed, is removed first. The images and the volume's contents are reused.
"""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from demo import ours
from demo.setup import RESTRICTED, forget_unfinished
from tests.e2e import volume
from tests.e2e.cluster import RELEASE, ROOT, Cluster, cluster_command, provider
from tests.e2e.kube import Kubectl
from tests.e2e.recovery_table import Row, render

NAMESPACE = "finetune-e2e"
CHART = ROOT / "charts" / "finetune-operator"
SECTIONS = pytest.StashKey[list[tuple[str, str]]]()
"""Titles and texts that are printed at the end of the run."""


@pytest.fixture(scope="session")
def kubeconfig() -> str:
    """Path of the cluster's kubeconfig; starts the cluster where none runs."""
    return cluster_command("up").strip()


@pytest.fixture(scope="session")
def images(kubeconfig: str) -> dict[str, str]:
    """References of the images, built and pushed where this version of them is not there yet."""
    references = {
        target: cluster_command("image", "build", "--target", target).strip() for target in ("operator", "trainer")
    }
    for reference in references.values():
        cluster_command("image", "load", reference)
    return references


@pytest.fixture(scope="session")
def kubectl(kubeconfig: str) -> Kubectl:
    """kubectl in the namespace of the tests, which is made or cleaned."""
    client = Kubectl(cluster_command("tool", "kubectl").strip(), kubeconfig, NAMESPACE)
    ours.make_namespace(client, NAMESPACE, RESTRICTED, provider=provider())
    return client


@pytest.fixture(scope="session")
def cluster(kubectl: Kubectl, images: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster with the operator installed and the volume filled."""
    helm = cluster_command("tool", "helm").strip()
    _install(helm, kubectl, images)
    kubectl("delete", "finetunejobs", "--all", "--wait=true")
    volume.fill(kubectl, images["trainer"], tmp_path_factory.mktemp("volume") / "log")
    made = Cluster(kubectl, helm, images)
    made.wait_operator()
    yield made
    kubectl("delete", "finetunejobs", "--all", "--wait=true")
    _run(helm, kubectl, "uninstall", RELEASE, "--wait")


def _install(helm: str, kubectl: Kubectl, images: dict[str, str]) -> None:
    """Installs the chart as a user would, with this checkout's images."""
    values: dict[str, Any] = {
        "fullnameOverride": RELEASE,
        "image": _image(images["operator"]),
        "trainer": {"image": _image(images["trainer"])},
        "crds": {"install": ours.may_own_crd(kubectl, provider=provider())},
    }
    forget_unfinished(kubectl, RELEASE)
    # The CRD that it may own may be the demo's.
    options = ["-f", "-", "--take-ownership", "--wait"]
    _run(helm, kubectl, "upgrade", "--install", RELEASE, str(CHART), *options, stdin=json.dumps(values))


def _image(reference: str) -> dict[str, str]:
    repository, tag = reference.rsplit(":", 1)
    return {"repository": repository, "tag": tag}


def _run(helm: str, kubectl: Kubectl, *arguments: str, stdin: str | None = None) -> None:
    command = [helm, "--kubeconfig", kubectl.kubeconfig, "--namespace", kubectl.namespace, *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="session")
def measurements(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What tests measured on the way; printed at the end."""
    found: dict[str, Any] = {}
    yield found
    request.config.stash.setdefault(SECTIONS, []).append(("measured", "\n".join(f"{k}: {v}" for k, v in found.items())))


@pytest.fixture(scope="session")
def recovery_table(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """One row for each disturbance; printed at the end."""
    rows: list[Row] = []
    yield rows
    request.config.stash.setdefault(SECTIONS, []).append(("recovery", render(rows)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints what was measured."""
    for title, text in config.stash.get(SECTIONS, []):
        terminalreporter.section(title)
        terminalreporter.write_line(text)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The lost node comes last in its module: a node that returns may need a moment."""
    items.sort(key=lambda item: "lost_node" in item.name)
