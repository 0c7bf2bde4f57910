"""What an instance of the cluster is called, and where all that it owns lives.

Everything that could collide on a host (interface, CIDRs, cgroup, folders) derives from the two values that a user
may set, the name and the CIDR, so two instances can run side by side. The environment is read here and nowhere else.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

from cluster.errors import ClusterError

KUBERNETES_VERSION = "v1.37.2"
DEFAULT_NAME = "finetune"
DEFAULT_CIDR = "10.222.0.0/16"
MAX_NODES = 16
REPOSITORY = Path(__file__).resolve().parent.parent
# Not the virtual environment that a command happens to run in: a part would be restarted whenever that changes.
PYTHON = Path(sys.executable).resolve()
ARGS_PREFIX = "FINETUNE_CLUSTER_ARGS_"


@dataclass(frozen=True)
class Node:
    """One node: its network namespace has `address`, its pods live in `pod_cidr`."""

    name: str
    address: str
    pod_cidr: IPv4Network


@dataclass(frozen=True)
class Settings:
    """One instance. `cidr` is a /16: .0.0/24 nodes, .16.0/20 pods (a /24 a node), .128.0/17 Services."""

    name: str
    cidr: IPv4Network
    num_nodes: int
    cache: Path
    state: Path
    run: Path
    extra_args: Mapping[str, tuple[str, ...]]

    def _address(self, offset: int) -> str:
        return str(self.cidr.network_address + offset)

    @property
    def gateway(self) -> str:
        """The host's address on the cluster's network; the control plane listens on it and on nothing else."""
        return self._address(1)

    @property
    def pods_cidr(self) -> IPv4Network:
        """All pods of all nodes."""
        return IPv4Network((int(self.cidr.network_address) + (16 << 8), 20))

    @property
    def service_cidr(self) -> IPv4Network:
        """Cluster IPs."""
        return IPv4Network((int(self.cidr.network_address) + (128 << 8), 17))

    @property
    def api_service_ip(self) -> str:
        """The cluster IP of the `kubernetes` Service."""
        return str(self.service_cidr.network_address + 1)

    @property
    def dns_service_ip(self) -> str:
        """The cluster IP of the `kube-dns` Service."""
        return str(self.service_cidr.network_address + 10)

    @property
    def api_url(self) -> str:
        """Where the API server listens."""
        return f"https://{self.gateway}:6443"

    @property
    def registry(self) -> str:
        """`host:port` of the image registry, for push and pull (plain http)."""
        # 5001 and not 5000: Debian's docker-registry service may own 5000 on every address.
        return f"{self.gateway}:5001"

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes, in order."""
        pods = list(self.pods_cidr.subnets(new_prefix=24))
        return tuple(Node(f"node-{i}", self._address(10 + i), pods[i]) for i in range(self.num_nodes))

    @property
    def interface(self) -> str:
        """The only interface that the host sees."""
        return f"ft-{self.name}"

    @property
    def cgroup(self) -> str:
        """The cgroup that holds every process of the instance, relative to a hierarchy's root."""
        return f"finetune-cluster-{self.name}"

    @property
    def instance_cache(self) -> Path:
        """What outlives `down`: the nodes' image stores and the registry's layers."""
        return self.cache / "instances" / self.name

    @property
    def registry_storage(self) -> Path:
        """The registry's layers."""
        return self.instance_cache / "registry"

    @property
    def volumes(self) -> Path:
        """Folders behind the persistent volumes; every node sees the same ones."""
        return self.state / "volumes"

    @property
    def logs(self) -> Path:
        """A log a part."""
        return self.state / "log"

    @property
    def pki(self) -> Path:
        """Keys, certificates and kubeconfigs of the parts."""
        return self.state / "pki"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.state / "kubeconfig"

    def node(self, name: str) -> Node:
        """Returns the node called `name`.

        Raises:
            ClusterError: There is none.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        raise ClusterError(f"no node is called `{name}`", hint=f"nodes: {', '.join(n.name for n in self.nodes)}")

    def node_cache(self, node: Node) -> Path:
        """The node's containerd root."""
        return self.instance_cache / "nodes" / node.name

    def node_state(self, node: Node) -> Path:
        """The node's disk, as long as the instance lives."""
        return self.state / "nodes" / node.name

    def node_run(self, node: Node) -> Path:
        """What a real node would lose in a reboot."""
        return self.run / node.name

    def node_cgroup(self, node: Node) -> str:
        """The cgroup of everything on the node: daemons, shims, pods."""
        return f"{self.cgroup}/{node.name}"

    def containerd_socket(self, node: Node) -> Path:
        """Where the node's containerd listens."""
        return self.node_run(node) / "containerd.sock"


def load(env: Mapping[str, str] = os.environ) -> Settings:
    """Resolves the instance from the environment.

    Raises:
        ClusterError: A value is not allowed.
    """
    name = env.get("FINETUNE_CLUSTER_NAME", DEFAULT_NAME)
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,10}[a-z0-9]", name):
        raise ClusterError(
            f"FINETUNE_CLUSTER_NAME: must be 2 to 12 of a-z, 0-9 and `-`, starting with a letter, got `{name}`",
            hint="the name becomes part of an interface's name, which Linux limits to 15 characters",
        )
    cidr = _parse_cidr(env.get("FINETUNE_CLUSTER_CIDR", DEFAULT_CIDR))
    nodes = env.get("FINETUNE_CLUSTER_NODES", "2")
    if not nodes.isdigit() or not 1 <= int(nodes) <= MAX_NODES:
        raise ClusterError(f"FINETUNE_CLUSTER_NODES: must be 1 to {MAX_NODES}, got `{nodes}`")
    home = Path(env.get("HOME", "/root"))
    product = "finetune-operator"
    return Settings(
        name=name,
        cidr=cidr,
        num_nodes=int(nodes),
        cache=Path(env.get("XDG_CACHE_HOME") or home / ".cache") / product,
        state=Path(env.get("XDG_STATE_HOME") or home / ".local/state") / product / name,
        run=Path("/run") / product / name,
        extra_args={
            key.removeprefix(ARGS_PREFIX).lower().replace("_", "-"): tuple(shlex.split(value))
            for key, value in env.items()
            if key.startswith(ARGS_PREFIX)
        },
    )


def _parse_cidr(text: str) -> IPv4Network:
    try:
        cidr = IPv4Network(text)
    except ValueError as error:
        raise ClusterError(f"FINETUNE_CLUSTER_CIDR: must be an IPv4 /16 such as `{DEFAULT_CIDR}`: {error}") from error
    if cidr.prefixlen != 16:
        raise ClusterError(f"FINETUNE_CLUSTER_CIDR: must be a /16 such as `{DEFAULT_CIDR}`, got `{text}`")
    return cidr
