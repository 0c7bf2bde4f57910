"""The real API server refuses what is wrong, and names the field and what is allowed."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from finetune_api.job import API_VERSION, PLURAL
from tests.contract.manifests import BAD, GOOD, manifest
from tests.e2e.cluster import Cluster
from tests.e2e.kube import KubectlError

pytestmark = pytest.mark.cluster


def test_good_manifest_is_taken(cluster: Cluster) -> None:
    assert "created" in cluster.kubectl.apply(GOOD, dry_run=True)


@pytest.fixture(scope="module")
def proxy(cluster: Cluster) -> Iterator[str]:
    """Address of a `kubectl proxy`: a kubectl for each of a hundred manifests would take most of a minute to start."""
    with cluster.kubectl.proxy() as address:
        yield f"{address}/apis/{API_VERSION}/namespaces/{cluster.kubectl.namespace}/{PLURAL}?dryRun=All&fieldValidation=Strict"


@pytest.mark.parametrize("case", BAD)
def test_refused(proxy: str, case: str) -> None:
    request = urllib.request.Request(
        proxy, json.dumps(manifest(case)).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=30)
    message = json.load(refusal.value)["message"]
    for part in BAD[case].says:
        assert part in message


def test_immutable_fields(cluster: Cluster) -> None:
    kubectl = cluster.kubectl
    job = {**GOOD, "metadata": {"name": "immutable"}, "spec": {**GOOD["spec"], "suspend": True}}
    kubectl.apply(job)
    try:
        with pytest.raises(KubectlError, match="`model` cannot be changed once the job exists"):
            kubectl("patch", "ftj", "immutable", "--type=merge", "-p", '{"spec":{"model":{"uri":"pvc://other/x"}}}')
        kubectl("patch", "ftj", "immutable", "--type=merge", "-p", '{"spec":{"ttlSecondsAfterFinished":60}}')
        kubectl("patch", "ftj", "immutable", "--type=merge", "-p", '{"spec":{"recovery":{"backoffLimit":9}}}')
    finally:
        kubectl("delete", "ftj", "immutable")
