"""The built cluster's life: up, status, down, and what happens to its nodes. The order of steps is here."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from cluster import build, cgroups, controlplane, kubeapi, network, node, packages, parts, pki, shell, supervisor
from cluster.console import say, step
from cluster.errors import ClusterError
from cluster.locks import file_lock
from cluster.settings import Settings

API_TIMEOUT_SECONDS = 90.0


def up(settings: Settings) -> Path:
    """Starts what does not run, waits until the nodes are Ready and DNS answers, and returns the kubeconfig.

    Raises:
        ClusterError: A step failed; the message names its log.
    """
    if os.geteuid() != 0:
        raise ClusterError("the built cluster needs root", hint="run as root, or set KUBECONFIG to a cluster of yours")
    start = time.monotonic()
    packages.ensure(settings, packages.CLUSTER)
    binaries = build.kubernetes(settings)
    pause = build.pause_image(settings)
    with _lock(settings):
        _check_unchanged(settings)
        _prepare(settings, pause)
        parts.write(settings, _all_parts(settings, binaries))
        supervisor.start(settings)
        _import_pause(settings, pause)
        _wait_until_usable(settings)
        shutil.copy(settings.pki / "admin.kubeconfig", settings.kubeconfig)
        settings.kubeconfig.chmod(0o600)
    say(f"cluster `{settings.name}` is up ({time.monotonic() - start:.1f} s)")
    return settings.kubeconfig


def down(settings: Settings, *, purge: bool) -> None:
    """Removes everything that runs and everything that was made for it; the cache only with `purge`.

    Raises:
        ClusterError: Somebody else runs it, or a process does not die.
    """
    if os.geteuid() != 0 and cgroups.members(settings.cgroup):
        raise ClusterError(f"cluster `{settings.name}` was started by root", hint="run as root")
    with _lock(settings):
        _kill_everything(settings)
        network.remove(settings)
        _unmount_run(settings)
        shutil.rmtree(settings.run, ignore_errors=True)
        shutil.rmtree(settings.state, ignore_errors=True)
        if purge:
            shutil.rmtree(settings.instance_cache, ignore_errors=True)
            # The binaries are shared: they go with the last instance.
            if not any(path.is_dir() for path in settings.instance_cache.parent.iterdir()):
                shutil.rmtree(settings.cache, ignore_errors=True)
    say(f"cluster `{settings.name}` is down")


def is_running(settings: Settings) -> bool:
    """Tells whether the instance has been started and answers."""
    return settings.pki.exists() and _client(settings).ready()


def status(settings: Settings) -> str:
    """Returns a table of the parts."""
    seen, held = parts.read_seen(settings), parts.held(settings)
    rows: list[tuple[str, ...]] = [("PART", "STATE", "PID", "RESTARTS", "LOG")]
    master = supervisor.running(settings)
    rows.append(_row("supervisor", "up" if master else "down", master.pid if master else None, 0, settings))
    for part in parts.read(settings):
        one = seen.get(part.name)
        process = one.process if one and one.process and one.process.alive() else None
        state = "up" if process else ("stopped" if part.name in held else "down")
        rows.append(_row(part.name, state, process.pid if process else None, one.restarts if one else 0, settings))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def change_node(settings: Settings, action: str, name: str) -> None:
    """Stops, kills or starts a node.

    Raises:
        ClusterError: There is no such node, or the cluster does not run.
    """
    target = settings.node(name)
    if not supervisor.running(settings):
        raise ClusterError(f"cluster `{settings.name}` does not run", hint="start it: python3 -m cluster up")
    with _lock(settings):
        if action == "stop":
            node.stop(settings, target)
        elif action == "kill":
            node.kill(settings, target)
        else:
            network.ensure_node(settings, target)
            node.start(settings, target, build.pause_image(settings).reference)


def _check_unchanged(settings: Settings) -> None:
    """Refuses to go on with an instance that was made with another network or number of nodes."""
    shape = json.dumps({"cidr": str(settings.cidr), "nodes": settings.num_nodes})
    made_with = settings.state / "shape.json"
    if not settings.pki.exists():
        parts.write_atomically(made_with, shape)
    elif made_with.exists() and made_with.read_text() != shape:
        raise ClusterError(
            f"cluster `{settings.name}` exists with {made_with.read_text()}, asked for is {shape}",
            hint="`python3 -m cluster down` first, or choose another FINETUNE_CLUSTER_NAME",
        )


def _prepare(settings: Settings, pause: build.Image) -> None:
    fresh = not settings.pki.exists()
    if supervisor.running(settings):
        for one in settings.nodes:
            if parts.held(settings) & {node.part_name(one, daemon) for daemon in node.DAEMONS}:
                network.ensure_node(settings, one)
                node.start(settings, one, pause.reference)
        return
    network.check_cidr_is_free(settings)
    say(f"- {'making' if fresh else 'repairing'} cluster `{settings.name}` on {settings.cidr}")
    _mount_run(settings)
    pki.ensure(settings)
    network.ensure(settings)
    controlplane.prepare(settings)
    for one in settings.nodes:
        node.prepare(settings, one, pause.reference)
        for daemon in node.DAEMONS:
            parts.release(settings, node.part_name(one, daemon))


def _all_parts(settings: Settings, binaries: Path) -> list[parts.Part]:
    nodes = [part for one in settings.nodes for part in node.build_parts(settings, one, binaries)]
    return controlplane.build_parts(settings, binaries) + nodes


def _import_pause(settings: Settings, pause: build.Image) -> None:
    for one in settings.nodes:
        list_images = node.ctr_images(settings, one, "ls", "--quiet")
        log = parts.log(settings, node.part_name(one, "containerd"))
        _wait(f"{one.name}'s containerd", partial(shell.succeeds, list_images), 30, log)
        if pause.reference not in shell.run(list_images).split():
            command = node.ctr_images(settings, one, "import", str(pause.archive))
            shell.run(command, log=settings.logs / "import.log")


def _wait_until_usable(settings: Settings) -> None:
    client = _client(settings)
    if not client.ready():
        with step("waiting for the API server", "5 s"):
            log = parts.log(settings, "kube-apiserver")
            _wait("the API server", client.ready, API_TIMEOUT_SECONDS, log)
    _wait("the API server's rights", lambda: _apply_base(settings, client), 20, parts.log(settings, "kube-apiserver"))
    if not _all_ready(settings, client):
        with step("waiting for the nodes to be Ready", "5 s"):
            log = parts.log(settings, node.part_name(settings.nodes[0], "kubelet"))
            _wait("the nodes", lambda: _all_ready(settings, client), 60, log)
    # A pod that is made before its namespace has a service account is refused.
    account = "/api/v1/namespaces/default/serviceaccounts/default"
    _wait("service accounts", lambda: client.exists(account), 30, parts.log(settings, "kube-controller-manager"))
    _wait("DNS", lambda: _dns_answers(settings), 30, parts.log(settings, "coredns"))


def _apply_base(settings: Settings, client: kubeapi.Client) -> bool:
    try:
        controlplane.apply_base(settings, client)
    except kubeapi.ApiError as error:
        # Namespaces and quota caches fill a moment after the server calls itself ready.
        if error.status in (0, 403, 404, 409, 500, 503):
            return False
        raise ClusterError(f"cannot apply the base objects: {error}") from error
    return True


def _all_ready(settings: Settings, client: kubeapi.Client) -> bool:
    try:
        items = client.items("/api/v1/nodes")
    except kubeapi.ApiError:
        return False
    ready = {
        item["metadata"]["name"]
        for item in items
        for condition in item["status"].get("conditions", [])
        if condition["type"] == "Ready" and condition["status"] == "True"
    }
    return {one.name for one in settings.nodes} <= ready


def _dns_answers(settings: Settings) -> bool:
    """Asks the kube-dns Service for the API server's name, which proves CoreDNS, kube-proxy and the routes."""
    name = b"".join(
        bytes([len(label)]) + label.encode() for label in ["kubernetes", "default", "svc", "cluster", "local"]
    )
    query = struct.pack(">HHHHHH", 1, 0x0100, 1, 0, 0, 0) + name + b"\0" + struct.pack(">HH", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        connection.settimeout(0.3)
        try:
            connection.sendto(query, (settings.dns_service_ip, 53))
            answer = connection.recv(512)
        except OSError:
            return False
    return answer.endswith(socket.inet_aton(settings.api_service_ip))


def _wait(what: str, condition: Callable[[], bool], timeout_seconds: float, log: Path) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{what}: no answer after {timeout_seconds:.0f} s",
                hint="see the log; `python3 -m cluster status` lists what is down, `down` and `up` start afresh",
                log=log,
            )
        time.sleep(0.1)


def _kill_everything(settings: Settings) -> None:
    # The supervisor first, or it would restart what is killed.
    if master := supervisor.running(settings):
        master.kill()
    count = cgroups.kill(settings.cgroup)
    if count:
        say(f"- killed {count} processes")
    cgroups.remove(settings.cgroup)
    node.remove_all_mounts(settings)


def _mount_run(settings: Settings) -> None:
    """Mounts the folder for what does not outlive a reboot: mount namespaces can only be kept on a private mount."""
    if settings.run.is_mount():
        return
    settings.run.mkdir(parents=True, exist_ok=True)
    shell.run(["mount", "-t", "tmpfs", "-o", "mode=755", settings.interface, settings.run])
    shell.run(["mount", "--make-private", settings.run])


def _unmount_run(settings: Settings) -> None:
    while settings.run.is_mount():
        # Lazily: somebody's shell may stand in it.
        shell.run(["umount", "--lazy", settings.run])


def _lock(settings: Settings) -> AbstractContextManager[None]:
    """One command at a time changes the instance; a second waits."""
    return file_lock(settings.cache / "instances" / f".{settings.name}.lock")


def _client(settings: Settings) -> kubeapi.Client:
    return kubeapi.Client(settings.api_url, settings.pki, "admin")


def _row(name: str, state: str, pid: int | None, restarts: int, settings: Settings) -> tuple[str, ...]:
    return (name, state, str(pid or "-"), str(restarts), str(parts.log(settings, name)))
