"""Which cluster is used: the one of $KUBECONFIG, kind where a Docker engine answers, else the built one."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from cluster import built, shell, tools
from cluster.console import step
from cluster.errors import ClusterError
from cluster.settings import Settings

KIND_CONFIG = """kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
nodes: [{role: control-plane}, {role: worker}, {role: worker}]
"""


class Provider(StrEnum):
    """Where the cluster comes from."""

    KUBECONFIG = "kubeconfig"
    KIND = "kind"
    BUILT = "built"


@dataclass(frozen=True)
class Choice:
    """The provider, and the kubeconfig where it is known before anything starts."""

    provider: Provider
    kubeconfig: Path


def choose(settings: Settings) -> Choice:
    """Returns the first provider that works; FINETUNE_CLUSTER_PROVIDER names one instead.

    Raises:
        ClusterError: The one that was named does not exist.
    """
    forced = os.environ.get("FINETUNE_CLUSTER_PROVIDER")
    if forced and forced not in list(Provider):
        raise ClusterError(f"FINETUNE_CLUSTER_PROVIDER: must be one of {', '.join(Provider)}, got `{forced}`")
    own = Path(os.environ.get("KUBECONFIG", "")).expanduser()
    is_ours = own.resolve() == settings.kubeconfig.resolve()
    if forced in (None, Provider.KUBECONFIG) and own.is_file() and not is_ours and _reachable(settings, own):
        return Choice(Provider.KUBECONFIG, own)
    if forced == Provider.KUBECONFIG:
        raise ClusterError(f"KUBECONFIG: no API server answers through `{own}`", hint="unset it, or fix it")
    if forced == Provider.KIND or (forced is None and _docker_answers()):
        return Choice(Provider.KIND, settings.state.with_name(f"kind-{settings.name}.kubeconfig"))
    return Choice(Provider.BUILT, settings.kubeconfig)


def up(settings: Settings) -> Path:
    """Makes sure that a cluster runs, and returns its kubeconfig."""
    choice = choose(settings)
    if choice.provider is Provider.BUILT:
        return built.up(settings)
    if choice.provider is Provider.KIND:
        _kind_up(settings, choice.kubeconfig)
    return choice.kubeconfig


def down(settings: Settings, *, purge: bool) -> None:
    """Removes what `up` made; a cluster that was there before is left alone."""
    if choose(settings).provider is Provider.KIND and settings.name in _kind_clusters():
        shell.run(["kind", "delete", "cluster", "--name", settings.name])
    # Whatever the provider is today, a built instance of an earlier day goes as well.
    built.down(settings, purge=purge)


def info(settings: Settings) -> dict[str, Any]:
    """Returns what scripts need to know of the cluster."""
    choice = choose(settings)
    is_built = choice.provider is Provider.BUILT
    return {
        "provider": choice.provider.value,
        "kubeconfig": str(choice.kubeconfig),
        "running": built.is_running(settings) if is_built else _reachable(settings, choice.kubeconfig),
        "registry": settings.registry if is_built else os.environ.get("IMAGE_REGISTRY"),
        "nodes": [n.name for n in settings.nodes] if is_built else _node_names(settings, choice.kubeconfig),
        "state_dir": str(settings.state) if is_built else None,
        "volume_dir": str(settings.volumes) if is_built else None,
    }


def status(settings: Settings) -> str:
    """Returns a table of the built cluster's parts, or where else the cluster comes from."""
    choice = choose(settings)
    if choice.provider is Provider.BUILT:
        return built.status(settings)
    return f"the cluster comes from `{choice.provider}`: kubectl --kubeconfig={choice.kubeconfig} get nodes"


def change_node(settings: Settings, action: str, name: str) -> None:
    """Stops, kills or starts a node of the built cluster.

    Raises:
        ClusterError: The cluster is not the built one.
    """
    provider = choose(settings).provider
    if provider is not Provider.BUILT:
        raise ClusterError(
            f"`node {action}` works on the built cluster only, and this one comes from `{provider}`",
            hint="FINETUNE_CLUSTER_PROVIDER=built python3 -m cluster up",
        )
    built.change_node(settings, action, name)


def _kind_up(settings: Settings, kubeconfig: Path) -> None:
    if shutil.which("kind") is None:
        raise ClusterError(
            "a Docker engine answers, but `kind` is not installed",
            hint="install kind (https://kind.sigs.k8s.io), or set FINETUNE_CLUSTER_PROVIDER=built",
        )
    kubeconfig.parent.mkdir(parents=True, exist_ok=True)
    if settings.name not in _kind_clusters():
        with step(f"creating kind cluster `{settings.name}`", "2 minutes"):
            create = ["kind", "create", "cluster", "--config", "-", "--wait", "120s"]
            shell.run([*create, "--name", settings.name, "--kubeconfig", kubeconfig], input=KIND_CONFIG)
    shell.run(["kind", "export", "kubeconfig", "--name", settings.name, "--kubeconfig", kubeconfig])


def _kind_clusters() -> list[str]:
    return shell.run(["kind", "get", "clusters"]).split() if shutil.which("kind") else []


def _docker_answers() -> bool:
    return shell.succeeds(["docker", "info", "--format", "{{.ServerVersion}}"])


def _reachable(settings: Settings, kubeconfig: Path) -> bool:
    kubectl = tools.kubectl(settings)
    return shell.succeeds([kubectl, f"--kubeconfig={kubeconfig}", "--request-timeout=5s", "get", "--raw", "/readyz"])


def _node_names(settings: Settings, kubeconfig: Path) -> list[str]:
    if not _reachable(settings, kubeconfig):
        return []
    listed = shell.run([tools.kubectl(settings), f"--kubeconfig={kubeconfig}", "get", "nodes", "-o", "json"])
    return [item["metadata"]["name"] for item in json.loads(listed)["items"]]
