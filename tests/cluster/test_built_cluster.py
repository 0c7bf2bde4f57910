"""The built cluster, for real: what it serves, what it survives, and that it leaves nothing behind.

The tests share one instance and run in order, from gentle to violent; the last ones kill and remove it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from cluster import cgroups, network, processes

from .conftest import Instance, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]
NAMESPACE = "apps"
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def _namespace() -> dict[str, Any]:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}}


def _web(node: str, image: str) -> list[dict[str, Any]]:
    """A web server pinned to a node, on a volume that all share, and a Service for it."""
    serve = f"echo from-{node} > /data/{node}; echo serving; cd /data; exec /bin/busybox httpd -f -p 8080"
    container = {
        "name": "web",
        "image": image,
        "command": ["/bin/busybox", "sh", "-c", serve],
        "securityContext": RESTRICTED,
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"web-{node}", "namespace": NAMESPACE, "labels": {"on": node}},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": node},
            "terminationGracePeriodSeconds": 0,
            "containers": [container],
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "shared"}}],
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"web-{node}", "namespace": NAMESPACE},
        "spec": {"selector": {"on": node}, "ports": [{"port": 80, "targetPort": 8080}]},
    }
    return [pod, service]


def _claim() -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "shared", "namespace": NAMESPACE},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}},
    }


@pytest.fixture(scope="module")
def apps(running: Instance, busybox: str) -> Instance:
    """The instance with a web server on each node."""
    running.kubectl("apply", "-f", "-", stdin=json.dumps(_namespace()))
    running.kubectl("-n", NAMESPACE, "wait", "--for=create", "serviceaccount/default", "--timeout=30s")
    items = [_claim()]
    for node in running.settings.nodes:
        items += _web(node.name, busybox)
    running.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    running.kubectl("-n", NAMESPACE, "wait", "--for=condition=Ready", "pod", "--all", "--timeout=60s")
    return running


def _exec(instance: Instance, node: str, *command: str) -> str:
    return instance.kubectl("-n", NAMESPACE, "exec", f"web-{node}", "--", "/bin/busybox", *command)


def _fetch(instance: Instance, on: str, of: str) -> str:
    # Before kube-proxy has its rule the first packet goes astray, and with conntrack's memory all others of this connection.
    return _exec(
        instance,
        on,
        "timeout",
        "5",
        "/bin/busybox",
        "wget",
        "-qO-",
        f"http://web-{of}.{NAMESPACE}.svc.cluster.local/{of}",
    ).strip()


def _pod(instance: Instance, node: str) -> dict[str, Any]:
    pod: dict[str, Any] = json.loads(instance.kubectl("-n", NAMESPACE, "get", "pod", f"web-{node}", "-o", "json"))
    return pod


def _both_serve(instance: Instance) -> bool:
    return (
        _fetch(instance, "node-0", "node-1") == "from-node-1" and _fetch(instance, "node-1", "node-0") == "from-node-0"
    )


def test_up_again_is_quick_and_prints_only_the_kubeconfig(running: Instance) -> None:
    before, start = running.parts(), time.monotonic()
    assert running.run("up") == f"{running.settings.kubeconfig}\n"
    assert time.monotonic() - start < 20
    assert running.parts() == before


def test_another_shape_is_refused(running: Instance) -> None:
    refused = running.start("up", FINETUNE_CLUSTER_NODES="3")
    _, said = refused.communicate(timeout=60)
    assert refused.returncode == 1
    assert '"nodes": 3' in said and "down" in said


def test_both_nodes_are_ready(running: Instance) -> None:
    assert running.ready_nodes() == {"node-0", "node-1"}


def test_info_says_where_things_are(running: Instance) -> None:
    info = json.loads(running.run("info"))
    assert info["provider"] == "built" and info["running"] is True
    assert info["registry"] == "10.231.0.1:5001" and info["nodes"] == ["node-0", "node-1"]


@pytest.mark.parametrize("url", ["https://10.231.0.10:10250/pods", "https://10.231.0.1:6443/api/v1/pods"])
def test_anonymous_is_refused(running: Instance, url: str) -> None:
    context = ssl.create_default_context(cafile=str(running.settings.pki / "ca.crt"))
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url, timeout=5, context=context)
    assert refused.value.code in (401, 403)


def test_etcd_refuses_a_cluster_certificate(running: Instance) -> None:
    pki = running.settings.pki
    context = ssl.create_default_context(cafile=str(pki / "etcd-ca.crt"))
    context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
    with pytest.raises((OSError, urllib.error.URLError)):
        urllib.request.urlopen("https://10.231.0.1:2379/version", timeout=5, context=context)


def test_a_node_may_not_label_another(running: Instance) -> None:
    said = running.kubectl(
        f"--kubeconfig={running.settings.pki}/node-0.kubeconfig", "label", "node", "node-1", "a=b", check=False
    )
    assert "forbidden" in said.lower()


def test_pods_on_both_nodes_reach_each_other_by_name(apps: Instance) -> None:
    eventually(lambda: _both_serve(apps), "pods", 60)


def test_a_name_outside_is_refused_at_once(apps: Instance) -> None:
    start = time.monotonic()
    said = apps.kubectl(
        "-n", NAMESPACE, "exec", "web-node-0", "--", "/bin/busybox", "nslookup", "example.com.", check=False
    )
    assert "exit code 1" in said
    assert time.monotonic() - start < 3


def test_the_host_reaches_pods_and_services(apps: Instance) -> None:
    service = json.loads(apps.kubectl("-n", NAMESPACE, "get", "service", "web-node-1", "-o", "json"))
    for address in (f"{_pod(apps, 'node-1')['status']['podIP']}:8080", service["spec"]["clusterIP"]):
        with urllib.request.urlopen(f"http://{address}/node-1", timeout=5) as answer:
            assert answer.read() == b"from-node-1\n"


def test_logs_exec_copy_and_forward(apps: Instance, tmp_path: Path) -> None:
    assert apps.kubectl("-n", NAMESPACE, "logs", "web-node-0") == "serving\n"
    assert _exec(apps, "node-1", "id", "-u") == "1000\n"
    command = [apps.kubectl_path, f"--kubeconfig={apps.settings.kubeconfig}", "-n", NAMESPACE]
    forward = subprocess.Popen([*command, "port-forward", "pod/web-node-1", ":8080"], stdout=subprocess.PIPE, text=True)
    try:
        assert forward.stdout is not None
        port = forward.stdout.readline().split(" -> ")[0].rpartition(":")[2]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/node-1", timeout=10) as answer:
            assert answer.read() == b"from-node-1\n"
    finally:
        forward.kill()
        forward.wait()


def test_nodes_share_a_volume_that_is_a_folder_of_the_host(apps: Instance) -> None:
    assert _exec(apps, "node-0", "cat", "/data/node-1") == "from-node-1\n"
    folders = list(apps.settings.volumes.iterdir())
    assert [(folder / "node-0").read_text() for folder in folders] == ["from-node-0\n"]


def test_a_deleted_claim_takes_its_folder_along(apps: Instance) -> None:
    claim = _claim()
    claim["metadata"]["name"] = "short-lived"
    apps.kubectl("apply", "-f", "-", stdin=json.dumps(claim))
    eventually(lambda: len(list(apps.settings.volumes.iterdir())) == 2, "the folder", 15)
    apps.kubectl("-n", NAMESPACE, "delete", "pvc", "short-lived")
    eventually(lambda: len(list(apps.settings.volumes.iterdir())) == 1, "the folder's end", 15)


def test_pod_security_refuses_what_is_not_restricted(apps: Instance, busybox: str) -> None:
    said = apps.kubectl("-n", NAMESPACE, "run", "root", f"--image={busybox}", check=False)
    assert 'violates PodSecurity "restricted' in said


def test_an_eviction_that_a_budget_forbids_is_refused(apps: Instance) -> None:
    budget = ["-n", NAMESPACE, "create", "poddisruptionbudget", "web", "--selector=on=node-1", "--min-available=1"]
    apps.kubectl(*budget)
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": "web-node-1", "namespace": NAMESPACE},
    }
    path = f"/api/v1/namespaces/{NAMESPACE}/pods/web-node-1/eviction"
    said = apps.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction), check=False)
    assert "disruption budget" in said
    apps.kubectl("-n", NAMESPACE, "delete", "pdb", "web")


def test_every_part_comes_back_and_no_pod_notices(apps: Instance) -> None:
    before = {name: pid for name, (_, pid) in apps.parts().items() if name != "supervisor"}
    started = {node: _pod(apps, node)["status"]["containerStatuses"][0] for node in ("node-0", "node-1")}
    for pid in before.values():
        assert pid is not None
        processes.send(pid, signal.SIGKILL)

    def all_new() -> bool:
        now = apps.parts()
        return all(now[name][0] == "up" and now[name][1] != pid for name, pid in before.items())

    eventually(all_new, "new processes", 30)
    eventually(lambda: apps.ready_nodes() == {"node-0", "node-1"}, "ready nodes", 60)
    eventually(lambda: _both_serve(apps), "pods", 30)
    assert {node: _pod(apps, node)["status"]["containerStatuses"][0] for node in started} == started


def test_a_killed_supervisor_is_replaced_and_adopts_the_parts(apps: Instance) -> None:
    before = apps.parts()
    supervisor = before.pop("supervisor")[1]
    assert supervisor is not None
    os.kill(supervisor, signal.SIGKILL)
    eventually(lambda: apps.parts()["supervisor"][0] == "down", "the supervisor's end", 5)
    apps.run("up")
    after = apps.parts()
    assert after.pop("supervisor")[1] not in (None, supervisor)
    assert after == before


def test_a_stopped_node_is_lost_while_its_pods_go_on(apps: Instance) -> None:
    apps.run("node", "stop", "node-1")
    assert apps.parts()["node-1.kubelet"] == ("stopped", None)
    eventually(lambda: apps.ready_nodes() == {"node-0"}, "the loss", 60)
    address = _pod(apps, "node-1")["status"]["podIP"]
    with urllib.request.urlopen(f"http://{address}:8080/node-1", timeout=5) as answer:
        assert answer.read() == b"from-node-1\n"
    apps.run("node", "start", "node-1")
    eventually(lambda: apps.ready_nodes() == {"node-0", "node-1"}, "its return", 30)


def test_a_killed_node_loses_its_pods_and_comes_back(apps: Instance) -> None:
    group = apps.settings.node_cgroup(apps.settings.node("node-0"))
    assert cgroups.members(group)
    address = _pod(apps, "node-0")["status"]["podIP"]
    with socket.create_connection((address, 8080), timeout=5) as connection:
        apps.run("node", "kill", "node-0")
        assert not cgroups.members(group)
        # Silence, as from a machine without power, and not the end of the connection.
        connection.settimeout(1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
    # What the kernel would remove later could take the routes of new pods along.
    assert not network.pod_links(apps.settings, apps.settings.node("node-0"))
    apps.run("node", "start", "node-0")
    eventually(lambda: apps.ready_nodes() == {"node-0", "node-1"}, "its return", 30)
    eventually(lambda: _both_serve(apps), "its pods", 60)


def test_up_after_everything_was_killed_keeps_the_state(apps: Instance) -> None:
    for pid in cgroups.members(apps.settings.cgroup):
        processes.send(pid, signal.SIGKILL)  # which may have ended with its parent
    eventually(lambda: not cgroups.members(apps.settings.cgroup), "the end of all", 10)
    apps.run("up")
    eventually(lambda: _both_serve(apps), "pods", 60)


def _traces(instance: Instance) -> list[str]:
    """Whatever on the host still belongs to the instance."""
    own = instance.settings
    found = [f"process {pid}" for pid in cgroups.members(own.cgroup)]
    found += [str(path) for root in cgroups.hierarchies() if (path := root / own.cgroup).exists()]
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(own.run) in line]
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(own.state) in line]
    found += [str(path) for path in (own.run, own.state) if path.exists()]
    for command in (
        ["ip", "-o", "link"],
        ["ip", "route", "show", "table", "all"],
        ["iptables-save"],
        ["nft", "list", "ruleset"],
    ):
        try:
            said = subprocess.run(command, capture_output=True, text=True).stdout
        except FileNotFoundError:
            continue
        found += [line for line in said.splitlines() if own.interface in line or "10.231." in line or "KUBE-" in line]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command_line = (process / "cmdline").read_text()
        except OSError:
            continue
        if str(own.run) in command_line or str(own.state) in command_line:
            found.append(f"process {process.name}: {command_line}")
    return found


def test_down_leaves_nothing_behind(apps: Instance) -> None:
    assert _traces(apps)
    apps.run("down")
    assert _traces(apps) == []
    apps.run("down")


@pytest.mark.parametrize("after_seconds", [0.7, 3.0])
def test_an_up_that_was_killed_halfway_can_be_repeated(instance: Instance, after_seconds: float) -> None:
    first = instance.start("up")
    time.sleep(after_seconds)
    first.kill()
    first.communicate()
    instance.run("up")
    assert instance.ready_nodes() == {"node-0", "node-1"}
    supervisor = instance.parts()["supervisor"][1]
    assert supervisor is not None
    os.kill(supervisor, signal.SIGKILL)
    instance.run("down")
    assert _traces(instance) == []
