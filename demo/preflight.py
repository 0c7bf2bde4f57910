"""What the demo and the tests need from the machine, told in one message before anything starts. Standard library only."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

MIN_PYTHON = (3, 11)
BELOW_PYTHON = (3, 14)
FREE_GIB = 40
"""Two images, the cluster's copies of them, and what is unpacked in between."""
LOCAL_FREE_GIB = 16
"""The environment with torch for CUDA, uv's copy of it where that is on another file system, the model."""
MEMORY_GIB = 7


def problems() -> list[str]:
    """Returns what is missing, each with what to do; empty where all is there."""
    found = _basics("demo")
    if sys.platform != "linux":
        return found
    if not (_kubeconfig() or _docker_answers() or os.geteuid() == 0):
        found.append(
            "A cluster is needed: set KUBECONFIG to one, or start Docker (kind is used then), or run this as root"
            " (sudo make demo), which builds a cluster of its own from Kubernetes' sources."
        )
    elif os.geteuid() == 0 and not _kubeconfig() and not _docker_answers() and shutil.which("apt-get") is None:
        found.append("To build a cluster, Debian or Ubuntu is needed (`apt-get` was not found); or set KUBECONFIG.")
    free_gib = shutil.disk_usage(Path.home()).free / 2**30
    if free_gib < FREE_GIB and not _built_before():
        found.append(f"{FREE_GIB} GiB of free disk are needed in {Path.home()}, there are {free_gib:.0f}.")
    return found


def local_problems() -> list[str]:
    """The same for what needs no cluster: `make run`."""
    found = _basics("run")
    free_gib = shutil.disk_usage(Path.home()).free / 2**30
    if free_gib < LOCAL_FREE_GIB and not _built_before():
        found.append(f"{LOCAL_FREE_GIB} GiB of free disk are needed in {Path.home()}, there are {free_gib:.0f}.")
    return found


def _basics(target: str) -> list[str]:
    if sys.platform != "linux":
        return [f"Linux is needed (Debian or Ubuntu), this is {platform.system()}."]
    found = []
    if not MIN_PYTHON <= sys.version_info[:2] < BELOW_PYTHON:
        version = ".".join(map(str, sys.version_info[:2]))
        found.append(f"Python 3.11, 3.12 or 3.13 is needed, `python3` is {version}: make {target} PYTHON=python3.12")
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if memory_gib < MEMORY_GIB:
        found.append(f"{MEMORY_GIB} GiB of memory are needed, there are {memory_gib:.1f}.")
    return found


def cache_dir() -> Path:
    """Where everything is kept that outlives a checkout."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-operator"


def _built_before() -> bool:
    return (cache_dir() / "assets").is_dir()


def _kubeconfig() -> bool:
    return Path(os.environ.get("KUBECONFIG", "")).is_file()


def _docker_answers() -> bool:
    try:
        return subprocess.run(["docker", "info"], capture_output=True, timeout=20, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
