"""A node: containerd, kubelet and kube-proxy in a network and a mount namespace of their own.

The mount namespace is what makes two kubelets on one machine honest: the paths that kubelet, containerd and CNI have
compiled in (/var/lib/kubelet, /var/lib/cni, /run/containerd, /var/log/containers) are the node's own, no other
kubelet of the host is touched, and every mount of every pod vanishes with the namespace.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from cluster import cgroups, network, parts, shell
from cluster.errors import ClusterError
from cluster.parts import Part
from cluster.settings import Node, Settings

DAEMONS = ("containerd", "kubelet", "kube-proxy")


def part_name(node: Node, daemon: str) -> str:
    """The supervised part's name."""
    return f"{node.name}.{daemon}"


def build_parts(settings: Settings, node: Node, binaries: Path) -> list[Part]:
    """Returns the node's parts."""
    socket = settings.containerd_socket(node)
    config = settings.node_state(node)
    kubelet = [
        f"{binaries}/kubelet",
        f"--config={config}/kubelet.json",
        f"--kubeconfig={settings.pki}/{node.name}.kubeconfig",
        f"--hostname-override={node.name}",
        f"--node-ip={node.address}",
        "--root-dir=/var/lib/kubelet",
    ]
    kube_proxy = [
        f"{binaries}/kube-proxy",
        f"--kubeconfig={settings.pki}/kube-proxy.kubeconfig",
        f"--hostname-override={node.name}",
        f"--cluster-cidr={settings.pods_cidr}",
        "--proxy-mode=iptables",
        # Conntrack's size belongs to the host's first namespace and cannot be set from here.
        "--conntrack-max-per-core=0",
        "--conntrack-min=0",
    ]
    commands: dict[str, tuple[list[str], tuple[str, ...]]] = {
        "containerd": (["containerd", "--config", f"{config}/containerd.toml"], ()),
        "kubelet": (kubelet, ("ready", f"unix:{socket}")),
        "kube-proxy": (kube_proxy, ("ready",)),
    }
    enter = ("nsenter", f"--net={network.namespace(settings, node.name)}", f"--mount={_mounts(settings, node)}", "--")
    return [
        Part(
            name=part_name(node, daemon),
            argv=(*enter, *command, *settings.extra_args.get(daemon, ())),
            cgroup=f"{settings.node_cgroup(node)}/{daemon}",
            after=after,
        )
        for daemon, (command, after) in commands.items()
    ]


def prepare(settings: Settings, node: Node, pause_image: str) -> None:
    """Makes the node's folders, configuration, cgroup and namespaces, as far as they are missing."""
    state = settings.node_state(node)
    if not cgroups.members(settings.node_cgroup(node)):
        _forget_what_a_reboot_would(settings, node)
    for name in ("kubelet", "cni-cache", "cni", "container-logs", "pod-logs", "plugins"):
        (state / name).mkdir(parents=True, exist_ok=True)
    settings.node_cache(node).mkdir(parents=True, exist_ok=True)
    certs = state / "certs.d" / settings.registry
    parts.write_atomically(certs / "hosts.toml", _hosts_toml(settings))
    parts.write_atomically(state / "containerd.toml", _containerd_toml(settings, node, pause_image))
    parts.write_atomically(state / "kubelet.json", json.dumps(_kubelet_config(settings, node), indent=1))
    parts.write_atomically(state / "cni" / "10-pods.conflist", json.dumps(_cni_config(settings, node), indent=1))
    cgroups.create(settings.node_cgroup(node))
    _ensure_mounts(settings, node)


def stop(settings: Settings, node: Node) -> None:
    """Kills kubelet for good; containerd and the pods go on, as on a node that lost its agent."""
    _kill(settings, node, ("kubelet",), f"{settings.node_cgroup(node)}/kubelet")


def kill(settings: Settings, node: Node) -> None:
    """Kills all that runs on the node at once, like a loss of power, and forgets what a reboot would.

    The cable goes first: a machine without power says no goodbye, so its peers must see silence and not closed
    connections.
    """
    network.unplug(settings, node)
    _kill(settings, node, DAEMONS, settings.node_cgroup(node))
    _forget_what_a_reboot_would(settings, node)


def start(settings: Settings, node: Node, pause_image: str) -> None:
    """Brings a stopped or killed node back."""
    prepare(settings, node, pause_image)
    for daemon in DAEMONS:
        parts.release(settings, part_name(node, daemon))


def ctr_images(settings: Settings, node: Node, *words: str) -> list[str]:
    """The command line of `ctr images` for what kubelet sees on the node."""
    socket = str(settings.containerd_socket(node))
    return ["ctr", "--address", socket, "--namespace", "k8s.io", "images", *words]


def remove_all_mounts(settings: Settings) -> None:
    """Lets go of the mount namespace of every node that there is, also of those that are no longer asked for."""
    folder = settings.run / "mounts"
    for pin in folder.iterdir() if folder.exists() else []:
        _unpin(pin)


def _unpin(pin: Path) -> None:
    # All mounts of the namespace go with the last process in it.
    while network.is_pinned(pin):
        shell.run(["umount", pin])
    pin.unlink(missing_ok=True)


def _kill(settings: Settings, node: Node, daemons: Sequence[str], group: str) -> None:
    names = {part_name(node, daemon) for daemon in daemons}
    for name in names:
        parts.hold(settings, name)
    cgroups.kill(group)
    # The supervisor may have been about to restart one, before it saw that it is held.
    deadline = time.monotonic() + 5
    while any(seen.process for name, seen in parts.read_seen(settings).items() if name in names):
        if time.monotonic() > deadline:
            raise ClusterError("the supervisor does not answer", log=parts.log(settings, "supervisor"))
        time.sleep(0.05)
    cgroups.kill(group)


def _forget_what_a_reboot_would(settings: Settings, node: Node) -> None:
    _unpin(_mounts(settings, node))
    cgroups.remove(settings.node_cgroup(node))
    shutil.rmtree(settings.node_run(node), ignore_errors=True)
    network.remove_pod_links(settings, node)
    # Addresses of pods that died with the power would never be given back.
    shutil.rmtree(settings.node_state(node) / "ipam", ignore_errors=True)


def _mounts(settings: Settings, node: Node) -> Path:
    return settings.run / "mounts" / node.name


def _ensure_mounts(settings: Settings, node: Node) -> None:
    pin = _mounts(settings, node)
    if network.is_pinned(pin):
        return
    pin.parent.mkdir(parents=True, exist_ok=True)
    pin.touch()
    state = settings.node_state(node)
    own = {"kubelet": "/var/lib/kubelet", "cni-cache": "/var/lib/cni", "container-logs": "/var/log/containers"}
    for target in (*own.values(), "/run/containerd"):
        Path(target).mkdir(parents=True, exist_ok=True)
    # Slave of the host, so that what the host unmounts is not kept alive here; shared again inside, because pods may
    # ask for mounts that propagate.
    script = ["set -e", "mount --make-rshared /", "mount -t tmpfs -o mode=711 tmpfs /run/containerd"]
    script += [f"mount --bind '{state / name}' {target}" for name, target in own.items()]
    shell.run(["unshare", f"--mount={pin}", "--propagation", "slave", "sh", "-c", "\n".join(script)])


def _hosts_toml(settings: Settings) -> str:
    url = f"http://{settings.registry}"
    return f'server = "{url}"\n[host."{url}"]\n  capabilities = ["pull", "resolve"]\n'


def _can_lower_oom_score() -> bool:
    path = Path("/proc/self/oom_score_adj")
    before = path.read_text()
    try:
        path.write_text(str(int(before) - 1))
    except OSError:
        return False
    path.write_text(before)
    return True


def _containerd_toml(settings: Settings, node: Node, pause_image: str) -> str:
    state, run = settings.node_state(node), settings.node_run(node)
    unused = [f"io.containerd.snapshotter.v1.{name}" for name in ("aufs", "btrfs", "devmapper", "zfs")]
    # `opt` would make /opt/containerd.
    unused += ["io.containerd.internal.v1.opt", "io.containerd.tracing.processor.v1.otlp"]
    restrict = json.dumps(not _can_lower_oom_score())
    return f"""version = 2
root = "{settings.node_cache(node)}"
state = "{run}/containerd"
disabled_plugins = {json.dumps(unused)}
[grpc]
  address = "{settings.containerd_socket(node)}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause_image}"
  # Where oom_score_adj cannot be lowered, every sandbox would fail with runc's "can't get final child's PID".
  restrict_oom_score_adj = {restrict}
  netns_mounts_under_state_dir = true
  tolerate_missing_hugetlb_controller = true
[plugins."io.containerd.grpc.v1.cri".containerd]
  # The registry keeps the compressed layers already.
  discard_unpacked_layers = true
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
  Root = "{run}/runc"
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/usr/lib/cni"
  conf_dir = "{state}/cni"
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "{state}/certs.d"
"""


def _kubelet_config(settings: Settings, node: Node) -> dict[str, object]:
    state = settings.node_state(node)
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": node.address,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(settings.pki / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(settings.pki / f"{node.name}.crt"),
        "tlsPrivateKeyFile": str(settings.pki / f"{node.name}.key"),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{settings.node_cgroup(node)}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "containerRuntimeEndpoint": f"unix://{settings.containerd_socket(node)}",
        "clusterDNS": [settings.dns_service_ip],
        "clusterDomain": "cluster.local",
        "resolvConf": "",
        "podLogsDir": str(state / "pod-logs"),
        "volumePluginDir": str(state / "plugins"),
        "serializeImagePulls": False,
        # The disk is the host's: a full one must not evict pods, nor empty the image store.
        "evictionHard": {},
        "imageGCHighThresholdPercent": 100,
    }


def _cni_config(settings: Settings, node: Node) -> dict[str, object]:
    # A routed veth a pod, as kind does it, and no bridge: traffic from a pod to a Service whose endpoint is on the
    # same node then passes iptables on both ways, whether or not br_netfilter is loaded.
    ipam = {
        "type": "host-local",
        "dataDir": str(settings.node_state(node) / "ipam"),
        "ranges": [[{"subnet": str(node.pod_cidr)}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    return {
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [
            {"type": "ptp", "ipMasq": False, "ipam": ipam},
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }
