"""The DeepSpeed engine: its configuration, its optimizer, and the few things that differ between its optimizers.

Owns every number that DeepSpeed is told; nothing is left to its defaults where the default depends on a version.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch

from finetune_api.launch import LaunchSpec
from finetune_api.spec import Offload, Precision
from finetune_trainer.adapters import trains_masters
from finetune_trainer.deepspeed_block import merged
from finetune_trainer.layer_units import sizes
from finetune_trainer.optimizers import RATE_MULTIPLIER, build_optimizer

log = logging.getLogger("finetune_trainer")
GATHERED_ELEMENTS = 50_000_000
"""Of weights that ZeRO-1 and 2 gather at once. DeepSpeed's default of 5e8 would take gigabytes beside a small model."""


def zero_stage(spec: LaunchSpec) -> int:
    """The stage that DeepSpeed runs.

    Its stage 0 with bf16 adds up the gradients of micro-batches in bf16 and refuses anything else; its stage 1 adds them up in
    float32. Stage 1 is therefore run for stage 0 with bf16: on one rank the two are the same, on several it uses less memory.
    """
    stage = int(spec.deepspeed.zero_stage)
    return max(stage, 1) if copies_masters(spec) else stage


def copies_masters(spec: LaunchSpec) -> bool:
    """Whether DeepSpeed keeps float32 masters of weights that are trained in bf16."""
    return spec.training.precision is Precision.BF16 and not trains_masters(spec)


def deepspeed_config(spec: LaunchSpec) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`."""
    training, stage = spec.training, zero_stage(spec)
    zero: dict[str, Any] = {
        "stage": stage,
        "allgather_bucket_size": GATHERED_ELEMENTS,
        "overlap_comm": spec.world_size > 1 or stage == 3,  # stage 3 also has weights to fetch, from the host's memory
        "contiguous_gradients": stage < 3,  # else one copy more: stage 3 puts gradients in order of ranks in any case
        "round_robin_gradients": False,
        # So that no backward pass holds on to gathered weights; a compiled layer's does not, and could not be cached with it.
        "memory_efficient_linear": not training.compile,
    }
    if spec.deepspeed.offload_optimizer is Offload.CPU:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if spec.deepspeed.offload_parameters is Offload.CPU:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        # Without ZeRO the engine clips after throwing the norm away; there `clip_gradients` does it.
        "gradient_clipping": training.max_grad_norm if stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a step
    }
    # An infinite norm ends the job in any case; DeepSpeed would look for it in every gradient by itself, ten kernels for each.
    bf16 = {"enabled": True, "check_grad_overflow": False}
    if copies_masters(spec):
        config["bf16"] = bf16
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif training.precision is Precision.PURE_BF16 and stage > 0:
        # Without ZeRO nothing is said: the parameters are bf16 and torch's optimizer works on them as they are.
        config["bf16"] = {**bf16, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
        config["data_types"] = {"grad_accum_dtype": "bf16"}
    return merged(config, spec.deepspeed.config or {})


def build_engine(model: Any, spec: LaunchSpec, config: dict[str, Any]) -> Any:
    """Wraps the model: from here on its parameters belong to DeepSpeed."""
    import deepspeed

    if zero_stage(spec) != spec.deepspeed.zero_stage:
        log.info("zeroStage 0 with BF16 runs as DeepSpeed's stage 1, so that gradients are added up in float32")
    config = merged({"zero_optimization": sizes(model, zero_stage(spec), spec.world_size)}, config)
    optimizer = build_optimizer(model, spec)
    log.info("engine: DeepSpeed, ZeRO stage %d, optimizer %s", zero_stage(spec), type(optimizer).__name__)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    if is_partitioned(engine):
        engine.optimizer.get_grad_norm_direct = _norm_over_ranks  # DeepSpeed's copies every gradient as float64
    else:
        engine.zero_grad = engine.optimizer.zero_grad  # DeepSpeed's walks through all modules
        if spec.world_size == 1:
            engine.enable_backward_allreduce = False  # it would copy all gradients to a buffer and back
    return engine


def base_optimizer(engine: Any) -> Any:
    """The AdamW inside DeepSpeed's wrapper, whose groups and state are the real ones."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def set_learning_rate(engine: Any, rate: float) -> None:
    """The schedule is ours, so the rate is set before each step; a group may learn at a multiple of it."""
    for group in base_optimizer(engine).param_groups:
        group["lr"] = rate * group[RATE_MULTIPLIER]


def is_partitioned(engine: Any) -> bool:
    """Whether ranks hold different parts of the optimizer's state."""
    return engine.optimizer is not base_optimizer(engine)


def release_gathered(engine: Any) -> None:
    """Under ZeRO-3 lets go of weights that are whole or on their way, where no training step follows that does so."""
    if hasattr(engine.optimizer, "empty_partition_cache"):
        engine.optimizer.empty_partition_cache()


def step(engine: Any, max_grad_norm: float) -> float:
    """Clips by the global norm and updates the weights, after the last micro-batch's backward.

    Returns:
        The norm of the whole gradient over all ranks, before clipping. It is waited for, and the new weights with it: ZeRO-3
        gathers them on another stream.
    """
    norm = None if is_partitioned(engine) else _clip_gradients(engine.optimizer, max_grad_norm or float("inf"))
    engine.step()
    return float(engine.get_global_grad_norm() if norm is None else norm)


def _norm_over_ranks(gradients: Iterable[torch.Tensor], _parameters: Any) -> torch.Tensor:
    """Of what all ranks hold together of a group of gradients, with the zeros that fill up the last rank's part."""
    squared = _norm(list(gradients)).square()
    torch.distributed.all_reduce(squared)
    return squared.sqrt()


def _norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Computed in float32, whatever they are in."""
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))
    return norm


def _clip_gradients(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> torch.Tensor:
    """As `torch.nn.utils.clip_grad_norm_`, which would add up the norm of bf16 gradients in bf16 (three digits).

    A fused optimizer divides gradients as it reads them, instead of having all of them moved before.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = _norm(gradients)
    excess = ((norm + 1e-6) / max_grad_norm).clamp(min=1)
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale = excess  # type: ignore[attr-defined]
    else:
        torch._foreach_mul_(gradients, 1 / excess)
    return norm
