"""A job for pods as one for this machine: paths, Secrets, GPUs, and what is said where something is missing."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.job import FineTuneJob
from finetune_operator.core.build import build_attempt
from finetune_operator.core.resolve import resolve
from finetune_operator.local import machine
from finetune_operator.local.folder import Folder
from finetune_operator.local.process import num_gpus
from tests.unit.operator.samples import job_body

HUB = {
    "model": {"uri": "hf://org/name", "credentialsRef": {"name": "hf"}},
    "trainer": {
        "numNodes": 2,
        "resourcesPerNode": {"limits": {"cpu": "3", "memory": "6Gi"}},
        "env": [
            {"name": "HF_ENDPOINT", "value": "https://hub.example.com"},
            {"name": "KEY", "secretKeyRef": {"name": "s", "key": "k"}},
        ],
        "nodeSelector": {"gpu": "h100"},
    },
}


def _job(**spec: Any) -> FineTuneJob:
    return FineTuneJob.from_object(job_body(**spec))


@pytest.fixture
def places(tmp_path: Path) -> machine.Places:
    (tmp_path / "data").mkdir()
    token, key = tmp_path / "token", tmp_path / "key"
    token.write_text("t0ken\n")
    key.write_text("secret\n")
    return machine.Places(
        volumes={"data": tmp_path / "data"},
        secrets={("hf", "token"): token, ("s", "k"): key},
        cache=tmp_path / "cache",
    )


def test_every_path_of_the_pod_is_one_of_this_machine(places: machine.Places) -> None:
    job = _job(**HUB)
    one = machine.as_one_node(job)
    resolved = resolve(one, 1, places.config())
    objects = build_attempt(one, resolved, places.config(), None)
    launch = machine.launch_here(
        json.loads(objects.configmap["data"]["launch.json"]), objects.job, places, job, (4001, 4002)
    )
    data = places.volumes["data"]
    assert launch.train[0].source.path == str(data / "train.jsonl")
    assert launch.output_dir == str(data / "out" / "tune")
    assert launch.checkpoint.dir == str(data / "out" / "checkpoints" / "tune-0123abcd")
    assert launch.cache_dir == str(places.cache)
    assert launch.model.source.kind == "Hub"
    assert launch.model.source.token_file == str(places.secrets["hf", "token"])
    assert launch.model.uri == "hf://org/name" and launch.train[0].uri == "pvc://data/train.jsonl", "as written"
    assert (launch.http_port, launch.rendezvous.port) == (4001, 4002)
    assert (launch.num_nodes, launch.num_proc_per_node) == (1, 2)
    assert launch.threads_per_process == resolve(job, 1, places.config()).launch.threads_per_process == 3
    text = launch.to_json()
    assert "/mnt/pvc" not in text and "/etc/finetune" not in text and "t0ken" not in text


def test_variables_and_what_has_no_meaning_here(places: machine.Places) -> None:
    job = _job(**HUB)
    assert machine.variables(job, places) == {"HF_ENDPOINT": "https://hub.example.com", "KEY": "secret"}
    assert machine.ignored(job) == [
        "trainer.nodeSelector",
        "trainer.resourcesPerNode (but for the threads of a rank)",
    ]
    assert machine.ignored(_job()) == []


def test_what_is_not_mapped_is_told_with_the_option_to_add(places: machine.Places, tmp_path: Path) -> None:
    nothing = machine.Places({}, {}, tmp_path)
    with pytest.raises(machine.LocalError) as told:
        machine.check(_job(**HUB), nothing, 0)
    text = str(told.value)
    assert "--volume data=FOLDER" in text and "--secret hf=FILE" in text and "--secret s/k=FILE" in text
    machine.check(_job(**HUB), places, 0)
    with pytest.raises(machine.LocalError, match="no such folder"):
        machine.check(_job(), machine.Places({"data": tmp_path / "none"}, {}, tmp_path), 0)
    with pytest.raises(machine.LocalError, match="another controller"):
        machine.check(_job(managedBy="kueue.x-k8s.io/multikueue"), places, 0)
    with pytest.raises(machine.LocalError, match=r"spec\.suspend"):
        machine.check(_job(suspend=True), places, 0)


@pytest.mark.parametrize(("gpus", "says"), [(0, ""), (1, "numProcPerNode: 1"), (2, "")])
def test_ranks_need_a_gpu_each_or_none(places: machine.Places, gpus: int, says: str) -> None:
    job = _job(trainer={"numNodes": 2})
    if not says:
        machine.check(job, places, gpus)
        return
    with pytest.raises(machine.LocalError, match=says):
        machine.check(job, places, gpus)


def test_gpus_are_counted_as_the_trainer_will_see_them(tmp_path: Path) -> None:
    assert num_gpus({}, tmp_path) == 0
    for name in ("nvidiactl", "nvidia0", "nvidia1", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert num_gpus({}, tmp_path) == 2
    assert num_gpus({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path) == 1
    assert num_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0


def test_a_folder_belongs_to_one_run_and_keeps_its_identity(tmp_path: Path) -> None:
    body = {**job_body(), "metadata": {"name": "tune", "namespace": "team"}}
    first = Folder.open(tmp_path, "team", "tune")
    job = first.take(body)
    first.save(job.status.model_copy(update={"restarts": 3}))
    with pytest.raises(machine.LocalError, match=r"`tune` is running already \(process \d+\)"):
        Folder.open(tmp_path, "team", "tune")
    first.close()

    again = Folder.open(tmp_path, "team", "tune")
    changed = {**body, "spec": {**body["spec"], "recovery": {"backoffLimit": 9}}}
    resumed = again.take(changed)
    assert resumed.metadata.uid == job.metadata.uid and resumed.status.restarts == 3
    assert (job.metadata.generation, resumed.metadata.generation) == (1, 2)
    (again.path / "attempt-1.log").touch()
    again.forget()
    fresh = again.take(body)
    assert fresh.metadata.uid != job.metadata.uid and fresh.status.restarts is None
    kept = tmp_path / "team.tune.run" / f"earlier-{job.metadata.uid[:8]}"
    assert {file.name for file in kept.iterdir()} == {"job.json", "attempt-1.log"}, "nothing is thrown away"
    again.close()
