"""The pod template of a gang: restricted Pod Security level, read-only root, no API token."""

from typing import Any

from finetune_api.job import FineTuneJob
from finetune_api.spec import EnvVarSpec, TrainerSpec
from finetune_operator.core.build.configmap import LAUNCH_FILE
from finetune_operator.core.build.metadata import attempt_labels
from finetune_operator.core.names import CONTAINER, attempt_name
from finetune_operator.core.resolve import SCRATCH, Resolved
from finetune_operator.core.settings import PlanConfig
from finetune_operator.core.volumes import Mounts

LAUNCH_DIR = "/etc/finetune"
USER_ID = 1000
_NODE_TAINTS = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


def build_pod_template(job: FineTuneJob, resolved: Resolved, config: PlanConfig) -> dict[str, Any]:
    """Builds the template of one attempt's pods."""
    trainer, attempt = job.spec.trainer, resolved.launch.attempt
    labels = attempt_labels(job, attempt)
    spec: dict[str, Any] = {
        "subdomain": attempt_name(job.metadata.name, attempt),
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": config.termination_grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": labels},
            }
        ],
        "tolerations": _tolerations(trainer, config),
        "containers": [_container(trainer, resolved)],
        "volumes": _volumes(attempt_name(job.metadata.name, attempt), resolved.mounts),
    }
    if trainer.node_selector:
        spec["nodeSelector"] = trainer.node_selector
    if trainer.priority_class_name:
        spec["priorityClassName"] = trainer.priority_class_name
    if trainer.service_account_name:
        spec["serviceAccountName"] = trainer.service_account_name
    return {"metadata": {"labels": {**labels, "app.kubernetes.io/name": "finetune-trainer"}}, "spec": spec}


def _container(trainer: TrainerSpec, resolved: Resolved) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": resolved.plan.image,
        "command": ["python", "-m", "finetune_trainer", "--launch", f"{LAUNCH_DIR}/{LAUNCH_FILE}"],
        "env": _environment(trainer.env),
        "ports": [{"name": "http", "containerPort": resolved.launch.http_port, "protocol": "TCP"}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": _mounts(resolved.mounts),
    }
    resources = trainer.resources_per_node.to_wire()
    if any(resources.values()):
        container["resources"] = {name: values for name, values in resources.items() if values}
    return container


def _environment(own: list[EnvVarSpec]) -> list[dict[str, Any]]:
    """The job's own, after what libraries ask for: no passwd entry is promised for the user."""
    named = {variable.name for variable in own}
    needed = {"HOME": SCRATCH, "USER": "finetune"}
    return [*({"name": n, "value": v} for n, v in needed.items() if n not in named), *map(_env, own)]


def _env(variable: EnvVarSpec) -> dict[str, Any]:
    if variable.secret_key_ref is None:
        return {"name": variable.name, "value": variable.value or ""}
    ref = {"name": variable.secret_key_ref.name, "key": variable.secret_key_ref.key}
    return {"name": variable.name, "valueFrom": {"secretKeyRef": ref}}


def _tolerations(trainer: TrainerSpec, config: PlanConfig) -> list[dict[str, Any]]:
    """The job's own, and a short stay on lost nodes: the taint manager then says so on the pod within seconds."""
    short = [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": config.node_lost_seconds}
        for key in _NODE_TAINTS
    ]
    own = {toleration.key for toleration in trainer.tolerations}
    # The first that matches a taint counts: one for all taints must not make a lost node one that is waited for.
    return [*(t for t in short if t["key"] not in own), *(t.to_wire() for t in trainer.tolerations)]


def _mounts(mounts: Mounts) -> list[dict[str, Any]]:
    return [
        {"name": "launch", "mountPath": LAUNCH_DIR, "readOnly": True},
        {"name": "scratch", "mountPath": SCRATCH},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shm", "mountPath": "/dev/shm"},
        *(
            {"name": f"pvc-{index}", "mountPath": claim.path, **({"readOnly": True} if claim.read_only else {})}
            for index, claim in enumerate(mounts.claims)
        ),
        *({"name": f"secret-{s.index}", "mountPath": s.dir, "readOnly": True} for s in mounts.secrets),
    ]


def _volumes(configmap: str, mounts: Mounts) -> list[dict[str, Any]]:
    return [
        {"name": "launch", "configMap": {"name": configmap}},
        {"name": "scratch", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
        *(
            {"name": f"pvc-{index}", "persistentVolumeClaim": {"claimName": claim.claim}}
            for index, claim in enumerate(mounts.claims)
        ),
        *(
            {
                "name": f"secret-{s.index}",
                "secret": {
                    "secretName": s.secret,
                    "items": [{"key": s.key, "path": "token"}],
                    # Read by the pod's group, which is the trainer's (fsGroup).
                    "defaultMode": 0o440,
                },
            }
            for s in mounts.secrets
        ),
    ]
