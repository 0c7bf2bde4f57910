"""Real weights, real data: a job trains, and two nodes give what one gives."""

import json
from typing import Any

import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.jobs import SMOLLM2, Job, start
from tests.e2e.volume import TOOLBOX

pytestmark = pytest.mark.cluster

SPEC: dict[str, Any] = {
    "model": {"uri": SMOLLM2},
    "training": {"maxSteps": 8, "maxLength": 256, "globalBatchSize": 2, "learningRate": "3e-3"},
}
TWO_CPUS = {"resourcesPerNode": {"requests": {"cpu": "500m"}, "limits": {"cpu": "2", "memory": "4Gi"}}}
"""For the job of one process: as many threads as the two pods of the others have together."""
TOLERANCE = 2e-5
"""Relative difference of losses: float32 sums in another order (the gradients of two ranks are added, not one's)."""


@pytest.fixture(scope="module")
def one_process(cluster: Cluster) -> Job:
    job = start(cluster.kubectl, "one-process", {**SPEC, "trainer": TWO_CPUS})
    job.complete(timeout=600)
    return job


def test_held_out_loss_falls(cluster: Cluster, one_process: Job) -> None:
    result = _report(cluster, one_process)
    assert result["eval_loss"] < result["base_eval_loss"] - 0.05


@pytest.fixture(scope="module")
def small_one_process(cluster: Cluster) -> Job:
    job = start(cluster.kubectl, "small-one-process", {"training": SPEC["training"], "trainer": TWO_CPUS})
    job.complete()
    return job


def test_two_nodes_give_what_one_process_gives(cluster: Cluster, one_process: Job) -> None:
    _same_on_two_nodes(cluster, one_process, "two-nodes-zero2", {**SPEC, "deepspeed": {"zeroStage": 2}})


def test_partitioned_parameters_give_it_too(cluster: Cluster, small_one_process: Job) -> None:
    """The real weights cut to two layers: gathering every one of 30 layers over gloo would take minutes."""
    spec = {"training": SPEC["training"], "deepspeed": {"zeroStage": 3}}
    _same_on_two_nodes(cluster, small_one_process, "two-nodes-zero3", spec)


def _same_on_two_nodes(cluster: Cluster, one_process: Job, name: str, spec: dict[str, Any]) -> None:
    job = start(cluster.kubectl, name, {**spec, "trainer": {"numNodes": 2}})
    job.wait_state("Running")
    assert len({pod["spec"]["nodeName"] for pod in job.pods()}) == 2, "pods stand on different nodes"
    job.complete(timeout=600)
    ours, theirs = _report(cluster, job), _report(cluster, one_process)
    for key in ("base_eval_loss", "eval_loss", "loss"):
        assert ours[key] == pytest.approx(theirs[key], rel=TOLERANCE), key


def test_adapter_loads_in_plain_transformers_and_peft(cluster: Cluster, one_process: Job) -> None:
    """The exported adapter, loaded by other people's code in another process, has the loss that the trainer reported."""
    output = cluster.kubectl.exec(
        TOOLBOX, "python", "-c", PLAIN, "/mnt/models/SmolLM2-135M-Instruct", f"/mnt/outputs/{one_process.name}",
        "/mnt/datasets/humaneval/heldout.jsonl",
    )  # fmt: skip
    measured = json.loads(output.splitlines()[-1])
    assert measured["tuned"] == pytest.approx(_report(cluster, one_process)["eval_loss"], rel=1e-4)
    assert measured["base"] == pytest.approx(_report(cluster, one_process)["base_eval_loss"], rel=1e-4)


PLAIN = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
model_dir, adapter_dir, data = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(adapter_dir)
base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
samples = [json.loads(line)["messages"] for line in open(data)][:8]
def loss(model):
    total = tokens = 0
    for messages in samples:
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        start = len(tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False))
        end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)  # the line break after it is no target
        ids = torch.tensor([ids[:256]])
        labels = ids.clone()
        labels[:, :start] = labels[:, end:] = -100
        count = int((labels[:, 1:] != -100).sum())
        if count:
            with torch.no_grad():
                total += model(input_ids=ids, labels=labels).loss.item() * count
            tokens += count
    return total / tokens
before = loss(base)
after = loss(PeftModel.from_pretrained(base, adapter_dir))
print(json.dumps({"base": before, "tuned": after}))
"""


def _report(cluster: Cluster, job: Job) -> dict[str, Any]:
    text = cluster.kubectl.exec(TOOLBOX, "cat", f"/mnt/outputs/{job.name}/train_result.json")
    report: dict[str, Any] = json.loads(text)
    return report
