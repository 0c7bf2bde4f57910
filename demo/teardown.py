"""`make down`: removes what the other targets started. Standard library only."""

import json
import sys
from collections.abc import Sequence

from demo.commands import CommandError, run
from demo.kube import Kubectl
from demo.preflight import cache_dir
from demo.setup import CRD, NAMESPACE

NAMESPACES = (NAMESPACE, "finetune-e2e", "finetune-observability", "chart-test", "chart-test-team")
"""All that the demo and the tests make."""


def down(arguments: Sequence[str]) -> int:
    """Removes the cluster or, from a cluster that was there before, everything of ours; returns the exit status.

    Args:
        arguments: of `python3 -m cluster down`, such as `--purge`.
    """
    log = cache_dir() / "log" / "down.log"
    cluster = [sys.executable, "-m", "cluster"]
    try:
        info = json.loads(run([*cluster, "info"], log))
        if info["provider"] == "kubeconfig" and info["running"]:
            binary = run([*cluster, "tool", "kubectl"], log).strip()
            _clean(Kubectl(binary, info["kubeconfig"], NAMESPACE, log))
        run([*cluster, "down", *arguments], log)
        kept = "" if "--purge" in arguments else f"; what was built and downloaded stays in {cache_dir()}"
        print(f"down: nothing of ours runs any more{kept}")
    except CommandError as error:
        print(f"failed: {error}\n  log: {log}", file=sys.stderr)
        return 1
    return 0


def _clean(kubectl: Kubectl) -> None:
    """Leaves a cluster that is not ours as it was: no namespace, role or CRD of ours in it."""
    for namespace in NAMESPACES:
        kubectl("delete", "namespace", namespace, "--ignore-not-found", "--wait=true")
    for kind in ("clusterrole", "clusterrolebinding"):
        kubectl("delete", kind, "-l", "app.kubernetes.io/name=finetune-operator")
    kubectl("delete", "crd", CRD, "--ignore-not-found")
