"""The cluster's network: one interface on the host, a switch and the nodes in network namespaces of their own.

The bridge that joins the nodes sits in a namespace too (`switch`) and not on the host: where br_netfilter is loaded,
bridged packets pass the host's FORWARD chain, whose policy is DROP once Docker was there. So the host gets one
interface, a few routes, no bridge and no iptables rule; removing the namespaces removes all of it.
"""

from __future__ import annotations

import json
import os
from ipaddress import IPv4Network
from pathlib import Path

from cluster import shell
from cluster.errors import ClusterError
from cluster.settings import Node, Settings

SWITCH = "switch"
BRIDGE = "br0"


def namespace(settings: Settings, name: str) -> Path:
    """The file that keeps a network namespace alive: `switch` or a node's name."""
    return settings.run / "netns" / name


def is_pinned(path: Path) -> bool:
    """Tells whether a namespace is kept alive at this file."""
    return path.exists() and os.path.ismount(path)


def check_cidr_is_free(settings: Settings) -> None:
    """Refuses a CIDR that the host already routes elsewhere.

    Raises:
        ClusterError: It overlaps with a route that is not this instance's.
    """
    for route in json.loads(shell.run(["ip", "-json", "-4", "route", "show", "table", "main"])):
        if route.get("dev") == settings.interface or route["dst"] == "default":
            continue
        if IPv4Network(route["dst"], strict=False).overlaps(settings.cidr):
            raise ClusterError(
                f"{settings.cidr} overlaps with the host's route {route['dst']} dev {route.get('dev')}",
                hint="set FINETUNE_CLUSTER_CIDR to a free /16, such as 10.223.0.0/16",
            )


def ensure(settings: Settings) -> None:
    """Makes whatever is missing of namespaces, links, addresses and routes."""
    switch = namespace(settings, SWITCH)
    for name in (SWITCH, *(node.name for node in settings.nodes)):
        _ensure_namespace(namespace(settings, name))
    if not _has_link(switch, BRIDGE):
        _ip(switch, "link add", BRIDGE, "type bridge forward_delay 0")
    _ip(switch, "link set", BRIDGE, "up")
    if not _has_link(None, settings.interface):
        _ip(None, "link add", settings.interface, f"type veth peer name host netns {switch}")
    _plug(switch, "host")
    _ip(None, "addr replace", f"{settings.gateway}/24 dev {settings.interface}")
    _ip(None, "link set", settings.interface, "up")
    for node in settings.nodes:
        ensure_node(settings, node)
    # Pods and Services are reachable from the host through the nodes, as from any machine of a flat network.
    for node in settings.nodes:
        _ip(None, "route replace", f"{node.pod_cidr} via {node.address} dev {settings.interface}")
    _ip(None, "route replace", f"{settings.service_cidr} via {settings.nodes[0].address} dev {settings.interface}")


def unplug(settings: Settings, node: Node) -> None:
    """Takes the node's link down; `ensure_node` plugs it in again."""
    _ip(namespace(settings, node.name), "link set eth0 down")


def pod_links(settings: Settings, node: Node) -> list[str]:
    """Names of the links of a node's pods, also of dead ones that the kernel has not cleaned up yet."""
    inside = namespace(settings, node.name)
    if not is_pinned(inside):
        return []
    links = json.loads(shell.run([*_prefix(inside), "ip", "-json", "link", "show", "type", "veth"]))
    return [link["ifname"] for link in links if link["ifname"] != "eth0"]


def remove_pod_links(settings: Settings, node: Node) -> None:
    """Removes what the pods of a node that died have left.

    The kernel does it too, but later. A new pod may have got the address of an old one by then: CNI takes the old route for its
    own, and it goes with the old link.
    """
    for link in pod_links(settings, node):
        # Fails where the kernel was faster.
        shell.succeeds([*_prefix(namespace(settings, node.name)), "ip", "link", "delete", link])


def remove(settings: Settings) -> None:
    """Removes all of it. Links and routes go with their namespaces, once no process is in them."""
    if _has_link(None, settings.interface):
        _ip(None, "link del", settings.interface)
    folder = settings.run / "netns"
    for path in folder.iterdir() if folder.exists() else []:
        while is_pinned(path):
            shell.run(["umount", path])
        path.unlink()


def ensure_node(settings: Settings, node: Node) -> None:
    """Makes whatever is missing of a node's link, and takes it up."""
    switch, inside = namespace(settings, SWITCH), namespace(settings, node.name)
    if not _has_link(inside, "eth0"):
        _ip(inside, "link add eth0 type veth peer name", node.name, f"netns {switch}")
    _plug(switch, node.name)
    _ip(inside, "link set lo up")
    _ip(inside, "addr replace", f"{node.address}/24 dev eth0")
    _ip(inside, "link set eth0 up")
    _ip(inside, "route replace default via", settings.gateway)
    for other in settings.nodes:
        if other != node:
            _ip(inside, "route replace", f"{other.pod_cidr} via {other.address}")
    _enter(inside, ["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0"])


def _plug(switch: Path, port: str) -> None:
    _ip(switch, "link set", port, f"master {BRIDGE} up")


def _ensure_namespace(path: Path) -> None:
    if is_pinned(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    shell.run(["unshare", f"--net={path}", "true"])


def _has_link(inside: Path | None, name: str) -> bool:
    return shell.succeeds([*_prefix(inside), "ip", "link", "show", "dev", name])


def _ip(inside: Path | None, *words: str) -> None:
    _enter(inside, ["ip", *" ".join(words).split()])


def _enter(inside: Path | None, argv: list[str]) -> None:
    shell.run([*_prefix(inside), *argv])


def _prefix(inside: Path | None) -> list[str]:
    # Not `ip netns exec`: that mounts a new /sys, and hides the cgroups.
    return ["nsenter", f"--net={inside}"] if inside else []
