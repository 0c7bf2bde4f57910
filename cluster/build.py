"""Builds what the cluster runs, once a set of inputs: the Kubernetes multi-call binary and the pause image."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster import oci, shell, tools
from cluster.console import step
from cluster.locks import file_lock
from cluster.settings import KUBERNETES_VERSION, Settings

SOURCES = Path(__file__).resolve().parent
PROGRAMS = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "coredns",
    "cri-pull",
)


@dataclass(frozen=True)
class Image:
    """An image in an archive."""

    reference: str
    archive: Path


def kubernetes(settings: Settings) -> Path:
    """Returns the folder with a link a program to the multi-call binary, building it where needed."""
    flags = _version_flags()
    folder = settings.cache / "kube" / content_hash([SOURCES / "kube"], flags)
    if (folder / "kube").exists():
        return folder
    # Of two that start at once, the second waits and finds it built.
    with file_lock(settings.cache / "build.lock"):
        if not (folder / "kube").exists():
            _build_kubernetes(settings, folder, flags)
    return folder


def pause_image(settings: Settings) -> Image:
    """Returns the image that holds a pod's namespaces, building it where needed."""
    digest = content_hash([SOURCES / "pause", SOURCES / "oci.py"], [])
    image = Image(f"localhost/finetune-pause:{digest}", settings.cache / "pause" / f"{digest}.tar")
    if not image.archive.exists():
        binary = image.archive.with_suffix(".bin")
        with step("building the pause image", "5 s"):
            # Static: the image holds nothing but this file.
            _go_build(settings, SOURCES / "pause", binary, ["-s", "-w"], {"CGO_ENABLED": "0"})
            files = {"pause": binary.read_bytes()}
            oci.write_archive(image.archive, files=files, entrypoint=["/pause"], reference=image.reference)
        binary.unlink()
    return image


def _build_kubernetes(settings: Settings, folder: Path, flags: list[str]) -> None:
    new = folder / ".kube.new"
    folder.mkdir(parents=True, exist_ok=True)
    with step(f"building Kubernetes {KUBERNETES_VERSION} from source", "10 minutes on 2 cores, once"):
        _go_build(settings, SOURCES / "kube", new, flags, {})
    for program in PROGRAMS:
        link = folder / program
        link.unlink(missing_ok=True)
        link.symlink_to("kube")
    # Last: a folder with `kube` in it is complete.
    new.rename(folder / "kube")


def content_hash(paths: Iterable[Path], extra: Iterable[str]) -> str:
    """Returns 12 hex digits that change with the content or name of any file under the paths, or with `extra`."""
    digest = hashlib.sha256()
    for root in paths:
        files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if _is_source(path))
        for file in files:
            name = file.relative_to(root.parent).as_posix()
            digest.update(f"{name}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
    digest.update("\0".join(extra).encode())
    return digest.hexdigest()[:12]


def _is_source(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts


def _version_flags() -> list[str]:
    major, minor, _ = KUBERNETES_VERSION.removeprefix("v").split(".")
    values = {"gitVersion": KUBERNETES_VERSION, "gitMajor": major, "gitMinor": minor}
    flags = ["-s", "-w"]
    for name, value in values.items():
        flags += ["-X", f"k8s.io/component-base/version.{name}={value}"]
    return flags


def _go_build(settings: Settings, source: Path, target: Path, linker_flags: list[str], env: Mapping[str, str]) -> None:
    go = tools.go(settings)
    target.parent.mkdir(parents=True, exist_ok=True)
    log = settings.cache / "log" / f"build-{source.name}.log"
    shell.run(
        [go, "build", "-trimpath", "-buildvcs=false", "-ldflags", " ".join(linker_flags), "-o", target, "."],
        cwd=source,
        # Whatever go.mod asks for must be what is there: no second toolchain is fetched.
        env={"GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly", **env},
        log=log,
        hint="it needs a Go module proxy (GOPROXY) and about 6 GB of disk for Go's caches; what was built is kept",
    )
