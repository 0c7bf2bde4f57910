"""`make down` in a cluster of somebody else's, which runs this operator already."""

import json
from typing import Any

import pytest

from demo import ours
from demo.commands import CommandError

MADE = {ours.LABEL: ours.VALUE}


class Cluster:
    """kubectl, as far as objects without a spec go."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.jobs: list[str] = []
        """The namespaces of jobs."""

    def put(self, kind: str, name: str, **metadata: Any) -> None:
        self.objects[kind, name] = {"metadata": {"name": name, **metadata}}

    def release(self, namespace: str, *, owns_crd: bool = False) -> None:
        """A release of the chart in a namespace."""
        for role in ("viewer", "editor"):
            labels = {"app.kubernetes.io/name": "finetune-operator"}
            self.put("clusterrole", f"{namespace}:finetune-operator:{role}", labels=labels)
        if owns_crd:
            owner = {"meta.helm.sh/release-namespace": namespace, "meta.helm.sh/release-name": ours.RELEASE}
            self.put("customresourcedefinition", ours.CRD, annotations=owner)

    def names(self, kind: str) -> set[str]:
        return {name for of, name in self.objects if of == kind}

    def __call__(self, verb: str, *arguments: str, stdin: str | None = None) -> str:
        if verb == "apply":
            body = json.loads(stdin or "")
            self.put("namespace", **body["metadata"])
            return ""
        kind, *names = (argument for argument in arguments if not argument.startswith("--"))
        if verb == "delete":
            assert "-l" not in names
            for name in names:
                self.objects.pop((kind, name), None)
            return ""
        if kind == ours.CRD:
            return json.dumps({"items": [{"metadata": {"namespace": namespace}} for namespace in self.jobs]})
        if kind == "namespaces":
            found = [self.objects["namespace", name] for name in sorted(self.names("namespace"))]
            return json.dumps({"items": [body for body in found if body["metadata"].get("labels") == MADE]})
        found_one = self.objects.get((kind, names[0]))
        return json.dumps(found_one) if found_one else ""


def test_what_others_have_is_left_alone() -> None:
    """Their release has the names of ours, in a namespace of that name."""
    cluster = Cluster()
    for namespace in ("finetune", "ml-team"):
        cluster.put("namespace", namespace)
        cluster.release(namespace, owns_crd=namespace == "finetune")
    cluster.jobs = ["ml-team"]
    before = dict(cluster.objects)
    assert ours.remove(cluster) == []
    assert cluster.objects == before


def test_what_is_ours_is_removed() -> None:
    cluster = Cluster()
    for namespace in ours.NAMESPACES:
        ours.make_namespace(cluster, namespace, {}, provider="kubeconfig")
    cluster.release("finetune")
    cluster.release("finetune-e2e", owns_crd=True)
    cluster.put("namespace", "ml-team")
    cluster.release("ml-team")
    cluster.jobs = ["finetune", "finetune-e2e"]
    assert ours.remove(cluster) == []
    assert cluster.names("namespace") == {"ml-team"}
    assert cluster.names("clusterrole") == {"ml-team:finetune-operator:viewer", "ml-team:finetune-operator:editor"}
    assert cluster.names("customresourcedefinition") == set()


def test_our_crd_stays_with_the_jobs_of_others() -> None:
    cluster = Cluster()
    ours.make_namespace(cluster, "finetune", {}, provider="kubeconfig")
    cluster.release("finetune", owns_crd=True)
    cluster.jobs = ["finetune", "ml-team"]
    (kept,) = ours.remove(cluster)
    assert "ml-team" in kept
    assert cluster.names("customresourcedefinition") == {ours.CRD}
    assert cluster.names("namespace") == set()


def test_a_namespace_of_others_is_not_taken_over() -> None:
    cluster = Cluster()
    cluster.put("namespace", "finetune")
    with pytest.raises(CommandError, match="namespace finetune"):
        ours.make_namespace(cluster, "finetune", {}, provider="kubeconfig")
    assert "labels" not in cluster.objects["namespace", "finetune"]["metadata"]
    ours.make_namespace(cluster, "finetune", {}, provider="built")
    assert cluster.objects["namespace", "finetune"]["metadata"]["labels"] == MADE


@pytest.mark.parametrize(
    ("owner", "provider", "ours_to_replace"),
    [
        (None, "kubeconfig", True),
        ("finetune", "kubeconfig", True),
        ("ml-team", "kubeconfig", False),
        ("ml-team", "built", True),
    ],
    ids=["none", "ours", "theirs", "cluster is ours"],
)
def test_who_may_own_the_crd(owner: str | None, provider: str, ours_to_replace: bool) -> None:
    cluster = Cluster()
    ours.make_namespace(cluster, "finetune", {}, provider=provider)
    if owner:
        cluster.release(owner, owns_crd=True)
    assert ours.may_own_crd(cluster, provider=provider) is ours_to_replace
