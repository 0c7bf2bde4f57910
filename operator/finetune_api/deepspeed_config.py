"""`deepspeed.config`: DeepSpeed's own settings as a free object, and the keys in it that are refused at admission.

Refused are keys that a field of the job decides, and settings that would keep training state where checkpoints do not look.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from finetune_api.base import rules

Path = tuple[str, ...]


def _decided_by(field: str) -> str:
    return f"is decided by `{field}`; set that instead"


_NO_CHECKPOINT = (
    "is not supported: state that it moves would be missing in checkpoints, and a resumed run would be another"
)
_ZERO = "zero_optimization"
_OPTIMIZER, _PARAM = "offload_optimizer", "offload_param"
_BLOCKS: dict[Path, str] = {
    ("activation_checkpointing",): _decided_by("training.activationCheckpointing"),
    ("amp",): _decided_by("training.precision"),
    ("bf16",): _decided_by("training.precision"),
    ("bfloat16",): _decided_by("training.precision"),
    ("data_types",): _decided_by("training.precision"),
    ("fp16",): _decided_by("training.precision"),
    ("optimizer",): _decided_by("training.optimizer"),
    ("scheduler",): _decided_by("training.scheduler"),
    ("torch_autocast",): _decided_by("training.precision"),
    (_ZERO, "zenflow"): _NO_CHECKPOINT,
}
_SCALARS: dict[Path, str] = {
    ("gradient_accumulation_steps",): _decided_by("training.globalBatchSize"),
    ("gradient_clipping",): _decided_by("training.maxGradNorm"),
    ("train_batch_size",): _decided_by("training.globalBatchSize"),
    ("train_micro_batch_size_per_gpu",): _decided_by("training.microBatchSize"),
    (_ZERO, "stage"): _decided_by("deepspeed.zeroStage"),
    (_ZERO, _OPTIMIZER, "device"): _decided_by("deepspeed.offloadOptimizer"),
    (_ZERO, _OPTIMIZER, "nvme_path"): _NO_CHECKPOINT,
    (_ZERO, _PARAM, "device"): _decided_by("deepspeed.offloadParameters"),
    (_ZERO, _PARAM, "nvme_path"): _NO_CHECKPOINT,
}
_BOOLEANS: dict[Path, str] = {
    (_ZERO, "cpu_offload"): _decided_by("deepspeed.offloadOptimizer"),
    (_ZERO, "cpu_offload_param"): _decided_by("deepspeed.offloadParameters"),
    (_ZERO, "legacy_stage1"): _NO_CHECKPOINT,
    (_ZERO, _OPTIMIZER, "super_offload"): _NO_CHECKPOINT,
    (_ZERO, "compute_grad_norm"): "is not supported: the gradient's norm is reported and clipped by",
}
_NUMBERS: dict[Path, str] = {(_ZERO, _OPTIMIZER, "ratio"): _NO_CHECKPOINT}
REFUSED = _BLOCKS | _SCALARS | _BOOLEANS | _NUMBERS
"""Each refused key, by its path, and why."""
_FREE: dict[str, Any] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
_TYPES: tuple[tuple[dict[Path, str], dict[str, Any]], ...] = (
    (_BLOCKS, _FREE),
    (_SCALARS, {"x-kubernetes-int-or-string": True, "maxLength": 4096}),
    (_BOOLEANS, {"type": "boolean"}),
    (_NUMBERS, {"type": "number"}),
)


def check(config: dict[str, Any]) -> dict[str, Any]:
    """Refuses what `REFUSED` names.

    Raises:
        ValueError: naming the key and what to do.
    """
    for path, reason in REFUSED.items():
        node: Any = config
        for key in path[:-1]:
            node = node.get(key, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict) and path[-1] in node:
            raise ValueError(message(path, reason))
    return config


def message(path: Path, reason: str) -> str:
    """How a refusal reads."""
    return f"`{'.'.join(path)}` {reason}"


def schema() -> dict[str, Any]:
    """The structural schema. CEL sees only what a schema names, so the refused keys stand in it."""
    return _node(())


def _node(here: Path) -> dict[str, Any]:
    """The object at a path, with the refused keys below it."""
    below = {path: kind for table, kind in _TYPES for path in table if path[: len(here)] == here}
    names = sorted({path[len(here)] for path in below})
    properties = {
        name: below[*here, name] | {"description": f"Refused: {REFUSED[*here, name]}."}
        if (*here, name) in below
        else _node((*here, name)) | {"description": "As in DeepSpeed's documentation, but for what is refused."}
        for name in names
    }
    checks = [(f"!has(self.{n})", message((*here, n), REFUSED[*here, n])) for n in names if (*here, n) in REFUSED]
    return _FREE | {"properties": properties} | rules(*checks)


DeepSpeedConfig = Annotated[
    dict[str, Any], AfterValidator(check), Field(json_schema_extra={"x-finetune-structural": schema()})
]
"""A raw block of DeepSpeed's configuration."""
