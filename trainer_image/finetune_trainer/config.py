"""Reads `launch.json` and checks what the schema alone cannot.

Owns the way from the file to a `LaunchSpec` and the fingerprint that tells whether a checkpoint belongs to this run. Reads
no environment.
"""

import json
import logging
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_api.combinations import Combination, check
from finetune_api.launch import LaunchSpec
from finetune_trainer.errors import ConfigError

log = logging.getLogger("finetune_trainer")
OWN_BLOCKS = {"adapter": ("LoRA", "QLoRA"), "freeze": ("Freeze",), "quantization": ("QLoRA",)}
"""Blocks that belong to some methods."""
OF_RANKS = ("trainer.numNodes x numProcPerNode", "training.gradientAccumulationSteps")
"""Entries of older checkpoints' fingerprints that follow from the number of ranks, which may change."""


def read_launch(path: Path, *, warn: bool = True) -> LaunchSpec:
    """Reads and checks a launch file.

    A job keeps its image when the operator is upgraded, so the file may have fields that this trainer does not know yet. They
    change nothing that it computes (else the schema's version would be another), and are left out.

    Args:
        path: the file.
        warn: whether to name in the log what is left out.

    Raises:
        ConfigError: the file is missing, is no JSON, does not fit the schema or is of another version of it, or its numbers
            contradict each other.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: the launch file cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the launch file is not UTF-8 text: {error}") from error
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not a launch file: {error}") from error
    _check_version(path, data)
    unknown = _leave_out_unknown(data)
    if unknown and warn:
        log.warning("%s: this image does not know, and leaves out: %s", path, ", ".join(unknown))
    try:
        spec = LaunchSpec.model_validate_json(json.dumps(data))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:5]]
        raise ConfigError(f"{path}: not a launch file of this version: " + "; ".join(lines)) from error
    _check(spec)
    return spec


def _check_version(path: Path, data: Any) -> None:
    own: int = LaunchSpec.model_fields["schema_version"].default
    given = data.get("schemaVersion", own) if isinstance(data, dict) else own
    if isinstance(given, int) and given != own:
        raise ConfigError(
            f"{path}: schemaVersion: this image reads {own}, got {given}: the image is too {'old' if given > own else 'new'} for "
            "the operator that wrote it; suspend the job, set spec.trainer.image to one of the operator's version, and resume it"
        )


def _leave_out_unknown(data: Any) -> list[str]:
    """Takes fields that the schema does not know out of `data`, and returns their paths."""
    try:
        LaunchSpec.model_validate(data)
    except ValidationError as error:
        unknown = [found["loc"] for found in error.errors() if found["type"] == "extra_forbidden"]
        return [_take_out(data, location) for location in unknown]
    return []


def _take_out(data: Any, location: tuple[int | str, ...]) -> str:
    *parents, name = location
    path: list[int | str] = []
    for key in parents:
        # Where a field has one of several forms the location names the form as well, which is no key.
        if not isinstance(data, dict) or key in data:
            data = data[key]
            path.append(key)
    del data[name]
    return ".".join(map(str, [*path, name]))


def _check(spec: LaunchSpec) -> None:
    training = spec.training
    rows = training.micro_batch_size * training.gradient_accumulation_steps * spec.world_size
    if rows != training.global_batch_size:
        raise ConfigError(
            f"training.globalBatchSize: must equal microBatchSize x gradientAccumulationSteps x ranks = {rows}, "
            f"got {training.global_batch_size}"
        )
    if (training.epochs is None) == (training.max_steps is None):
        raise ConfigError("training: exactly one of `epochs` and `maxSteps` must be set")
    for field, methods in OWN_BLOCKS.items():
        if (spec.method in methods) != (getattr(spec, field) is not None):
            raise ConfigError(f"{field}: must be set for method {' and '.join(methods)}, and absent for others")
    if training.eval_every_steps is not None and not (spec.evaluation or spec.benchmarks):
        raise ConfigError("training.evalEverySteps: needs a data set in datasets.evaluation")
    if spec.deepspeed.offload_optimizer == "CPU" and spec.deepspeed.zero_stage < 1:
        raise ConfigError("deepspeed.offloadOptimizer: CPU needs zeroStage 1, 2 or 3")
    if spec.deepspeed.offload_parameters == "CPU" and spec.deepspeed.zero_stage != 3:
        raise ConfigError("deepspeed.offloadParameters: CPU needs zeroStage 3")
    if reason := check(combination(spec)):
        raise ConfigError(reason)
    _check_data(spec)
    _check_output(spec)
    _check_evaluation(spec)


def combination(spec: LaunchSpec) -> Combination:
    """The choices whose combinations may be refused."""
    return Combination(
        method=spec.method,
        variant=spec.adapter.variant if spec.adapter else "LoRA",
        zero_stage=spec.deepspeed.zero_stage,
        offload_optimizer=spec.deepspeed.offload_optimizer,
        offload_parameters=spec.deepspeed.offload_parameters,
        precision=spec.training.precision,
        optimizer=spec.training.optimizer,
        activation_checkpointing=spec.training.activation_checkpointing,
    )


def _check_data(spec: LaunchSpec) -> None:
    training = spec.training
    if training.train_on_prompt and training.mask_history:
        raise ConfigError("training.maskHistory: not together with trainOnPrompt, which learns every turn")
    if training.group_by_length and training.packing:
        raise ConfigError("training.groupByLength: only for packing: false; packed rows are of one length anyway")
    weighted = [dataset.weight is not None for dataset in spec.train]
    if any(weighted) and not all(weighted):
        raise ConfigError("datasets.train.weight: set it on every data set in `train`, or on none")
    if any(dataset.weight is not None for dataset in spec.evaluation):
        raise ConfigError("datasets.evaluation.weight: only for data sets in `train`; remove it")
    if any(d.tags and d.format not in ("ShareGPT", "Messages") for d in [*spec.train, *spec.evaluation]):
        raise ConfigError("datasets.tags: needs format ShareGPT or Messages")


def _check_output(spec: LaunchSpec) -> None:
    if spec.output.merge_adapter and spec.method != "LoRA":
        raise ConfigError("output.mergeAdapter: is only for method LoRA")
    board, profiler = spec.tracking.tensor_board, spec.tracking.profiler
    folders = {
        "tracking.tensorBoard": board.dir if board else None,
        "tracking.profiler": profiler.dir if profiler else None,
        "cache": spec.cache_dir,
    }
    for block, folder in folders.items():
        if folder is not None and Path(folder).is_relative_to(spec.output_dir):
            raise ConfigError(f"{block}.uri: must not be inside output.uri ({spec.output_dir})")


def _check_evaluation(spec: LaunchSpec) -> None:
    generation = spec.generation
    if generation.samples > 1 and generation.temperature == 0:
        raise ConfigError("evaluation.generation.temperature: must be above 0 for `samples` above 1")
    if max(generation.k) > generation.samples:
        raise ConfigError(f"evaluation.generation.k: each must be at most `samples` = {generation.samples}")
    names = [benchmark.benchmark for benchmark in spec.benchmarks]
    if len(names) != len(set(names)):
        raise ConfigError("datasets.evaluation: each `benchmark` may stand there once")
    selection = spec.selection
    measured = ["EvalLoss", "TokenAccuracy"] if spec.evaluation else []
    measured += [f"{name}PassAt1" for name in names if 1 in generation.k]
    if selection.metric is not None and selection.metric not in measured:
        raise ConfigError(
            f"evaluation.metric: {selection.metric} is not measured by this job; its evaluations measure "
            f"{', '.join(measured) or 'nothing'}"
        )
    if selection.metric is None and (selection.export_best or selection.early_stopping_patience is not None):
        raise ConfigError("evaluation: `exportBest` and `earlyStoppingPatience` need a `metric`")
    if selection.early_stopping_patience is not None and spec.training.eval_every_steps is None:
        raise ConfigError("evaluation.earlyStoppingPatience: needs training.evalEverySteps")


def fingerprint(spec: LaunchSpec, *, model_revision: str | None, train_digest: str) -> dict[str, Any]:
    """What must be the same for a checkpoint to be this run's: one entry for each field, so that a difference has a name.

    Args:
        spec: the launch.
        model_revision: the commit of a hub model; None for a path.
        train_digest: SHA-256 of the tokenised training data.
    """
    training = spec.training.to_wire()
    for name in ("evalEverySteps", "gradientAccumulationSteps", "loaderWorkers"):
        training.pop(name, None)
    return {
        "model.uri": spec.model.uri,
        "model.revision": model_revision,
        "datasets.train": train_digest,
        "datasets.train.weight": [d.weight for d in spec.train] if spec.train[0].weight is not None else None,
        "method": str(spec.method),
        **{f"adapter.{k}": v for k, v in (spec.adapter.to_wire() if spec.adapter else {}).items()},
        **{f"freeze.{k}": v for k, v in (spec.freeze.to_wire() if spec.freeze else {}).items()},
        **{f"quantization.{k}": v for k, v in (spec.quantization.to_wire() if spec.quantization else {}).items()},
        **{f"vision.{k}": v for k, v in (spec.vision.to_wire() if spec.vision else {}).items()},
        **{f"training.{k}": v for k, v in training.items()},
        **{f"deepspeed.{k}": v for k, v in spec.deepspeed.to_wire().items()},
    }


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The entries in which two fingerprints differ, as `field: saved X, now Y`."""
    keys = sorted((ours.keys() | theirs.keys()) - set(OF_RANKS))
    return [f"{k}: saved {theirs.get(k)!r}, now {ours.get(k)!r}" for k in keys if ours.get(k) != theirs.get(k)]
