"""The `standard` StorageClass: a folder of the host a claim, the same folder on every node.

Folders are world-writable: `fsGroup` does not apply to hostPath, and restricted pods do not run as root. A poll a
second of two short lists costs the API server next to nothing, and cannot miss an event.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from cluster.console import say
from cluster.controlplane import PROVISIONER, STORAGE_CLASS
from cluster.kubeapi import ApiError, Client, Object
from cluster.settings import Settings

POLL_SECONDS = 1.0
PROVISIONED_BY = "pv.kubernetes.io/provisioned-by"
VOLUMES = "/api/v1/persistentvolumes"


def provision(settings: Settings) -> None:
    """Serves claims until killed."""
    client = Client(settings.api_url, settings.pki, "provisioner")
    while True:
        try:
            reconcile(client, settings.volumes)
        except ApiError as error:
            say(f"{error}")
        time.sleep(POLL_SECONDS)


def reconcile(client: Client, folder: Path) -> None:
    """Gives every pending claim its volume, and removes every released one with its folder."""
    volumes = client.items(VOLUMES)
    names = {volume["metadata"]["name"] for volume in volumes}
    for claim in client.items("/api/v1/persistentvolumeclaims"):
        if _wants_volume(claim) and _volume_name(claim) not in names:
            _create(client, folder, claim)
    for volume in volumes:
        ours = volume["metadata"].get("annotations", {}).get(PROVISIONED_BY) == PROVISIONER
        if ours and volume["status"].get("phase") == "Released":
            _delete(client, folder, volume)


def build_volume(claim: Object, path: Path) -> Object:
    """Returns the volume for a claim, bound to it from the start so that no other claim can take it."""
    metadata, spec = claim["metadata"], claim["spec"]
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": _volume_name(claim), "annotations": {PROVISIONED_BY: PROVISIONER}},
        "spec": {
            "storageClassName": STORAGE_CLASS,
            "capacity": {"storage": spec["resources"]["requests"]["storage"]},
            "accessModes": spec["accessModes"],
            "persistentVolumeReclaimPolicy": "Delete",
            "hostPath": {"path": str(path), "type": "Directory"},
            "claimRef": {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "namespace": metadata["namespace"],
                "name": metadata["name"],
                "uid": metadata["uid"],
            },
        },
    }


def _wants_volume(claim: Object) -> bool:
    spec = claim["spec"]
    return (
        spec.get("storageClassName") == STORAGE_CLASS
        and not spec.get("volumeName")
        and not spec.get("selector")
        and claim["status"].get("phase") == "Pending"
        and "deletionTimestamp" not in claim["metadata"]
    )


def _volume_name(claim: Object) -> str:
    return f"pvc-{claim['metadata']['uid']}"


def _create(client: Client, folder: Path, claim: Object) -> None:
    path = folder / _volume_name(claim)
    path.mkdir(parents=True, exist_ok=True)
    # mkdir's own mode is cut by the umask.
    path.chmod(0o777)
    client.request("POST", VOLUMES, build_volume(claim, path))


def _delete(client: Client, folder: Path, volume: Object) -> None:
    name = volume["metadata"]["name"]
    shutil.rmtree(folder / name, ignore_errors=True)
    client.delete(f"{VOLUMES}/{name}")
