"""The real API server refuses what is wrong, and names the field and what is allowed."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_api.job import API_VERSION, PLURAL
from tests.contract.manifests import BAD, CHANGES, GOOD, before, manifest
from tests.e2e.cluster import Cluster

pytestmark = pytest.mark.cluster


def test_good_manifest_is_taken(cluster: Cluster) -> None:
    assert "created" in cluster.kubectl.apply(GOOD, dry_run=True)


@pytest.fixture(scope="module")
def jobs(cluster: Cluster) -> Iterator[str]:
    """The jobs' address, by a `kubectl proxy`: a kubectl for each of a hundred manifests would take most of a minute to start."""
    with cluster.kubectl.proxy() as address:
        yield f"{address}/apis/{API_VERSION}/namespaces/{cluster.kubectl.namespace}/{PLURAL}"


def send(method: str, url: str, body: dict[str, Any], kind: str = "application/json") -> str:
    """What the API server says against it; empty if it has taken it."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": kind}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30):
            return ""
    except urllib.error.HTTPError as refusal:
        message: str = json.load(refusal)["message"]
        return message


@pytest.mark.parametrize("case", BAD)
def test_refused(jobs: str, case: str) -> None:
    message = send("POST", f"{jobs}?dryRun=All&fieldValidation=Strict", manifest(case))
    assert message
    for part in BAD[case].says:
        assert part in message


@pytest.mark.parametrize("case", CHANGES)
def test_changed(jobs: str, case: str) -> None:
    change = CHANGES[case]
    old = before(change)
    assert send("POST", jobs, old) == ""
    try:
        url = f"{jobs}/{old['metadata']['name']}"
        message = send("PATCH", f"{url}?dryRun=All", {"spec": change.new}, "application/merge-patch+json")
    finally:
        assert send("DELETE", url, {}) == ""
    assert bool(message) == bool(change.says), message
    for part in change.says:
        assert part in message
