"""Every object that is built, beside its golden YAML. `UPDATE_GOLDEN=1 pytest ...` writes them anew."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.launch import LaunchSpec
from finetune_operator.core.build import build_attempt
from finetune_operator.core.names import attempt_name
from finetune_operator.core.resolve import resolve
from tests.unit.operator.samples import CONFIG, UID, make_job

GOLDEN = Path(__file__).parent / "golden"

SMALL: dict[str, Any] = {}
LARGE: dict[str, Any] = {
    "model": {
        "uri": "hf://meta/llama",
        "revision": "main",
        "credentialsRef": {"name": "hub"},
        "chatTemplate": "{{ messages }}",
    },
    "datasets": {
        "train": [
            {
                "uri": "hf://datasets/org/set/train.parquet",
                "format": "ShareGPT",
                "credentialsRef": {"name": "hub"},
                "columns": {"messages": "chat"},
                "tags": {"roleTag": "who"},
                "weight": "0.7",
            },
            {"uri": "pvc://raw/more", "maxSamples": 100, "split": "train", "weight": "3e-1"},
        ],
        "evaluation": [{"uri": "file:///data/eval.jsonl"}],
    },
    "method": "Full",
    "training": {"globalBatchSize": 64, "microBatchSize": 2, "epochs": 3, "learningRate": "1e-5"},
    "deepspeed": {"zeroStage": 3, "offloadOptimizer": "CPU"},
    "trainer": {
        "image": "registry/own:2",
        "numNodes": 2,
        "numProcPerNode": 4,
        "resourcesPerNode": {
            "requests": {"cpu": "6", "memory": "64Gi"},
            "limits": {"nvidia.com/gpu": 4, "cpu": "9500m"},
        },
        "env": [
            {"name": "NCCL_DEBUG", "value": "INFO"},
            {"name": "HOME", "value": "/home/me"},
            {"name": "KEY", "secretKeyRef": {"name": "s", "key": "k"}},
        ],
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "priorityClassName": "batch",
        "serviceAccountName": "trainer",
    },
    "checkpoint": {"uri": "pvc://ckpt/runs", "everySteps": 10},
    "output": {"uri": "pvc://out/models/tuned"},
    "cache": {"uri": "pvc://cache"},
}


@pytest.mark.parametrize(("case", "spec"), [("small", SMALL), ("large", LARGE)])
@pytest.mark.parametrize("kind", ["configmap", "service", "job"])
def test_object_equals_its_golden(kind: str, case: str, spec: dict[str, Any]) -> None:
    job = make_job(**spec)
    built = getattr(build_attempt(job, resolve(job, 2, CONFIG), CONFIG, '{"number":1}'), kind)
    path = GOLDEN / f"{kind}-{case}.yaml"
    text = yaml.safe_dump(built, sort_keys=False, width=120)
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert yaml.safe_load(text) == yaml.safe_load(path.read_text())


def test_launch_file_is_a_launch_spec_without_secrets() -> None:
    job = make_job(**LARGE)
    resolved = resolve(job, 1, CONFIG)
    text = build_attempt(job, resolved, CONFIG, None).configmap["data"]["launch.json"]
    assert LaunchSpec.model_validate_json(text) == resolved.launch
    assert json.loads(text)["model"]["source"]["tokenFile"] == "/etc/finetune-secrets/0/token"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tune", "tune-1"),
        ("a" * 52, "a" * 52 + "-1"),
        ("my.job", "my-job-bc373230-1"),
        ("7b", "j-7b-925a7bf1-1"),
    ],
    ids=["plain", "longest", "dots", "digit"],
)
def test_names_are_labels(name: str, expected: str) -> None:
    assert attempt_name(name, 1) == expected


def test_long_names_stay_apart_and_leave_room_for_the_index() -> None:
    names = {attempt_name("a" * 100 + str(i), 9999) for i in range(10)}
    assert len(names) == 10
    assert all(len(f"{name}-511") <= 63 for name in names)


def test_a_toleration_of_everything_does_not_wait_for_a_lost_node() -> None:
    job = make_job(trainer={"tolerations": [{"operator": "Exists"}]})
    template = build_attempt(job, resolve(job, 1, CONFIG), CONFIG, None).job["spec"]["template"]["spec"]
    first = next(t for t in template["tolerations"] if t.get("key") in (None, "node.kubernetes.io/unreachable"))
    assert first["tolerationSeconds"] == CONFIG.node_lost_seconds


def test_every_object_belongs_to_the_job_without_blocking_its_deletion() -> None:
    job = make_job()
    objects = build_attempt(job, resolve(job, 1, CONFIG), CONFIG, None)
    for built in (objects.configmap, objects.service, objects.job):
        (owner,) = built["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == (UID, True, False)
