"""The cgroups of an instance, on v1, hybrid and v2 hosts.

The kernel keeps a process in its cgroup however it is orphaned, so the instance's cgroup is the one list of its
processes that survives any crash: `down` empties it, and can hit nothing else.
"""

from __future__ import annotations

import os
import signal
import time
from functools import cache
from pathlib import Path

from cluster import processes
from cluster.errors import ClusterError

ROOT = Path("/sys/fs/cgroup")


@cache
def is_v2() -> bool:
    """Tells whether the host has only the unified hierarchy."""
    return (ROOT / "cgroup.controllers").exists()


@cache
def hierarchies() -> tuple[Path, ...]:
    """Every hierarchy that a container runtime makes cgroups in."""
    if is_v2():
        return (ROOT,)
    # cpu and cpuacct may be links to one mount.
    return tuple(sorted({p.resolve() for p in ROOT.iterdir() if (p / "cgroup.procs").exists()}))


def tracking() -> Path:
    """The hierarchy in which every process of the instance is kept: runc joins `pids` wherever it is mounted."""
    return ROOT if is_v2() else ROOT / "pids"


def create(group: str) -> None:
    """Makes a cgroup in every hierarchy, with its controllers enabled for children (v2)."""
    for hierarchy in hierarchies():
        path = hierarchy
        for name in group.split("/"):
            if is_v2():
                _delegate(path)
            path = path / name
            path.mkdir(exist_ok=True)
        if is_v2():
            _delegate(path)


def create_leaf(group: str) -> Path:
    """Makes a cgroup for processes in the tracking hierarchy and returns its cgroup.procs."""
    path = tracking() / group
    path.mkdir(parents=True, exist_ok=True)
    return path / "cgroup.procs"


def members(group: str) -> list[int]:
    """Returns the pids in the cgroup and below."""
    found: list[int] = []
    for folder, _, _ in os.walk(tracking() / group):
        try:
            found += [int(line) for line in Path(folder, "cgroup.procs").read_text().split()]
        except OSError:
            # Removed between the walk and the read; ENODEV is what the kernel says then.
            continue
    return [pid for pid in found if pid]


def kill(group: str, timeout_seconds: float = 30) -> int:
    """Kills every process in the cgroup and below, until none is left.

    Returns:
        How many were there at first.

    Raises:
        ClusterError: Some are still there after the time (stuck in the kernel).
    """
    first = len(members(group))
    deadline = time.monotonic() + timeout_seconds
    # A zombie keeps its place in the cgroup until its parent reaps it, and is nothing to wait for.
    while living := [pid for pid in members(group) if processes.find(pid)]:
        for pid in living:
            processes.send(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise ClusterError(f"processes {living} do not die", hint="they hang in the kernel: see `dmesg`")
        time.sleep(0.05)
    return first


def remove(group: str) -> None:
    """Removes the (empty) cgroup and all below it from every hierarchy."""
    for hierarchy in hierarchies():
        for folder, _, _ in os.walk(hierarchy / group, topdown=False):
            _rmdir(Path(folder))


def _rmdir(path: Path, timeout_seconds: float = 5) -> None:
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            path.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError as error:
            # A killed process leaves its cgroup a moment after it is gone from /proc.
            if time.monotonic() > deadline:
                raise ClusterError(f"cannot remove the cgroup {path}: {error}") from error
            time.sleep(0.05)


def _delegate(path: Path) -> None:
    controllers = (path / "cgroup.controllers").read_text().split()
    for controller in controllers:
        try:
            (path / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError:
            # Some controllers (rdma, misc) cannot be delegated everywhere; kubelet names the ones that it misses.
            continue
