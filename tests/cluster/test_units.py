"""The parts of the cluster package that need no cluster."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cluster import build, dockerfile, oci, packages, parts, providers, settings, storage
from cluster.errors import ClusterError
from cluster.parts import Part, Seen
from cluster.processes import Process, command_line, find
from cluster.supervisor import Supervisor


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"FINETUNE_CLUSTER_NAME": "Upper"}, "FINETUNE_CLUSTER_NAME"),
        ({"FINETUNE_CLUSTER_NAME": "longer-than-allowed"}, "FINETUNE_CLUSTER_NAME"),
        ({"FINETUNE_CLUSTER_NAME": "a/../b"}, "FINETUNE_CLUSTER_NAME"),
        ({"FINETUNE_CLUSTER_CIDR": "10.0.0.0/24"}, "must be a /16"),
        ({"FINETUNE_CLUSTER_CIDR": "10.0.0.1/16"}, "FINETUNE_CLUSTER_CIDR"),
        ({"FINETUNE_CLUSTER_NODES": "0"}, "FINETUNE_CLUSTER_NODES"),
        ({"FINETUNE_CLUSTER_NODES": "many"}, "FINETUNE_CLUSTER_NODES"),
    ],
)
def test_a_bad_setting_is_refused_by_name(env: dict[str, str], said: str) -> None:
    with pytest.raises(ClusterError, match=said):
        settings.load(env)


def test_all_addresses_lie_in_the_cidr_and_none_twice() -> None:
    loaded = settings.load({"FINETUNE_CLUSTER_CIDR": "10.7.0.0/16", "FINETUNE_CLUSTER_NODES": "16"})
    ranges = [loaded.service_cidr, *(node.pod_cidr for node in loaded.nodes)]
    assert all(one.subnet_of(loaded.cidr) for one in ranges)
    assert not any(a.overlaps(b) for a in ranges for b in ranges if a is not b)
    assert all(node.pod_cidr.subnet_of(loaded.pods_cidr) for node in loaded.nodes)
    assert (loaded.gateway, loaded.api_service_ip, loaded.dns_service_ip) == ("10.7.0.1", "10.7.128.1", "10.7.128.10")


def test_two_instances_share_nothing() -> None:
    one = settings.load({"HOME": "/h"})
    other = settings.load({"HOME": "/h", "FINETUNE_CLUSTER_NAME": "other", "FINETUNE_CLUSTER_CIDR": "10.9.0.0/16"})
    for name in ("interface", "cgroup", "state", "run", "instance_cache", "registry", "api_url"):
        assert getattr(one, name) != getattr(other, name)


def test_flags_of_a_part_come_from_the_environment() -> None:
    loaded = settings.load({"FINETUNE_CLUSTER_ARGS_KUBE_CONTROLLER_MANAGER": "--a=1 '--b=2 3'"})
    assert loaded.extra_args == {"kube-controller-manager": ("--a=1", "--b=2 3")}


DOCKERFILE = """
ARG BASE=python
FROM ${BASE} AS tools
COPY images/install /tools/
FROM tools AS lock
COPY pyproject.toml uv.lock ./
# COPY commented out
FROM ${BASE} AS operator
COPY --from=lock /lock /lock
COPY --chown=1:1 \\
  operator/core app
FROM ${BASE} AS trainer
RUN --mount=type=bind,from=tools,source=/tools,target=/tools true
COPY trainer .
"""


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("operator", ["images/install", "operator/core", "pyproject.toml", "uv.lock"]),
        ("trainer", ["images/install", "trainer"]),
    ],
)
def test_a_target_is_made_of_what_its_stages_copy(target: str, expected: list[str]) -> None:
    assert dockerfile.inputs(DOCKERFILE, target) == expected


def test_an_unknown_target_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ClusterError) as refused:
        dockerfile.inputs(DOCKERFILE, "nothing")
    assert "operator, trainer" in refused.value.report()


def test_a_tag_changes_with_a_source_and_not_with_a_neighbour(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM x AS one\nCOPY src .\n")
    (tmp_path / "src" / "__pycache__").mkdir(parents=True)
    (tmp_path / "src" / "a.py").write_text("1")
    first = dockerfile.tag(tmp_path, "one", [])
    (tmp_path / "other").write_text("2")
    (tmp_path / "src" / "__pycache__" / "a.pyc").write_text("2")
    assert dockerfile.tag(tmp_path, "one", []) == first
    assert dockerfile.tag(tmp_path, "one", ["A=1"]) != first
    (tmp_path / "src" / "a.py").write_text("2")
    assert dockerfile.tag(tmp_path, "one", []) != first


def test_the_hash_sees_a_renamed_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    first = build.content_hash([tmp_path], [])
    (tmp_path / "a").rename(tmp_path / "b")
    assert build.content_hash([tmp_path], []) != first


def test_an_archive_is_the_same_each_time_and_names_its_image(tmp_path: Path) -> None:
    for name in ("one.tar", "two.tar"):
        oci.write_archive(tmp_path / name, files={"pause": b"x"}, entrypoint=["/pause"], reference="localhost/pause:1")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    with tarfile.open(tmp_path / "one.tar") as archive:
        index = archive.extractfile("index.json")
        assert index is not None
        manifest = json.load(io.BytesIO(index.read()))["manifests"][0]
    assert manifest["annotations"]["io.containerd.image.name"] == "localhost/pause:1"


def _claim(**spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"namespace": "n", "name": "c", "uid": "u-1"},
        "spec": {
            "storageClassName": "standard",
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": "2Gi"}},
            **spec,
        },
        "status": {"phase": "Pending"},
    }


class FakeApi:
    """Answers two lists and keeps what is written."""

    def __init__(self, claims: list[dict[str, Any]], volumes: list[dict[str, Any]]) -> None:
        self.claims, self.volumes = claims, volumes
        self.written: list[tuple[str, str]] = []

    def items(self, path: str) -> list[dict[str, Any]]:
        return self.volumes if path == storage.VOLUMES else self.claims

    def request(self, method: str, path: str, body: dict[str, Any]) -> None:
        self.written.append((method, body["metadata"]["name"]))

    def delete(self, path: str) -> None:
        self.written.append(("DELETE", path.rpartition("/")[2]))


def _volume(phase: str, provisioner: str = storage.PROVISIONER) -> dict[str, Any]:
    return {
        "metadata": {"name": "pvc-u-1", "annotations": {storage.PROVISIONED_BY: provisioner}},
        "status": {"phase": phase},
    }


@pytest.mark.parametrize(
    ("claims", "volumes", "written"),
    [
        pytest.param([_claim()], [], [("POST", "pvc-u-1")], id="pending"),
        pytest.param([_claim()], [_volume("Available")], [], id="already made"),
        pytest.param([_claim(storageClassName="other")], [], [], id="another class"),
        pytest.param([_claim(volumeName="v")], [], [], id="names its volume"),
        pytest.param([], [_volume("Released")], [("DELETE", "pvc-u-1")], id="released"),
        pytest.param([], [_volume("Bound")], [], id="bound"),
        pytest.param([], [_volume("Released", "someone/else")], [], id="another's"),
    ],
)
def test_the_provisioner(
    tmp_path: Path, claims: list[dict[str, Any]], volumes: list[dict[str, Any]], written: list[tuple[str, str]]
) -> None:
    api = FakeApi(claims, volumes)
    storage.reconcile(api, tmp_path)  # type: ignore[arg-type]
    assert api.written == written


def test_a_volumes_folder_is_writable_by_all_and_goes_with_it(tmp_path: Path) -> None:
    storage.reconcile(FakeApi([_claim()], []), tmp_path)  # type: ignore[arg-type]
    folder = tmp_path / "pvc-u-1"
    assert folder.stat().st_mode & 0o777 == 0o777
    storage.reconcile(FakeApi([], [_volume("Released")]), tmp_path)  # type: ignore[arg-type]
    assert not folder.exists()


def test_a_process_is_not_another_with_its_pid() -> None:
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(b"started")
    child.stdin.flush()
    assert child.stdout.read(7) == b"started"
    process = find(child.pid)
    assert process is not None and process.alive()
    assert command_line(child.pid) == ("cat",)
    assert not Process(process.pid, process.start_ticks + 1).alive()
    process.kill()
    # A zombie until it is waited for, and dead all the same.
    deadline_reads = (process.alive() for _ in range(10_000_000))
    assert False in deadline_reads
    child.wait()


def test_what_runs_is_remembered_across_supervisors(tmp_path: Path) -> None:
    own = settings.load({"HOME": str(tmp_path)})
    part = Part("one", ("sleep", "60"), cgroup="x")
    parts.write(own, [part])
    assert parts.read(own) == [part]
    me = find(os.getpid())
    parts.write_seen(own, {"one": Seen(me, 3, part.argv)})
    supervisor = Supervisor(own)
    supervisor.adopt()
    assert supervisor.slots["one"].process == me and supervisor.slots["one"].restarts == 3
    supervisor.tick()
    assert supervisor.slots["one"].process == me


def _with_fake(tmp_path: Path, **programs: str) -> dict[str, str]:
    for name, script in programs.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("FINETUNE_", "KUBECONFIG"))}
    return {**clean, "PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}


def _run(env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster", *words]
    return subprocess.run(command, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True, timeout=60)


def test_docker_without_kind_says_what_to_do(tmp_path: Path) -> None:
    done = _run(_with_fake(tmp_path, docker="exit 0"), "up")
    assert done.returncode == 1 and done.stdout == ""
    assert "`kind` is not installed" in done.stderr and "hint:" in done.stderr


def test_nodes_of_another_provider_are_left_alone(tmp_path: Path) -> None:
    done = _run(_with_fake(tmp_path, docker="exit 0", kind="exit 0"), "node", "stop", "node-0")
    assert done.returncode == 1
    assert "works on the built cluster only" in done.stderr and "`kind`" in done.stderr


def test_an_unknown_provider_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CLUSTER_PROVIDER", "minikube")
    with pytest.raises(ClusterError, match="kubeconfig, kind, built"):
        providers.choose(settings.load())


def test_kind_is_created_once_with_two_workers(tmp_path: Path) -> None:
    kind = f'echo "$@" >> {tmp_path}/calls; [ "$1" = create ] && cat >> {tmp_path}/config; exit 0'
    done = _run(_with_fake(tmp_path, docker="exit 0", kind=kind), "up")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("kind-finetune.kubeconfig")
    assert (tmp_path / "config").read_text().count("worker") == 2
    assert "create cluster" in (tmp_path / "calls").read_text()


def test_two_that_want_packages_at_once_do_not_meet_in_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The apt-get of this test refuses while another one runs, as the real one does."""
    folder, installed = tmp_path / "bin", tmp_path / "installed"
    folder.mkdir()
    script = folder / "apt-get"
    script.write_text(
        f"""#!/bin/sh
        mkdir {tmp_path}/lock 2> /dev/null || {{ echo 'E: Could not get lock /var/lib/apt/lists/lock'; exit 100; }}
        sleep 0.2
        [ "$1" = update ] || touch {installed}
        rmdir {tmp_path}/lock
        """
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(packages, "LOCK_POLL_SECONDS", 0.05)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    asked = settings.load({"XDG_CACHE_HOME": str(tmp_path / "cache"), "XDG_STATE_HOME": str(tmp_path / "state")})
    (tmp_path / "lock").mkdir()  # a stranger's update
    threads = [Thread(target=packages.ensure, args=(asked, {"one": str(installed)})) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    assert not installed.exists()
    (tmp_path / "lock").rmdir()
    for thread in threads:
        thread.join(10)
    assert installed.exists()
