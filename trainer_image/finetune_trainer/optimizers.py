"""The optimizer that the job asks for, over the parameters that are trained, in groups."""

import logging
from typing import Any

import torch

from finetune_api.launch import LaunchSpec
from finetune_api.spec import Offload, Optimizer, Precision
from finetune_trainer.adamw import CompiledAdamW
from finetune_trainer.adapters import is_b_matrix
from finetune_trainer.vision import PROJECTOR, part_of

RATE_MULTIPLIER = "rate_multiplier"
"""Key of a group: it learns at this multiple of the schedule's rate."""
log = logging.getLogger("finetune_trainer")


def build_optimizer(model: Any, spec: LaunchSpec) -> Any:
    """AdamW in the wanted form. With the optimizer offloaded it is DeepSpeed's, which computes on the CPU."""
    training = spec.training
    arguments: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
    }
    groups = parameter_groups(model, spec)
    if spec.deepspeed.offload_optimizer is Offload.CPU:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        full = training.precision is not Precision.PURE_BF16
        return DeepSpeedCPUAdam(groups, adamw_mode=True, fp32_optimizer_states=full, **arguments)
    if training.optimizer is not Optimizer.ADAMW:
        return _bitsandbytes(training.optimizer, groups, arguments)
    if training.compile:
        return CompiledAdamW(groups, **arguments)
    return torch.optim.AdamW(groups, fused=True, **arguments)


def parameter_groups(model: Any, spec: LaunchSpec) -> list[dict[str, Any]]:
    """Vectors (norms) and biases have no weight decay; LoRA+'s B matrices and a projector have rates of their own.

    Biases are told by their name too: those of experts and of blocks are stacked to matrices.
    """
    groups: dict[tuple[float, bool], list[Any]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = (_rate_multiplier(name, spec), _dimensions(parameter) >= 2 and not name.endswith("bias"))
            groups.setdefault(kind, []).append(parameter)
    decay = spec.training.weight_decay
    return [
        {"params": parameters, "weight_decay": decay if matrices else 0.0, RATE_MULTIPLIER: multiplier}
        for (multiplier, matrices), parameters in groups.items()
        if parameters
    ]


def _rate_multiplier(name: str, spec: LaunchSpec) -> float:
    ratio = spec.adapter.lora_plus_ratio if spec.adapter else None
    if ratio is not None and is_b_matrix(name):
        return ratio
    projector_rate = spec.vision.projector_learning_rate if spec.vision else None
    if projector_rate is not None and part_of(name) == PROJECTOR:
        return projector_rate / spec.training.learning_rate
    return 1.0


def _dimensions(parameter: Any) -> int:
    """Under ZeRO-3 a parameter is a flat slice that remembers its shape."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _bitsandbytes(optimizer: Optimizer, groups: list[dict[str, Any]], arguments: dict[str, Any]) -> Any:
    import bitsandbytes.optim as bnb

    if optimizer is not Optimizer.ADAMW_8BIT and not torch.cuda.is_available():
        log.warning("training.optimizer: %s: nothing is paged on a CPU; it computes the same", optimizer)
    kinds = {
        Optimizer.ADAMW_8BIT: bnb.AdamW8bit,
        Optimizer.PAGED_ADAMW: bnb.PagedAdamW,
        Optimizer.PAGED_ADAMW_8BIT: bnb.PagedAdamW8bit,
    }
    return kinds[optimizer](groups, **arguments)
