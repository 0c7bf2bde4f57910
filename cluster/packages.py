"""Debian's packages that the built cluster and the image builds need, installed where missing."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from cluster import shell
from cluster.console import step
from cluster.errors import ClusterError
from cluster.locks import file_lock
from cluster.settings import Settings

# What proves that a package is there, by package. Paths where the program is not on PATH.
CLUSTER: Mapping[str, str] = {
    "containerd": "containerd",
    "runc": "runc",
    "containernetworking-plugins": "/usr/lib/cni/ptp",
    "docker-registry": "docker-registry",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ethtool": "ethtool",
    "socat": "socat",
    "iproute2": "ip",
    "procps": "sysctl",
    "openssl": "openssl",
}
IMAGES: Mapping[str, str] = {"buildah": "buildah", "mmdebstrap": "mmdebstrap", "skopeo": "skopeo"}


LOCK_WAIT_SECONDS = 600.0
"""A new machine's own updates may hold apt's locks so long."""
LOCK_POLL_SECONDS = 2.0


def ensure(settings: Settings, wanted: Mapping[str, str]) -> None:
    """Installs the packages that are missing. Of two that ask at once, the second waits.

    Raises:
        ClusterError: They cannot be installed here.
    """
    if not _missing(wanted):
        return
    with file_lock(settings.cache / "apt.lock"):
        missing = _missing(wanted)
        if missing:
            _install(missing, settings.cache / "log" / "apt.log")


def _missing(wanted: Mapping[str, str]) -> list[str]:
    return [package for package, proof in wanted.items() if not _is_there(proof)]


def _install(names: list[str], log: Path) -> None:
    by_hand = f"install by hand: {' '.join(names)}"
    if shutil.which("apt-get") is None:
        raise ClusterError(f"missing: {', '.join(names)}; only Debian and Ubuntu are installed on", hint=by_hand)
    if os.geteuid() != 0:
        raise ClusterError(f"missing: {', '.join(names)}; installing needs root", hint=by_hand)
    with step(f"installing {', '.join(names)} with apt-get", "half a minute"):
        _apt_get(["update"], log, "check the network and the apt sources")
        _apt_get(["install", "-y", "--no-install-recommends", *names], log, by_hand)


def _apt_get(arguments: list[str], log: Path, hint: str) -> None:
    """Runs apt-get, and waits while another program holds its locks: `apt-get update` itself gives up at once."""
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    while True:
        try:
            shell.run(["apt-get", *arguments], env={"DEBIAN_FRONTEND": "noninteractive"}, log=log, hint=hint)
            return
        except ClusterError as error:
            if "Could not get lock" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(LOCK_POLL_SECONDS)


def _is_there(proof: str) -> bool:
    return Path(proof).exists() if proof.startswith("/") else shutil.which(proof, path=shell.SYSTEM_PATH) is not None
