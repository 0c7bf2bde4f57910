"""Debian's packages that the built cluster and the image builds need, installed where missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from cluster import shell
from cluster.console import step
from cluster.errors import ClusterError
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


def ensure(settings: Settings, wanted: Mapping[str, str]) -> None:
    """Installs the packages that are missing.

    Raises:
        ClusterError: They cannot be installed here.
    """
    missing = [package for package, proof in wanted.items() if not _is_there(proof)]
    if not missing:
        return
    by_hand = f"install by hand: {' '.join(missing)}"
    if shutil.which("apt-get") is None:
        raise ClusterError(f"missing: {', '.join(missing)}; only Debian and Ubuntu are installed on", hint=by_hand)
    if os.geteuid() != 0:
        raise ClusterError(f"missing: {', '.join(missing)}; installing needs root", hint=by_hand)
    with step(f"installing {', '.join(missing)} with apt-get", "half a minute"):
        env = {"DEBIAN_FRONTEND": "noninteractive"}
        log = settings.cache / "log" / "apt.log"
        shell.run(["apt-get", "update"], env=env, log=log, hint="check the network and the apt sources")
        install = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
        shell.run(install, env=env, log=log, hint=by_hand)


def _is_there(proof: str) -> bool:
    return Path(proof).exists() if proof.startswith("/") else shutil.which(proof, path=shell.SYSTEM_PATH) is not None
