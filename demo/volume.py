"""Puts the model and the data on a volume of the cluster, by way of a pod that mounts it."""

from typing import Any

from demo.assets import MODEL, Assets
from demo.commands import ROOT, CommandError
from demo.kube import Kubectl

CLAIM = "finetune"
POD = "volume"
MARKER = "/mnt/.assets"
SIZE = "20Gi"


def fill(kubectl: Kubectl, image: str, assets: Assets, *, access_mode: str = "ReadWriteMany") -> None:
    """Makes the claim and fills it, unless it holds these very assets.

    Args:
        kubectl: in the namespace of the claim.
        image: the trainer's; it converts the model where no earlier run has.
        assets: what to put there.
        access_mode: of the claim; ReadWriteOnce where the storage class has nothing better and all jobs fit one node.

    Raises:
        CommandError: the pod did not start, or a copy failed.
    """
    claim(kubectl, access_mode)
    start_pod(kubectl, image)
    if kubectl.shell(POD, f"cat {MARKER} 2>/dev/null || true").strip() != assets.digest:
        _copy(kubectl, assets)
    kubectl("delete", "pod", POD, "--wait=false", "--grace-period=1")


def claim(kubectl: Kubectl, access_mode: str) -> None:
    """Makes the claim, with the cluster's default storage class."""
    if kubectl.find("persistentvolumeclaim", CLAIM) is None:
        spec = {"accessModes": [access_mode], "resources": {"requests": {"storage": SIZE}}}
        kubectl.apply({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": CLAIM}, "spec": spec})


def start_pod(kubectl: Kubectl, image: str) -> None:
    """Starts a pod that mounts the claim at /mnt and waits to be told what to do."""
    kubectl("delete", "pod", POD, "--ignore-not-found", "--grace-period=1", "--wait=true")
    kubectl.apply(pod_manifest(image))
    try:
        kubectl("wait", "pod", POD, "--for=condition=Ready", "--timeout=600s", timeout=620)
    except CommandError as error:
        events = kubectl("get", "events", "--field-selector", f"involvedObject.name={POD}", "-o", "wide")
        raise CommandError(
            f"the pod that fills the volume did not start:\n{events[-1500:]}",
            "look at the claim and the image: kubectl describe pvc,pod",
        ) from error


def pod_manifest(image: str) -> dict[str, Any]:
    """The pod, as the restricted Pod Security level wants it."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": POD},
        "spec": {
            "automountServiceAccountToken": False,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 1000,
                "runAsGroup": 1000,
                "fsGroup": 1000,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "volume",
                    "image": image,
                    "command": ["sleep", "infinity"],
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [{"name": "data", "mountPath": "/mnt"}, {"name": "tmp", "mountPath": "/tmp"}],
                }
            ],
            "volumes": [
                {"name": "data", "persistentVolumeClaim": {"claimName": CLAIM}},
                {"name": "tmp", "emptyDir": {}},
            ],
        },
    }


def _copy(kubectl: Kubectl, assets: Assets) -> None:
    kubectl.shell(POD, f"rm -rf {MARKER} /mnt/models/{MODEL} /mnt/datasets/humaneval && mkdir -p /mnt/models")
    kubectl.send({"humaneval": assets.humaneval}, POD, "/mnt/datasets")
    if assets.model.exists():
        kubectl.send({MODEL: assets.model}, POD, "/mnt/models")
    else:
        sources = {"model.gguf": assets.gguf, "convert.py": ROOT / "demo" / "convert.py"}
        # With its metadata, by which transformers finds out the version.
        sources |= {path.name: path for path in assets.packages.glob("gguf*")}
        kubectl.send(sources, POD, "/tmp/conversion")
        kubectl.shell(
            POD,
            f"cd /tmp/conversion && python convert.py model.gguf /mnt/models/{MODEL} && chmod -R a+rX /mnt/models/{MODEL}"
            " && rm -rf /tmp/conversion",
        )
        kubectl.fetch(POD, f"/mnt/models/{MODEL}", assets.model)
    # Last, so that a copy that was cut short is made again.
    kubectl.shell(POD, f"printf %s {assets.digest} > {MARKER}")
