"""How a job that was written for pods runs as one node on this machine. Pure functions; nothing here decides about failures.

The job keeps its numbers (ranks, threads of a rank, batch sizes), so the result is the one that the cluster gives, to the byte
on the same kind of processor. Only places change: folders for claims, files for Secrets, free ports.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.job import MANAGED_BY, FineTuneJob
from finetune_api.launch import LaunchSpec
from finetune_operator.core.resolve import resolve, threads_per_process
from finetune_operator.core.settings import PlanConfig
from finetune_operator.core.volumes import PVC_ROOT, local_path, sibling

NODE = "this machine"
"""The node's name in messages."""
SecretKey = tuple[str, str]
"""Name and key of a Secret."""


class LocalError(Exception):
    """The job cannot run here as it is asked for; the message has one line for each reason, with what to do."""


@dataclass(frozen=True)
class Places:
    """Where on this machine is what the cluster keeps in claims and Secrets."""

    volumes: Mapping[str, Path]
    """Folder of each claim."""
    secrets: Mapping[SecretKey, Path]
    """File that holds a Secret's value."""
    cache: Path
    """Folder for `hf://` downloads of jobs that name none."""

    def config(self) -> PlanConfig:
        """The settings that decisions depend on: the operator's defaults."""
        return PlanConfig(trainer_image=NODE, cache_uri=f"file://{self.cache}")


def as_one_node(job: FineTuneJob) -> FineTuneJob:
    """The job with all its ranks on one node; the number of ranks, and with it every batch, stays."""
    trainer = job.spec.trainer
    ranks = trainer.num_nodes * trainer.num_proc_per_node
    one = trainer.model_copy(update={"num_nodes": 1, "num_proc_per_node": ranks})
    return job.model_copy(update={"spec": job.spec.model_copy(update={"trainer": one})})


def ignored(job: FineTuneJob) -> list[str]:
    """The fields that the job sets and that mean nothing without a cluster."""
    trainer = job.spec.trainer
    resources = trainer.resources_per_node
    names = {
        "trainer.image": trainer.image,
        "trainer.nodeSelector": trainer.node_selector,
        "trainer.tolerations": trainer.tolerations,
        "trainer.priorityClassName": trainer.priority_class_name,
        "trainer.serviceAccountName": trainer.service_account_name,
        "trainer.resourcesPerNode (but for the threads of a rank)": resources.requests or resources.limits,
        "ttlSecondsAfterFinished": job.spec.ttl_seconds_after_finished is not None,
    }
    return [name for name, value in names.items() if value]


def check(job: FineTuneJob, places: Places, num_gpus: int) -> None:
    """Checks that the job can run here.

    Args:
        job: as written.
        places: what the user has mapped.
        num_gpus: GPUs that ranks may use; 0: they run on the CPU.

    Raises:
        LocalError: a claim or a Secret is not mapped, there are too few GPUs, or the job is not to be run at all.
    """
    problems = [*_missing_volumes(job, places), *_missing_secrets(job, places), *_too_few_gpus(job, num_gpus)]
    if job.spec.suspend:
        problems.append("spec.suspend: the job is suspended; set it to false, or remove it, to run it")
    if job.spec.managed_by != MANAGED_BY:
        problems.append(
            f"spec.managedBy: `{job.spec.managed_by}` is another controller's job; remove the field to run it"
        )
    if problems:
        raise LocalError("\n".join(problems))


def _missing_volumes(job: FineTuneJob, places: Places) -> list[str]:
    mounts = resolve(job, 1, places.config()).mounts
    problems = []
    for claim in mounts.claims:
        folder = places.volumes.get(claim.claim)
        if folder is None:
            problems.append(
                f"pvc://{claim.claim}: a claim is a volume of the cluster; say which folder of this machine stands for it: "
                f"add `--volume {claim.claim}=FOLDER`"
            )
        elif not folder.is_dir():
            problems.append(f"--volume {claim.claim}={folder}: there is no such folder; create it, or name another")
    return problems


def _missing_secrets(job: FineTuneJob, places: Places) -> list[str]:
    tokens = [(s.secret, s.key) for s in resolve(job, 1, places.config()).mounts.secrets]
    refs = [variable.secret_key_ref for variable in job.spec.trainer.env]
    variables = [(ref.name, ref.key) for ref in refs if ref is not None]
    problems = []
    for name, key in dict.fromkeys([*tokens, *variables]):
        option = name if key == "token" else f"{name}/{key}"
        file = places.secrets.get((name, key))
        if file is None:
            problems.append(
                f"Secret `{name}`, key `{key}`: a Secret is an object of the cluster; say which file of this machine holds "
                f"its value: add `--secret {option}=FILE`"
            )
        elif not file.is_file():
            problems.append(f"--secret {option}={file}: there is no such file")
    return problems


def _too_few_gpus(job: FineTuneJob, num_gpus: int) -> list[str]:
    trainer = job.spec.trainer
    ranks = trainer.num_nodes * trainer.num_proc_per_node
    if num_gpus == 0 or num_gpus >= ranks:
        return []
    have = "1 GPU" if num_gpus == 1 else f"{num_gpus} GPUs"
    return [
        f"spec.trainer: numNodes {trainer.num_nodes} x numProcPerNode {trainer.num_proc_per_node} = {ranks} ranks, and this "
        f"machine has {have}: set `numNodes: 1` and `numProcPerNode: {num_gpus}` (with `nvidia.com/gpu` to match), or "
        "`--device cpu`"
    ]


def path_of(uri: str, volumes: Mapping[str, Path]) -> Path:
    """The path on this machine of a `pvc://` or `file://` URI whose claim is mapped."""
    return Path(_replaced(local_path(uri), {f"{PVC_ROOT}/{claim}": folder for claim, folder in volumes.items()}))


def checkpoints_root(job: FineTuneJob, volumes: Mapping[str, Path]) -> Path:
    """The folder in which jobs have their folders of checkpoints."""
    return path_of(job.spec.checkpoint.uri or sibling(job.spec.output.uri, "checkpoints"), volumes)


def launch_here(
    launch: dict[str, Any], manifest: dict[str, Any], places: Places, job: FineTuneJob, ports: tuple[int, int]
) -> LaunchSpec:
    """The launch file of a pod as one for this machine.

    Args:
        launch: as the ConfigMap has it.
        manifest: the Job that would mount it; its volumes say what each path is.
        places: what they are here.
        job: as written, for the threads of a rank.
        ports: free ones for HTTP and for the rendezvous.
    """
    moved = _moved(launch, _mounted(manifest, places))
    moved["httpPort"], moved["rendezvous"]["port"] = ports
    moved["threadsPerProcess"] = threads_per_process(job.spec)
    return LaunchSpec.model_validate(moved)


def _mounted(manifest: dict[str, Any], places: Places) -> dict[str, Path]:
    """What each path inside the pod is on this machine."""
    pod = manifest["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    found: dict[str, Path] = {}
    for mount in pod["containers"][0]["volumeMounts"]:
        volume, path = volumes[mount["name"]], mount["mountPath"]
        if claim := volume.get("persistentVolumeClaim"):
            found[path] = places.volumes[claim["claimName"]]
        elif secret := volume.get("secret"):
            for item in secret["items"]:
                found[f"{path}/{item['path']}"] = places.secrets[secret["secretName"], item["key"]]
    return found


def _moved(value: Any, found: Mapping[str, Path]) -> Any:
    """The value with every path of the pod replaced, wherever in the launch file it stands."""
    if isinstance(value, dict):
        return {key: _moved(child, found) for key, child in value.items()}
    if isinstance(value, list):
        return [_moved(child, found) for child in value]
    return _replaced(value, found) if isinstance(value, str) else value


def _replaced(text: str, found: Mapping[str, Path]) -> str:
    for path, here in found.items():
        if text == path or text.startswith(f"{path}/"):
            return str(here) + text.removeprefix(path)
    return text


def variables(job: FineTuneJob, places: Places) -> dict[str, str]:
    """The environment that the job asks for; values of Secrets are read from their files.

    Raises:
        LocalError: a file cannot be read.
    """
    found: dict[str, str] = {}
    for variable in job.spec.trainer.env:
        ref = variable.secret_key_ref
        if ref is None:
            found[variable.name] = variable.value or ""
            continue
        file = places.secrets[ref.name, ref.key]
        try:
            found[variable.name] = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise LocalError(f"--secret {ref.name}/{ref.key}={file}: cannot be read: {error}") from error
    return found
