"""The scrape configuration that a ServiceMonitor and a PodMonitor stand for.

Written after what the Prometheus Operator generates (prometheus-operator, pkg/prometheus/promcfg.go), for the fields that the
chart uses; anything else in a monitor is an error here, so that nothing is tested less than it is shipped.
"""

import re
from pathlib import Path
from typing import Any

from tests.observability.discovery import Discovery, label_name


def config(monitors: list[dict[str, Any]], folder: Path) -> tuple[dict[str, Any], list[Discovery]]:
    """Prometheus' configuration for the monitors, and the discoveries whose files (in `folder`) it reads."""
    discoveries: list[Discovery] = []
    jobs = [job for monitor in monitors for job in _jobs(monitor, folder, discoveries)]
    return {"global": {"scrape_interval": "30s"}, "scrape_configs": jobs}, discoveries


def _jobs(monitor: dict[str, Any], folder: Path, discoveries: list[Discovery]) -> list[dict[str, Any]]:
    spec = dict(monitor["spec"])
    is_pods = monitor["kind"] == "PodMonitor"
    endpoints = spec.pop("podMetricsEndpoints" if is_pods else "endpoints")
    selector, namespaces = spec.pop("selector"), spec.pop("namespaceSelector")
    assert not spec, f"fields that are not translated: {sorted(spec)}"
    assert "any" not in namespaces, "namespaces are named in what is tested"
    discovery = Discovery(
        "pod" if is_pods else "endpoints", tuple(namespaces["matchNames"]), folder / f"{monitor['kind']}.json"
    )
    discoveries.append(discovery)
    kind = "pod" if is_pods else "service"
    identity = f"{monitor['metadata']['namespace']}/{monitor['metadata']['name']}"
    jobs = []
    for number, endpoint in enumerate(endpoints):
        rest = dict(endpoint)
        port, own = rest.pop("port"), rest.pop("relabelings", [])
        job = {
            "job_name": f"{'podMonitor' if is_pods else 'serviceMonitor'}/{identity}/{number}",
            "file_sd_configs": [{"files": [str(discovery.file)], "refresh_interval": "1s"}],
            "metrics_path": rest.pop("path"),
            "scrape_interval": rest.pop("interval"),
            "scrape_timeout": rest.pop("scrapeTimeout"),
            "relabel_configs": [*_selected(kind, selector), *_target(is_pods, port, identity), *map(_snake, own)],
        }
        assert not rest, f"fields that are not translated: {sorted(rest)}"
        jobs.append(job)
    return jobs


def _selected(kind: str, selector: dict[str, Any]) -> list[dict[str, Any]]:
    rules = []
    for key, value in selector.get("matchLabels", {}).items():
        rules.append(_keep([f"__meta_kubernetes_{kind}_label_{label_name(key)}"], re.escape(value)))
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "Exists", "the only operator that is translated"
        rules.append(_keep([f"__meta_kubernetes_{kind}_labelpresent_{label_name(expression['key'])}"], "true"))
    return rules


def _target(is_pods: bool, port: str, identity: str) -> list[dict[str, Any]]:
    port_label = "__meta_kubernetes_pod_container_port_name" if is_pods else "__meta_kubernetes_endpoint_port_name"
    rules = [
        _keep([port_label], port),
        {"source_labels": ["__meta_kubernetes_pod_phase"], "regex": "(Failed|Succeeded)", "action": "drop"},
        _copy("__meta_kubernetes_namespace", "namespace"),
        _copy("__meta_kubernetes_pod_name", "pod"),
        _copy("__meta_kubernetes_pod_container_name", "container"),
    ]
    if is_pods:
        return [*rules, {"target_label": "job", "replacement": identity}]
    return [*rules, _copy("__meta_kubernetes_service_name", "service"), _copy("__meta_kubernetes_service_name", "job")]


def _snake(relabeling: dict[str, Any]) -> dict[str, Any]:
    names = {"sourceLabels": "source_labels", "targetLabel": "target_label"}
    return {names.get(key, key): value for key, value in relabeling.items()}


def _keep(sources: list[str], regex: str) -> dict[str, Any]:
    return {"source_labels": sources, "regex": regex, "action": "keep"}


def _copy(source: str, target: str) -> dict[str, Any]:
    return {"source_labels": [source], "target_label": target}
