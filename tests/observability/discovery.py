"""Kubernetes service discovery for Prometheus, by files.

Debian builds Prometheus without `kubernetes_sd_configs`. This writes the targets that it would find, with the same meta labels,
so that the relabelling which the monitors stand for is Prometheus' own work.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.e2e.kube import Kubectl

REFRESH_SECONDS = 2.0


@dataclass(frozen=True)
class Discovery:
    """One `kubernetes_sd_configs` entry, and the file that takes its place."""

    role: Literal["pod", "endpoints"]
    namespaces: tuple[str, ...]
    file: Path


@contextmanager
def running(discoveries: list[Discovery], kubectl: Kubectl) -> Iterator[None]:
    """Keeps the files in step with the cluster."""
    done = threading.Event()

    namespaces = sorted({name for discovery in discoveries for name in discovery.namespaces})

    def keep_in_step() -> None:
        while not done.is_set():
            # One process for all: kubectl costs a good part of a second of CPU time.
            found = {name: kubectl.within(name).list("pods,services,endpoints") for name in namespaces}
            for discovery in discoveries:
                _write(discovery, found)
            done.wait(REFRESH_SECONDS)

    thread = threading.Thread(target=keep_in_step, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(30)


def _write(discovery: Discovery, found: dict[str, list[dict[str, Any]]]) -> None:
    groups: list[dict[str, Any]] = []
    for namespace in discovery.namespaces:
        objects: dict[str, dict[str, dict[str, Any]]] = {"Pod": {}, "Service": {}, "Endpoints": {}}
        for body in found[namespace]:
            objects[body["kind"]][body["metadata"]["name"]] = body
        if discovery.role == "pod":
            groups += [group for pod in objects["Pod"].values() for group in pod_targets(pod)]
        else:
            for name, endpoints in objects["Endpoints"].items():
                groups += endpoints_targets(endpoints, objects["Service"].get(name), objects["Pod"])
    new = discovery.file.with_suffix(".new")
    new.write_text(json.dumps(groups))
    new.rename(discovery.file)


def pod_targets(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """A target for each declared container port of a pod that has an address."""
    address = pod["status"].get("podIP")
    return [
        _target(f"{address}:{port['containerPort']}", _pod_labels(pod, container["name"], port))
        for container in pod["spec"]["containers"]
        for port in container.get("ports", [])
        if address
    ]


def endpoints_targets(
    endpoints: dict[str, Any], service: dict[str, Any] | None, pods: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """A target for each address and port of a Service's endpoints, with the labels of Service and pod."""
    targets = []
    for subset in endpoints.get("subsets") or []:
        for address in subset.get("addresses", []):
            for port in subset.get("ports", []):
                labels = {
                    "__meta_kubernetes_namespace": endpoints["metadata"]["namespace"],
                    "__meta_kubernetes_endpoint_port_name": port.get("name", ""),
                }
                if service:
                    labels["__meta_kubernetes_service_name"] = service["metadata"]["name"]
                    labels |= _labels("service", service)
                pod = pods.get(address.get("targetRef", {}).get("name", ""))
                if pod:
                    labels |= _pod_labels(pod, pod["spec"]["containers"][0]["name"], port)
                targets.append(_target(f"{address['ip']}:{port['port']}", labels))
    return targets


def _pod_labels(pod: dict[str, Any], container: str, port: dict[str, Any]) -> dict[str, str]:
    return {
        "__meta_kubernetes_namespace": pod["metadata"]["namespace"],
        "__meta_kubernetes_pod_name": pod["metadata"]["name"],
        "__meta_kubernetes_pod_phase": pod["status"]["phase"],
        "__meta_kubernetes_pod_container_name": container,
        "__meta_kubernetes_pod_container_port_name": port.get("name", ""),
        **_labels("pod", pod),
    }


def _labels(kind: str, body: dict[str, Any]) -> dict[str, str]:
    found = {}
    for key, value in body["metadata"].get("labels", {}).items():
        found[f"__meta_kubernetes_{kind}_label_{label_name(key)}"] = value
        found[f"__meta_kubernetes_{kind}_labelpresent_{label_name(key)}"] = "true"
    return found


def label_name(key: str) -> str:
    """A label's key as Prometheus spells it in meta labels."""
    return re.sub(r"[^a-zA-Z0-9_]", "_", key)


def _target(address: str, labels: dict[str, str]) -> dict[str, Any]:
    return {"targets": [address], "labels": labels}
