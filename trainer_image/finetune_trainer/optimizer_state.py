"""What training changes, as tensors: master weights and the optimizer's state, exactly as this rank holds them.

One concept in DeepSpeed's four shapes: no wrapper (the parameters are the masters), its bf16 optimizer, ZeRO 1/2, ZeRO 3.
Frozen weights are not part of it, and bf16 weights are rounded masters, so nothing else has to be saved.
"""

from collections.abc import Callable
from typing import Any

import torch

from finetune_trainer.engine import base_optimizer, is_partitioned
from finetune_trainer.reshard import MASTER, Layout, ReshardError

STEP = "step"


def masters(engine: Any) -> list[torch.Tensor]:
    """This rank's master weights, one tensor a partition; writing into them changes the training.

    They are float32, or bf16 with `precision: PureBF16`.
    """
    optimizer = engine.optimizer
    for name in ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        partitions = getattr(optimizer, name, None)
        if partitions is not None:
            return list(partitions)
    return [p for group in optimizer.param_groups for p in group["params"]]


def layout(engine: Any) -> Layout:
    """How DeepSpeed's wrapper spreads what is trained over the ranks.

    ZeRO 1, 2 and the bf16 optimizer put the weights of a parameter group one after the other and pad the whole
    (`flatten_dense_tensors_aligned`); ZeRO-3 cuts every parameter by itself (`_partition_param`).

    Raises:
        ReshardError: the order of the weights depends on the number of ranks, or there is padding between them.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp16_groups"):  # ZeRO-3
        return Layout(tuple(p.ds_numel for group in optimizer.fp16_groups for p in group))
    for key in ("round_robin_gradients", "parameter_alignment"):
        if getattr(optimizer, key, False):
            raise ReshardError(f"`deepspeed.config.zero_optimization.{key}` spreads it in another way")
    groups = optimizer.bf16_groups if hasattr(optimizer, "bf16_groups") else optimizer.bit16_groups
    return Layout(tuple(sum(p.numel() for p in group) for group in groups), optimizer.nccl_start_alignment_factor)


def _host(_name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def capture(engine: Any, host: Callable[[str, torch.Tensor], torch.Tensor] = _host) -> dict[str, torch.Tensor]:
    """Copies of the state on the host: `<partition>.master` and one entry for each of the optimizer's own.

    torch's and DeepSpeed's AdamW have `exp_avg`, `exp_avg_sq` and `step`; bitsandbytes' have `state1`, `state2`, `step` and,
    with 8 bits, `absmax1`, `absmax2`, `qmap1`, `qmap2`. A Python integer is kept as int64, a tensor in its own type. Before the
    first step there is only the master.

    Args:
        engine: the DeepSpeed engine.
        host: makes the copy of one tensor; the name is its key in the result.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a paged state is memory of the host that kernels may still be writing
    state = base_optimizer(engine).state
    tensors = {}
    for index, master in enumerate(masters(engine)):
        tensors[f"{index}.{MASTER}"] = host(f"{index}.{MASTER}", master)
        for name, value in state.get(master, {}).items():
            key = f"{index}.{name}"
            tensors[key] = host(key, value) if isinstance(value, torch.Tensor) else _integer(name, value)
    return tensors


def _integer(name: str, value: Any) -> torch.Tensor:
    assert isinstance(value, int), f"an optimizer's {name} is a {type(value).__name__}"
    return torch.tensor([value], dtype=torch.int64)


@torch.no_grad()
def restore(engine: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Puts captured state back, bit for bit, and refreshes the weights that the model computes with."""
    optimizer = base_optimizer(engine)
    for index, master in enumerate(masters(engine)):
        prefix = f"{index}."
        saved = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        master.data.copy_(saved.pop(MASTER))
        values = {name: _value(optimizer, name, value, master) for name, value in saved.items()}
        if values:
            optimizer.state[master] = values
    if hasattr(optimizer, "ds_opt_adam"):
        _replay_cpu_adam(optimizer, int(tensors.get(f"0.{STEP}", torch.zeros(1))))
    _refresh(engine)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the first layer's weights are gathered on another stream than they were written on


def _value(optimizer: Any, name: str, saved: torch.Tensor, master: torch.Tensor) -> Any:
    if saved.dtype == torch.int64:
        return int(saved)
    if getattr(optimizer, "is_paged", False) and name in ("state1", "state2"):
        buffer = optimizer.get_state_buffer(master, dtype=saved.dtype)  # memory that can move between GPU and host
        buffer.copy_(saved)
        return buffer
    return saved.to(master.device)


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
        optimizer.invalidate_secondary_tensor()  # each node's own parts, of the weights that were loaded
        if optimizer.persistent_parameters:  # small ones stay whole on every rank: gather them again
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif is_partitioned(engine):
        optimizer.update_lp_params()
