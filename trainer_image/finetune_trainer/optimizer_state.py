"""What training changes, as tensors: float32 master weights and Adam's moments, exactly as this rank holds them.

One concept in DeepSpeed's four shapes: no wrapper (the parameters are the masters), its bf16 optimizer, ZeRO 1/2, ZeRO 3.
Frozen weights are not part of it, and bf16 weights are rounded masters, so nothing else has to be saved.
"""

from collections.abc import Callable
from typing import Any

import torch

from finetune_trainer.engine import base_optimizer, is_partitioned

MOMENTS = ("exp_avg", "exp_avg_sq")


def masters(engine: Any) -> list[torch.Tensor]:
    """This rank's float32 master weights, one tensor a partition; writing into them changes the training."""
    optimizer = engine.optimizer
    for name in ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        partitions = getattr(optimizer, name, None)
        if partitions is not None:
            return list(partitions)
    return [p for group in optimizer.param_groups for p in group["params"]]


def _host(_name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def capture(engine: Any, host: Callable[[str, torch.Tensor], torch.Tensor] = _host) -> dict[str, torch.Tensor]:
    """Copies of the state on the host: `<partition>.master`, `.exp_avg`, `.exp_avg_sq`, `.step`.

    Before the first step there are no moments.

    Args:
        engine: the DeepSpeed engine.
        host: makes the copy of one tensor; the name is its key in the result.
    """
    state = base_optimizer(engine).state
    tensors = {}
    for index, master in enumerate(masters(engine)):
        tensors[f"{index}.master"] = host(f"{index}.master", master)
        moments = state.get(master, {})
        for name in MOMENTS:
            if name in moments:
                tensors[f"{index}.{name}"] = host(f"{index}.{name}", moments[name])
        if "step" in moments:
            tensors[f"{index}.step"] = torch.tensor([float(moments["step"])], dtype=torch.float64)
    return tensors


@torch.no_grad()
def restore(engine: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Puts captured state back, bit for bit, and refreshes the weights that the model computes with."""
    state = base_optimizer(engine).state
    for index, master in enumerate(masters(engine)):
        master.data.copy_(tensors[f"{index}.master"])
        moments = {}
        for name in MOMENTS:
            if (saved := tensors.get(f"{index}.{name}")) is not None:
                moments[name] = saved.to(master.device).reshape(master.shape)
        if (step := tensors.get(f"{index}.step")) is not None:
            moments["step"] = _step(engine, float(step), master)
        if moments:
            state[master] = moments
    if tensors and not isinstance(base_optimizer(engine), torch.optim.AdamW):
        _replay_cpu_adam(base_optimizer(engine), int(tensors.get("0.step", torch.zeros(1))))
    _refresh(engine)


def _step(engine: Any, value: float, master: torch.Tensor) -> Any:
    """DeepSpeed's CPU Adam counts in a Python int, torch's fused AdamW in a float32 tensor on the parameter's device."""
    if isinstance(base_optimizer(engine), torch.optim.AdamW):
        return torch.tensor(value, dtype=torch.float32, device=master.device)
    return int(value)


def _replay_cpu_adam(optimizer: Any, steps: int) -> None:
    """Brings DeepSpeed's CPU Adam to where it was.

    It keeps the powers of its betas inside, multiplied up step by step in float32. Asked for step n at once it computes them with
    `pow`, which differs in the last bit, and the weights with it. So the steps are gone through again on one dummy number.
    """
    dummy = [torch.zeros(1) for _ in range(4)]
    group = optimizer.param_groups[0]
    beta1, beta2 = group["betas"]
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, 0.0, beta1, beta2, group["eps"], 0.0, group["bias_correction"], *dummy
        )


def _refresh(engine: Any) -> None:
    """Rounds the masters into the model's own weights, on all ranks."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:  # small ones stay whole on every rank: gather them again
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif is_partitioned(engine):
        optimizer.update_lp_params()
