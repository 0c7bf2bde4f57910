"""The real API server refuses what is wrong, and names the field and what is allowed."""

import pytest

from tests.contract.manifests import BAD, GOOD, manifest
from tests.e2e.cluster import Cluster
from tests.e2e.kube import KubectlError

pytestmark = pytest.mark.cluster


def test_good_manifest_is_taken(cluster: Cluster) -> None:
    assert "created" in cluster.kubectl.apply(GOOD, dry_run=True)


@pytest.mark.parametrize("case", BAD)
def test_refused(cluster: Cluster, case: str) -> None:
    with pytest.raises(KubectlError) as refusal:
        cluster.kubectl.apply(manifest(case), dry_run=True)
    for part in BAD[case].says:
        assert part in str(refusal.value)


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
