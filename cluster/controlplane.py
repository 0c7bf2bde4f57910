"""The control plane on the host: etcd, API server, controller manager, scheduler, DNS, registry, storage provisioner.

All of it listens on the instance's own address, so ports never collide with the host's or with another instance's.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cluster import kubeapi, parts
from cluster.parts import Part
from cluster.settings import PYTHON, REPOSITORY, Settings
from cluster.shell import PART_ENV

DNS_PORT = 1053
STORAGE_CLASS = "standard"
PROVISIONER = "finetune.dev/shared-folder"


def build_parts(settings: Settings, binaries: Path) -> list[Part]:
    """Returns the parts that run on the host."""
    etcd = f"tcp:{settings.gateway}:2379"
    state = settings.state
    commands: dict[str, tuple[list[str], tuple[str, ...]]] = {
        "etcd": ([f"{binaries}/etcd", *_etcd_flags(settings)], ()),
        "kube-apiserver": ([f"{binaries}/kube-apiserver", *_apiserver_flags(settings)], (etcd,)),
        "kube-controller-manager": ([f"{binaries}/kube-controller-manager", *_manager_flags(settings)], ("ready",)),
        "kube-scheduler": ([f"{binaries}/kube-scheduler", *_client_flags(settings, "scheduler")], ("ready",)),
        "coredns": ([f"{binaries}/coredns", "-conf", f"{state}/Corefile"], ("ready",)),
        "registry": (["docker-registry", "serve", f"{state}/registry.json"], ()),
        "provisioner": ([str(PYTHON), "-m", "cluster", "provision"], ("ready",)),
    }
    # The provisioner is this package: it must find the same instance.
    own = {
        k: v for k, v in os.environ.items() if k.startswith(("FINETUNE_CLUSTER_NAME", "FINETUNE_CLUSTER_CIDR", "XDG_"))
    }
    own |= {"HOME": os.environ.get("HOME", "/root"), "PYTHONPATH": str(REPOSITORY)}
    return [
        Part(
            name=name,
            argv=(*command, *settings.extra_args.get(name, ())),
            cgroup=f"{settings.cgroup}/host/{name}",
            after=after,
            env=tuple({**PART_ENV, **(own if name == "provisioner" else {})}.items()),
        )
        for name, (command, after) in commands.items()
    ]


def prepare(settings: Settings) -> None:
    """Writes the configuration files of the parts that have one."""
    settings.registry_storage.mkdir(parents=True, exist_ok=True)
    settings.volumes.mkdir(parents=True, exist_ok=True)
    parts.write_atomically(settings.state / "registry.json", json.dumps(_registry_config(settings), indent=1))
    parts.write_atomically(settings.state / "Corefile", _corefile(settings))


def apply_base(settings: Settings, client: kubeapi.Client) -> None:
    """Applies the objects without which a cluster is not one: rights of its parts, DNS, a default StorageClass."""
    for path, manifest in _base_objects(settings):
        client.apply(path, manifest)


def _etcd_flags(settings: Settings) -> list[str]:
    client, peer = f"https://{settings.gateway}:2379", f"https://{settings.gateway}:2380"
    flags = [
        f"--data-dir={settings.state}/etcd",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--log-level=warn",
        # The data lives as long as the instance: no disk flush is worth waiting for.
        "--unsafe-no-fsync",
    ]
    for prefix in ("", "peer-"):
        flags += [f"--{prefix}cert-file={settings.pki}/etcd.crt", f"--{prefix}key-file={settings.pki}/etcd.key"]
        flags += [f"--{prefix}trusted-ca-file={settings.pki}/etcd-ca.crt", f"--{prefix}client-cert-auth"]
    return flags


def _apiserver_flags(settings: Settings) -> list[str]:
    pki = settings.pki
    return [
        f"--etcd-servers=https://{settings.gateway}:2379",
        f"--etcd-cafile={pki}/etcd-ca.crt",
        f"--etcd-certfile={pki}/etcd-client.crt",
        f"--etcd-keyfile={pki}/etcd-client.key",
        f"--bind-address={settings.gateway}",
        f"--advertise-address={settings.gateway}",
        "--secure-port=6443",
        f"--tls-cert-file={pki}/apiserver.crt",
        f"--tls-private-key-file={pki}/apiserver.key",
        f"--client-ca-file={pki}/ca.crt",
        f"--kubelet-certificate-authority={pki}/ca.crt",
        f"--kubelet-client-certificate={pki}/apiserver-kubelet-client.crt",
        f"--kubelet-client-key={pki}/apiserver-kubelet-client.key",
        # Host names of nodes resolve nowhere.
        "--kubelet-preferred-address-types=InternalIP",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        f"--service-cluster-ip-range={settings.service_cidr}",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={pki}/service-account.pub",
        f"--service-account-signing-key-file={pki}/service-account.key",
    ]


def _client_flags(settings: Settings, user: str) -> list[str]:
    kubeconfig = f"{settings.pki}/{user}.kubeconfig"
    return [
        f"--kubeconfig={kubeconfig}",
        f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}",
        f"--client-ca-file={settings.pki}/ca.crt",
        f"--tls-cert-file={settings.pki}/{user}.crt",
        f"--tls-private-key-file={settings.pki}/{user}.key",
        f"--bind-address={settings.gateway}",
        # There is one of each; an election would only cost seconds after a restart.
        "--leader-elect=false",
    ]


def _manager_flags(settings: Settings) -> list[str]:
    return [
        *_client_flags(settings, "controller-manager"),
        f"--service-account-private-key-file={settings.pki}/service-account.key",
        f"--root-ca-file={settings.pki}/ca.crt",
        f"--cluster-signing-cert-file={settings.pki}/ca.crt",
        f"--cluster-signing-key-file={settings.pki}/ca.key",
        "--use-service-account-credentials=true",
    ]


def _registry_config(settings: Settings) -> dict[str, Any]:
    return {
        "version": "0.1",
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {
            "filesystem": {"rootdirectory": str(settings.registry_storage)},
            "delete": {"enabled": True},
            "cache": {"blobdescriptor": "inmemory"},
        },
        "http": {"addr": settings.registry},
    }


def _corefile(settings: Settings) -> str:
    # Pods cannot reach the outside, so a name of the outside gets its NXDOMAIN at once: a refusal or a timeout would
    # make a library wait and retry.
    return f"""
cluster.local:{DNS_PORT} in-addr.arpa:{DNS_PORT} {{
  bind {settings.gateway}
  errors
  kubernetes cluster.local in-addr.arpa {{
    kubeconfig {settings.pki}/coredns.kubeconfig
    pods insecure
    ttl 5
  }}
  cache 5
}}
.:{DNS_PORT} {{
  bind {settings.gateway}
  errors
  template ANY ANY {{
    rcode NXDOMAIN
  }}
}}
"""


def _base_objects(settings: Settings) -> list[tuple[str, dict[str, Any]]]:
    rbac = "/apis/rbac.authorization.k8s.io/v1"
    read = ["get", "list", "watch"]
    coredns_rules = [
        {"apiGroups": [""], "resources": ["endpoints", "services", "pods", "namespaces"], "verbs": read},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": read},
    ]
    provisioner_rules = [
        {"apiGroups": [""], "resources": ["persistentvolumeclaims"], "verbs": read},
        {"apiGroups": [""], "resources": ["persistentvolumes"], "verbs": [*read, "create", "delete"]},
    ]
    objects = []
    for name, rules in (("finetune:coredns", coredns_rules), ("finetune:provisioner", provisioner_rules)):
        role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": name}}
        objects.append((f"{rbac}/clusterroles/{name}", {**role, "rules": rules}))
        objects.append((f"{rbac}/clusterrolebindings/{name}", _binding(name, role=name, user=name)))
    kubelet_client = "kube-apiserver-kubelet-client"
    binding = _binding("finetune:kubelet-client", role="system:kubelet-api-admin", user=kubelet_client)
    objects.append((f"{rbac}/clusterrolebindings/finetune:kubelet-client", binding))
    objects.append((f"/apis/storage.k8s.io/v1/storageclasses/{STORAGE_CLASS}", _storage_class()))
    objects += _dns_objects(settings)
    return objects


def _binding(name: str, *, role: str, user: str) -> dict[str, Any]:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
    }


def _storage_class() -> dict[str, Any]:
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": STORAGE_CLASS, "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
        "provisioner": PROVISIONER,
        "reclaimPolicy": "Delete",
        "volumeBindingMode": "Immediate",
    }


def _dns_objects(settings: Settings) -> list[tuple[str, dict[str, Any]]]:
    protocols = (("dns", "UDP"), ("dns-tcp", "TCP"))
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "kube-dns", "namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}},
        "spec": {
            "clusterIP": settings.dns_service_ip,
            "ports": [{"name": n, "port": 53, "protocol": p, "targetPort": DNS_PORT} for n, p in protocols],
        },
    }
    labels = {
        "kubernetes.io/service-name": "kube-dns",
        "endpointslice.kubernetes.io/managed-by": "finetune-cluster",
    }
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "kube-dns-host", "namespace": "kube-system", "labels": labels},
        "addressType": "IPv4",
        "ports": [{"name": n, "port": DNS_PORT, "protocol": p} for n, p in protocols],
        "endpoints": [{"addresses": [settings.gateway], "conditions": {"ready": True}}],
    }
    namespace = "namespaces/kube-system"
    return [
        (f"/api/v1/{namespace}/services/kube-dns", service),
        (f"/apis/discovery.k8s.io/v1/{namespace}/endpointslices/kube-dns-host", endpoints),
    ]
