"""Builds the project's images with Docker or buildah, and moves them to where the nodes find them.

An image's tag is the hash of what it is made of, so what is already in the registry is neither built nor pushed.
"""

from __future__ import annotations

import http.client
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cluster import build as builds
from cluster import built, dockerfile, packages, providers, shell
from cluster import node as node_module
from cluster.console import step
from cluster.errors import ClusterError
from cluster.locks import file_lock
from cluster.providers import Provider
from cluster.settings import REPOSITORY, Node, Settings

NAMESPACE = "finetune-operator"
MAX_BUILDS = 3
BASE_IMAGE = "localhost/finetune-base:bookworm"
BASE_PACKAGES = "python3,python3-venv,ca-certificates"
MANIFESTS = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
CA_BUNDLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT", "CURL_CA_BUNDLE")
# Measured on two cores: gzip takes 2.5 times as long, and its layers are an eighth larger.
COMPRESSION = ("--format", "oci", "--compression-format", "zstd", "--compression-level", "1")


def build(settings: Settings, target: str, build_args: Sequence[str], *, push: bool = True) -> str:
    """Builds a target of the repository's Dockerfile unless it is there already.

    Args:
        settings: The instance.
        target: `operator` or `trainer`.
        build_args: `KEY=VALUE`, given to the build and part of the tag.
        push: False builds only, which needs no cluster yet; a later call finds the layers made.

    Returns:
        The reference that pods use.

    Raises:
        ClusterError: There is nowhere to push to, or the build failed.
    """
    info = providers.info(settings)
    if push and info["provider"] == Provider.BUILT:
        _check_registry(settings)
    for _ in range(MAX_BUILDS):
        tag = dockerfile.tag(REPOSITORY, target, build_args)
        reference = _reference(info, f"{NAMESPACE}/{target}:{tag}")
        if push and info["provider"] == Provider.BUILT and _is_in_registry(reference):
            return reference
        _build(settings, info, reference, target, build_args)
        # Someone may save a file during the build: then the image is not what its tag says.
        if dockerfile.tag(REPOSITORY, target, build_args) == tag:
            if push:
                _push(settings, info, reference, target)
            return reference
    raise ClusterError(f"the sources of `{target}` changed during each of {MAX_BUILDS} builds", hint="build again")


def _reference(info: Mapping[str, Any], name: str) -> str:
    if info["registry"]:
        return f"{info['registry']}/{name}"
    if info["provider"] == Provider.KIND:
        return name
    raise ClusterError("no registry to push to", hint="set IMAGE_REGISTRY to one that your cluster pulls from")


def _build(settings: Settings, info: Mapping[str, Any], reference: str, target: str, build_args: Sequence[str]) -> None:
    if _uses_buildah(info):
        _build_with_buildah(settings, reference, target, build_args)
    else:
        _build_with_docker(settings, reference, target, build_args)


def _push(settings: Settings, info: Mapping[str, Any], reference: str, target: str) -> None:
    if _uses_buildah(info):
        _push_with_buildah(settings, reference, target)
    elif info["registry"]:
        shell.run(["docker", "push", reference])
    else:
        with step("loading the image into kind", "10 s for the operator, 2 minutes for the trainer"):
            shell.run(["kind", "load", "docker-image", reference, "--name", settings.name])


def _uses_buildah(info: Mapping[str, Any]) -> bool:
    return bool(info["provider"] == Provider.BUILT) or shutil.which("docker") is None


def load(settings: Settings, reference: str) -> None:
    """Pulls an image on every node of the built cluster at once, so that pods start without waiting.

    Raises:
        ClusterError: A pull failed.
    """
    if providers.choose(settings).provider is not Provider.BUILT:
        return
    program = builds.kubernetes(settings) / "cri-pull"

    def pull(node: Node) -> None:
        endpoint = f"unix://{settings.containerd_socket(node)}"
        shell.run([program, endpoint, reference], hint="is the image in the registry, and the cluster up?")
        _remove_older(settings, node, reference)

    what = f"pulling {reference} on {settings.num_nodes} nodes"
    with step(what, "seconds; 4 minutes for a new torch layer"), ThreadPoolExecutor() as pool:
        list(pool.map(pull, settings.nodes))


def _build_with_docker(settings: Settings, tag: str, target: str, build_args: Sequence[str]) -> None:
    with step(f"building {tag} with docker", "1 minute for the operator, 10 for the trainer"):
        command = ["docker", "build", "--target", target, "--tag", tag, *_arguments(build_args), str(REPOSITORY)]
        shell.run(command, env={"DOCKER_BUILDKIT": "1"}, log=_log(settings, "build", target))


def _build_with_buildah(settings: Settings, reference: str, target: str, build_args: Sequence[str]) -> None:
    packages.ensure(settings, packages.IMAGES)
    _ensure_base_image(settings)
    # The caller's arguments last: of two values, buildah takes the last.
    arguments = ["--build-arg", f"BASE={BASE_IMAGE}", *_arguments(build_args)]
    options = ["--isolation", "chroot", "--network", "host", "--layers", "--target", target, "--tag", reference]
    with step(f"building {reference} with buildah", "1 minute for the operator, 10 for the trainer"):
        shell.run(["buildah", "bud", *options, *arguments, REPOSITORY], log=_log(settings, "build", target))


def _push_with_buildah(settings: Settings, reference: str, target: str) -> None:
    with step(f"pushing {reference}", "seconds; 1 minute for a new torch layer"):
        push = ["buildah", "push", "--tls-verify=false", *COMPRESSION, reference, f"docker://{reference}"]
        shell.run(push, log=_log(settings, "push", target))


def _ensure_base_image(settings: Settings) -> None:
    """Makes a Debian with Python, where no registry can be reached that has one."""
    # Two builds at once would make two, and neither's layers would fit the other.
    with file_lock(settings.cache / "base-image.lock"):
        if shell.succeeds(["buildah", "inspect", "--type", "image", BASE_IMAGE]):
            return
        with step("making the base image with mmdebstrap", "1 minute"):
            _make_base_image(settings)


def _make_base_image(settings: Settings) -> None:
    with TemporaryDirectory(dir=settings.cache) as folder:
        root = Path(folder) / "root.tar"
        bootstrap: list[str | Path] = [
            "mmdebstrap",
            "--variant=minbase",
            f"--include={BASE_PACKAGES}",
            "bookworm",
            root,
        ]
        shell.run(bootstrap, log=settings.cache / "log" / "base-image.log", hint="it needs a Debian mirror")
        container = shell.run(["buildah", "from", "scratch"]).strip()
        try:
            shell.run(["buildah", "add", "--quiet", container, root, "/"])
            shell.run(["buildah", "config", "--env", f"PATH={shell.SYSTEM_PATH}", "--cmd", "python3", container])
            shell.run(["buildah", "commit", "--quiet", container, BASE_IMAGE])
        finally:
            shell.run(["buildah", "rm", container])


def _arguments(build_args: Sequence[str]) -> list[str]:
    arguments = [word for value in build_args for word in ("--build-arg", value)]
    # A proxy with its own certificate authority: a secret, so that no layer keeps it.
    bundle = next((os.environ[name] for name in CA_BUNDLES if Path(os.environ.get(name, "/")).is_file()), None)
    return [*arguments, "--secret", f"id=ca-bundle,src={bundle}"] if bundle else arguments


def _remove_older(settings: Settings, node: Node, reference: str) -> None:
    """Removes the other tags of an image from a node: each may hold gigabytes of layers that nothing will run again.

    A pod that still asks for one gets it from the registry, and what it shares with the new one stays anyway.
    """
    rows = [line.split() for line in shell.run(node_module.ctr_images(settings, node, "ls")).splitlines()[1:]]
    # Each image has three names of one digest: its tag, its digest, and the id that CRI gave it.
    digests = {row[0]: row[2] for row in rows}
    repository = reference.rpartition(":")[0]
    old = {digest for name, digest in digests.items() if name.startswith(f"{repository}:")} - {digests[reference]}
    names = [name for name, digest in digests.items() if digest in old]
    if names:
        shell.run(node_module.ctr_images(settings, node, "rm", *names))


def _log(settings: Settings, step_name: str, target: str) -> Path:
    return settings.cache / "log" / f"{step_name}-{target}.log"


def _check_registry(settings: Settings) -> None:
    if not built.is_running(settings):
        raise ClusterError(f"cluster `{settings.name}` does not run", hint="start it: python3 -m cluster up")


def _is_in_registry(reference: str) -> bool:
    registry, _, name = reference.partition("/")
    repository, _, tag = name.rpartition(":")
    connection = http.client.HTTPConnection(registry, timeout=10)
    try:
        connection.request("HEAD", f"/v2/{repository}/manifests/{tag}", headers={"Accept": MANIFESTS})
        return connection.getresponse().status == 200
    except OSError as error:
        raise ClusterError(f"the registry {registry} does not answer: {error}") from error
    finally:
        connection.close()
