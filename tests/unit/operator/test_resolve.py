"""Defaults, paths and mounts."""

from datetime import date
from typing import Any

import pytest

from finetune_api.launch import UNDATED
from finetune_operator.core.resolve import resolve, threads_per_process
from finetune_operator.core.volumes import local_path, sibling
from tests.unit.operator.samples import CONFIG, make_job


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("pvc://claim/a/b", "/mnt/pvc/claim/a/b"),
        ("pvc://claim", "/mnt/pvc/claim"),
        ("pvc://claim/a/", "/mnt/pvc/claim/a"),
        ("file:///a/b", "/a/b"),
    ],
)
def test_local_path(uri: str, path: str) -> None:
    assert local_path(uri) == path


@pytest.mark.parametrize(
    ("uri", "beside"),
    [
        ("pvc://claim/out/tune", "pvc://claim/out/checkpoints"),
        ("pvc://claim/out", "pvc://claim/checkpoints"),
        ("pvc://claim", "pvc://claim/checkpoints"),
        ("file:///runs/out/", "file:///runs/checkpoints"),
        ("file:///out", "file:///checkpoints"),
    ],
)
def test_checkpoints_are_beside_the_output(uri: str, beside: str) -> None:
    assert sibling(uri, "checkpoints") == beside


@pytest.mark.parametrize(
    ("trainer", "threads"),
    [
        ({}, 1),
        ({"resourcesPerNode": {"limits": {"cpu": "4"}}}, 4),
        ({"resourcesPerNode": {"limits": {"cpu": "9500m"}}, "numProcPerNode": 4}, 2),
        ({"resourcesPerNode": {"requests": {"cpu": 3}}}, 3),
        ({"resourcesPerNode": {"requests": {"cpu": "8"}, "limits": {"cpu": "2"}}}, 2),
        ({"resourcesPerNode": {"limits": {"cpu": "500m"}}}, 1),
    ],
    ids=["none", "limit", "shared", "request", "limit-wins", "at-least-one"],
)
def test_threads(trainer: dict[str, Any], threads: int) -> None:
    assert threads_per_process(make_job(trainer=trainer, training={"globalBatchSize": 8}).spec) == threads


@pytest.mark.parametrize(
    ("spec", "field", "value"),
    [
        ({}, "learning_rate", 2e-4),
        ({"method": "Full"}, "learning_rate", 2e-5),
        ({"training": {"learningRate": "1e-3"}}, "learning_rate", 1e-3),
        ({}, "epochs", 1),
        ({"training": {"maxSteps": 5}}, "epochs", None),
        ({"training": {"globalBatchSize": 16}, "trainer": {"numNodes": 2}}, "gradient_accumulation_steps", 8),
        ({"method": "QLoRA"}, "learning_rate", 2e-4),
        ({"method": "Freeze"}, "learning_rate", 2e-5),
        ({}, "warmup_ratio", 0.03),
        ({"training": {"warmupRatio": "0"}}, "warmup_ratio", 0.0),
        ({"training": {"warmupSteps": 5}}, "warmup_ratio", 0.0),
        ({"training": {"warmupSteps": 5}}, "warmup_steps", 5),
        ({}, "adam_epsilon", 1e-8),
    ],
)
def test_training_defaults(spec: dict[str, Any], field: str, value: object) -> None:
    assert getattr(resolve(make_job(**spec), 1, CONFIG).launch.training, field) == value


def test_alpha_is_twice_the_rank_and_full_has_no_adapter() -> None:
    lora = resolve(make_job(adapter={"rank": 8}), 1, CONFIG).launch.adapter
    assert lora is not None
    assert lora.alpha == 16
    assert resolve(make_job(method="Full"), 1, CONFIG).launch.adapter is None


@pytest.mark.parametrize(
    ("method", "blocks"),
    [
        ("Full", {"adapter": False, "freeze": False, "quantization": False}),
        ("Freeze", {"adapter": False, "freeze": True, "quantization": False}),
        ("LoRA", {"adapter": True, "freeze": False, "quantization": False}),
        ("QLoRA", {"adapter": True, "freeze": False, "quantization": True}),
    ],
)
def test_each_method_has_its_blocks(method: str, blocks: dict[str, bool]) -> None:
    launch = resolve(make_job(method=method), 1, CONFIG).launch
    assert {name: getattr(launch, name) is not None for name in blocks} == blocks


def test_scheduler_parameters_have_their_defaults() -> None:
    given = {"scheduler": "CosineWithMinLR", "schedulerParameters": {"numCycles": None}}
    parameters = resolve(make_job(training=given), 1, CONFIG).launch.training.scheduler_parameters
    assert (parameters.min_lr_rate, parameters.lr_end, parameters.power, parameters.num_cycles) == (0.1, 1e-7, 1.0, 1)
    stable = resolve(make_job(training={"scheduler": "WarmupStableDecay"}), 1, CONFIG).launch.training
    assert stable.scheduler_parameters.min_lr_rate == 0.0


def test_a_claim_is_mounted_once_and_writable_if_anything_writes_to_it() -> None:
    job = make_job(datasets={"train": [{"uri": "pvc://raw/a"}, {"uri": "pvc://raw/b"}]})
    claims = {c.claim: c.read_only for c in resolve(job, 1, CONFIG).mounts.claims}
    assert claims == {"data": False, "raw": True}


def test_the_commit_of_the_first_start_is_kept() -> None:
    job = make_job(model={"uri": "hf://org/name", "revision": "main"})
    plan = resolve(job, 1, CONFIG).plan.model_copy(update={"model_revision": "abc123"})
    job = job.model_copy(update={"status": job.status.model_copy(update={"plan": plan})})
    source = resolve(job, 2, CONFIG).launch.model.source
    assert getattr(source, "revision", None) == "abc123"


def test_a_job_is_as_old_as_its_resource() -> None:
    job = make_job()
    assert resolve(job, 3, CONFIG).launch.created_on == date(2026, 11, 24)
    undated = job.model_copy(update={"metadata": job.metadata.model_copy(update={"creation_timestamp": None})})
    assert resolve(undated, 3, CONFIG).launch.created_on == UNDATED


def test_the_image_of_the_first_attempt_is_kept() -> None:
    job = make_job()
    plan = resolve(job, 1, CONFIG).plan.model_copy(update={"image": "registry/trainer:0"})
    job = job.model_copy(update={"status": job.status.model_copy(update={"plan": plan})})
    assert resolve(job, 2, CONFIG).plan.image == "registry/trainer:0"


def test_tracking_gets_paths_and_a_mounted_secret() -> None:
    ref = {"name": "wandb", "key": "api"}
    profiler = {"uri": "pvc://traces", "wait": 2}
    tracking = {
        "wandb": {"project": "p", "credentialsRef": ref},
        "tensorBoard": {"uri": "pvc://boards/runs"},
        "profiler": profiler,
    }
    resolved = resolve(make_job(tracking=tracking), 1, CONFIG)
    wandb, board = resolved.launch.tracking.wandb, resolved.launch.tracking.tensor_board
    assert wandb is not None and board is not None
    assert (wandb.run_name, wandb.token_file) == ("tune", "/etc/finetune-secrets/0/token")
    assert [(s.secret, s.key, s.path) for s in resolved.mounts.secrets] == [("wandb", "api", wandb.token_file)]
    assert board.dir == "/mnt/pvc/boards/runs/tune-0123abcd"
    launched = resolved.launch.tracking.profiler
    assert launched is not None
    assert launched.to_wire() == {"dir": "/mnt/pvc/traces/tune-0123abcd", "wait": 2, "warmup": 1, "active": 3}
    claims = {c.claim: c.read_only for c in resolved.mounts.claims}
    assert claims["boards"] is False and claims["traces"] is False


def test_tracking_is_off_by_default() -> None:
    resolved = resolve(make_job(), 1, CONFIG)
    assert resolved.launch.tracking.to_wire() == {}
    assert resolved.mounts.secrets == ()


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("64KiB", 2**16)]
)
def test_shard_sizes(text: str, size: int) -> None:
    job = make_job(output={"uri": "pvc://data/out/tune", "maxShardSize": text})
    assert resolve(job, 1, CONFIG).launch.output.max_shard_bytes == size


def test_benchmarks_are_told_from_held_out_data() -> None:
    job = make_job(
        datasets={
            "train": [{"uri": "pvc://raw/a"}],
            "evaluation": [
                {"uri": "pvc://raw/heldout.jsonl"},
                {"uri": "pvc://problems/HumanEval.jsonl.gz", "benchmark": "HumanEval", "maxSamples": 20},
            ],
        },
        evaluation={
            "metric": "HumanEvalPassAt1",
            "exportBest": True,
            "earlyStoppingPatience": 2,
            "earlyStoppingMinDelta": "0.005",
            "generation": {"samples": 10, "temperature": "0.8", "topP": "0.95", "k": [1, 10]},
        },
        training={"evalEverySteps": 10},
    )
    resolved = resolve(job, 1, CONFIG)
    launch = resolved.launch
    assert [data.uri for data in launch.evaluation] == ["pvc://raw/heldout.jsonl"]
    (benchmark,) = launch.benchmarks
    assert (benchmark.benchmark, benchmark.max_samples) == ("HumanEval", 20)
    assert getattr(benchmark.source, "path", None) == "/mnt/pvc/problems/HumanEval.jsonl.gz"
    assert {c.claim: c.read_only for c in resolved.mounts.claims}["problems"]
    generation, selection = launch.generation, launch.selection
    assert (generation.samples, generation.temperature, generation.top_p, generation.k) == (10, 0.8, 0.95, [1, 10])
    assert (selection.metric, selection.export_best) == ("HumanEvalPassAt1", True)
    assert (selection.early_stopping_patience, selection.early_stopping_min_delta) == (2, 0.005)


def test_nothing_is_selected_by_default() -> None:
    selection = resolve(make_job(), 1, CONFIG).launch.selection
    assert (selection.metric, selection.export_best, selection.early_stopping_patience) == (None, False, None)
