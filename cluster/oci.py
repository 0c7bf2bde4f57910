"""Packs one static binary as an OCI image archive, without any image tool."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"


def write_archive(path: Path, *, files: dict[str, bytes], entrypoint: list[str], reference: str) -> None:
    """Writes an OCI archive of one uncompressed layer; the same input gives the same bytes.

    Args:
        path: The archive to write.
        files: Content by path in the image; all of it is executable.
        entrypoint: What the image runs.
        reference: The name that it is imported under.
    """
    layer = _tar({name: (content, 0o755) for name, content in files.items()})
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": entrypoint, "User": "65535:65535"},
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        "history": [{"created_by": "finetune-cluster"}],
    }
    config_bytes = json.dumps(config).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": _descriptor(CONFIG, config_bytes),
        "layers": [_descriptor(LAYER, layer)],
    }
    manifest_bytes = json.dumps(manifest).encode()
    names = {"io.containerd.image.name": reference, "org.opencontainers.image.ref.name": reference}
    index = {"schemaVersion": 2, "manifests": [{**_descriptor(MANIFEST, manifest_bytes), "annotations": names}]}
    blobs = {f"blobs/sha256/{_digest(blob)[7:]}": blob for blob in (layer, config_bytes, manifest_bytes)}
    content = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": json.dumps(index).encode(), **blobs}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(_tar({name: (blob, 0o644) for name, blob in content.items()}))
    new.replace(path)


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _descriptor(media_type: str, content: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": _digest(content), "size": len(content)}


def _tar(files: dict[str, tuple[bytes, int]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, (content, mode) in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()
