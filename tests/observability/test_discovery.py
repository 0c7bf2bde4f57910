"""The scrape configuration stands for the monitors: what is selected, and what each target is labelled with."""

import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.chart import helm
from tests.observability import discovery, prometheus, scrape

POD: dict[str, Any] = {
    "metadata": {
        "name": "job-1-0",
        "namespace": "team",
        "labels": {"finetune.dev/job-name": "job", "finetune.dev/attempt": "1"},
    },
    "status": {"podIP": "10.1.2.3", "phase": "Running"},
    "spec": {"containers": [{"name": "trainer", "ports": [{"name": "http", "containerPort": 8080}]}]},
}


def _rendered(*settings: str) -> list[dict[str, Any]]:
    on = "metrics.serviceMonitor.enabled=true,metrics.podMonitor.enabled=true"
    return [body for body in helm.render("--set", ",".join([on, *settings])) if body["kind"].endswith("Monitor")]


def test_prometheus_takes_the_configuration(tmp_path: Path) -> None:
    config, discoveries = scrape.config(_rendered(), tmp_path)
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    done = subprocess.run([prometheus.binary("promtool"), "check", "config", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {found.role for found in discoveries} == {"pod", "endpoints"}


def test_monitors_look_into_the_watched_namespaces(tmp_path: Path) -> None:
    _, discoveries = scrape.config(_rendered("watchNamespaces={a,b}"), tmp_path)
    assert {found.role: found.namespaces for found in discoveries} == {
        "pod": ("a", "b"),
        "endpoints": (helm.NAMESPACE,),
    }


def test_pod_becomes_a_target_with_kubernetes_labels() -> None:
    (target,) = discovery.pod_targets(POD)
    assert target["targets"] == ["10.1.2.3:8080"]
    assert target["labels"]["__meta_kubernetes_pod_label_finetune_dev_job_name"] == "job"
    assert target["labels"]["__meta_kubernetes_pod_labelpresent_finetune_dev_job_name"] == "true"
    assert target["labels"]["__meta_kubernetes_pod_container_port_name"] == "http"


def test_pod_without_address_is_no_target() -> None:
    assert discovery.pod_targets({**POD, "status": {"phase": "Pending"}}) == []


def test_service_endpoints_carry_the_service_and_the_pod() -> None:
    service = {"metadata": {"name": "metrics", "namespace": "team", "labels": {"app.kubernetes.io/name": "operator"}}}
    endpoints = {
        "metadata": {"name": "metrics", "namespace": "team"},
        "subsets": [
            {
                "addresses": [{"ip": "10.1.2.3", "targetRef": {"kind": "Pod", "name": "job-1-0"}}],
                "ports": [{"name": "http", "port": 8080}],
            }
        ],
    }
    (target,) = discovery.endpoints_targets(endpoints, service, {"job-1-0": POD})
    assert target["labels"]["__meta_kubernetes_service_label_app_kubernetes_io_name"] == "operator"
    assert target["labels"]["__meta_kubernetes_pod_name"] == "job-1-0"
    assert target["labels"]["__meta_kubernetes_endpoint_port_name"] == "http"
