"""What the demo and the tests make in a cluster, and so may replace and remove. Standard library only.

The cluster may be somebody else's and run this operator already, in a namespace of the same name: only a label on the
namespace tells whose it is.
"""

import json
from typing import Any, Protocol

from demo.commands import CommandError

RELEASE = "finetune-operator"
CRD = "finetunejobs.finetune.dev"
NAMESPACES = ("finetune", "finetune-e2e", "finetune-observability", "chart-test", "chart-test-team")
"""All that the demo and the tests make."""
LABEL, VALUE = "finetune.dev/made-by", "make"


class Kubectl(Protocol):
    """kubectl of the demo or of the tests."""

    def __call__(self, *arguments: str, stdin: str | None = None) -> str: ...


def make_namespace(kubectl: Kubectl, name: str, labels: dict[str, str], *, provider: str) -> None:
    """Makes a namespace and marks it as ours.

    Raises:
        CommandError: it was there before, in a cluster that was there before.
    """
    found = _find(kubectl, "namespace", name)
    if provider == "kubeconfig" and found is not None and not _is_marked(found):
        raise CommandError(
            f"namespace {name} was there before, and may be somebody else's",
            f"use another cluster; if it is yours to be removed by `make down`: kubectl label namespace {name} {LABEL}={VALUE}",
        )
    metadata = {"name": name, "labels": {**labels, LABEL: VALUE}}
    manifest = {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}
    kubectl("apply", "-f", "-", stdin=json.dumps(manifest))


def may_own_crd(kubectl: Kubectl, *, provider: str) -> bool:
    """Whether a release of ours may make or replace the CRD: in a cluster of others it may be theirs."""
    found = _find(kubectl, "customresourcedefinition", CRD)
    return found is None or provider != "kubeconfig" or _is_release_of(found, _marked(kubectl))


def remove(kubectl: Kubectl) -> list[str]:
    """Leaves a cluster that is not ours as it was; returns what is kept and why.

    The namespaces go last: while they are there, they tell what is ours, also to one who tries again.
    """
    ours, kept = _marked(kubectl), list[str]()
    for namespace in ours:
        roles = [f"{namespace}:{RELEASE}:{role}" for role in ("viewer", "editor")]
        kubectl("delete", "clusterrole", *roles, "--ignore-not-found")
    crd = _find(kubectl, "customresourcedefinition", CRD)
    if crd is not None and _is_release_of(crd, ours):
        jobs = json.loads(kubectl("get", CRD, "--all-namespaces", "-o", "json"))["items"]
        others = sorted({job["metadata"]["namespace"] for job in jobs} - set(ours))
        if others:
            kept.append(
                f"CRD {CRD}: there are jobs in {', '.join(others)}; when they are gone: kubectl delete crd {CRD}"
            )
        else:
            kubectl("delete", "customresourcedefinition", CRD, "--ignore-not-found")
    for namespace in ours:
        kubectl("delete", "namespace", namespace, "--ignore-not-found", "--wait=true")
    return kept


def _marked(kubectl: Kubectl) -> list[str]:
    listed = json.loads(kubectl("get", "namespaces", "-l", f"{LABEL}={VALUE}", "-o", "json"))["items"]
    names = {namespace["metadata"]["name"] for namespace in listed}
    return [name for name in NAMESPACES if name in names]


def _is_marked(body: dict[str, Any]) -> bool:
    return bool(body["metadata"].get("labels", {}).get(LABEL) == VALUE)


def _is_release_of(body: dict[str, Any], namespaces: list[str]) -> bool:
    annotations = body["metadata"].get("annotations", {})
    namespace, name = (annotations.get(f"meta.helm.sh/release-{key}") for key in ("namespace", "name"))
    return namespace in namespaces and name == RELEASE


def _find(kubectl: Kubectl, kind: str, name: str) -> dict[str, Any] | None:
    text = kubectl("get", kind, name, "-o", "json", "--ignore-not-found")
    found: dict[str, Any] | None = json.loads(text) if text.strip() else None
    return found
