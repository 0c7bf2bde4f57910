"""The arithmetic of one optimizer step and of one evaluation.

The gradient is that of (sum of token losses) / (target tokens of the whole step), whatever the number of ranks and
micro-batches: each micro-batch contributes its sum of token losses, divided by a number that every rank knows beforehand.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from finetune_trainer import engine as ds
from finetune_trainer.data.batches import Batch, Rows
from finetune_trainer.data.order import hash64
from finetune_trainer.distributed import World
from finetune_trainer.inputs import Inputs, inputs_of
from finetune_trainer.kernels import kernels_of
from finetune_trainer.losses import cross_entropy_sum, measure
from finetune_trainer.prefetch import Prefetcher


@dataclass(frozen=True)
class StepResult:
    """Facts of one optimizer step over all ranks."""

    loss: float
    """Mean loss for each target token."""
    grad_norm: float
    """Before clipping."""
    num_samples: int
    num_tokens: int
    """Without padding."""
    stop: bool
    """Whether any rank was asked to leave: the same on all ranks."""
    data_wait_seconds: float


@dataclass(frozen=True)
class HeldOut:
    """What was measured on held-out rows."""

    loss: float
    """Mean for each target token."""
    token_accuracy: float
    """Share of target tokens that the model holds for the likeliest."""


def loss_sum(model: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """Sum of the token losses of a micro-batch, a float32 scalar."""
    by_layout = kernels_of(model).attention.by_layout
    return loss_of(model, inputs_of(batch, by_layout=by_layout).to(device))


def loss_of(model: Any, inputs: Inputs) -> torch.Tensor:
    """The same from inputs that are on the device.

    The head is applied only at positions that some row of the batch learns from: with masked prompts that is often less than
    half of a large matrix product.
    """
    head = kernels_of(model).head
    if head is None:
        return cross_entropy_sum(model(**inputs.arguments).logits, inputs.targets)
    with head.computing(inputs.targets):
        loss: torch.Tensor = model(**inputs.arguments).logits.view(())
    return loss


@torch.no_grad()
def measures_of(model: Any, inputs: Inputs) -> tuple[float, int]:
    """Sum of the token losses of a batch, and the number of targets that the model holds for the likeliest token."""
    kernels = kernels_of(model)
    if kernels.head is None:
        measured = measure(model(**inputs.arguments).logits, inputs.targets)
    else:
        with kernels.head.computing(inputs.targets) as head:
            model(**inputs.arguments)
            measured = head.measured
    loss, correct = measured
    return float(loss), int(correct)


@dataclass(frozen=True)
class Prepared:
    """A micro-batch, ready to be sent to the device."""

    inputs: Inputs
    num_samples: int
    num_tokens: int


def micro_batches(
    engine: Any, rows: Rows, device: torch.device, plan: Iterator[Sequence[int | None]], workers: int = 1
) -> Prefetcher[Prepared]:
    """Micro-batches of the planned rows, `workers` of them built ahead; on CUDA in page-locked memory."""
    by_layout = kernels_of(engine).attention.by_layout

    def build(wanted: Sequence[int | None]) -> Prepared:
        batch = rows.batch(wanted)
        inputs = inputs_of(batch, by_layout=by_layout)
        return Prepared(inputs.pinned() if device.type == "cuda" else inputs, batch.num_samples, batch.num_tokens)

    return Prefetcher(build, plan, workers)


def own_rows(batch_rows: Sequence[int | None], world: World, micro_batch_size: int) -> Iterator[Sequence[int | None]]:
    """This rank's part of a step's rows, micro-batch after micro-batch."""
    positions = _own_positions(len(batch_rows), world, micro_batch_size)
    return (batch_rows[at : at + micro_batch_size] for at in positions)


def _own_positions(num_rows: int, world: World, micro_batch_size: int) -> range:
    """Where this rank's micro-batches begin in a step's rows."""
    share = num_rows // world.size
    return range(world.rank * share, (world.rank + 1) * share, micro_batch_size)


def train_step(
    engine: Any,
    rows: Rows,
    batch_rows: Sequence[int | None],
    world: World,
    *,
    step: int,
    seed: int,
    micro_batch_size: int,
    max_grad_norm: float,
    stop_requested: Callable[[], bool],
    beat: Callable[[], None],
    batches: Prefetcher[Prepared] | None = None,
) -> StepResult:
    """Forward, backward and update on one global batch; all ranks call it.

    Args:
        engine: the DeepSpeed engine.
        rows: the training rows.
        batch_rows: the rows of the whole step, the same on every rank; a rank takes its slice.
        world: this rank's place.
        step: from 1; with `seed` and the position it seeds dropout.
        seed: the job's seed.
        micro_batch_size: rows of one forward pass.
        max_grad_norm: 0 for no clipping.
        stop_requested: whether this pod was asked to leave.
        beat: sign of life, called twice for each micro-batch.
        batches: builds micro-batches ahead, from step to step; its plan has come to this step.
    """
    positions = _own_positions(len(batch_rows), world, micro_batch_size)
    batches = batches or micro_batches(engine, rows, world.device, own_rows(batch_rows, world, micro_batch_size))
    # DeepSpeed averages gradients over ranks; the factor `world.size` turns its mean into a sum.
    scale = world.size / max(1, rows.targets_in(batch_rows))
    num_samples, num_tokens, wait = 0, 0, 0.0
    losses = []
    for at in positions:
        started = time.perf_counter()
        batch = batches.take()
        wait += time.perf_counter() - started
        torch.manual_seed(hash64(seed, step, at))  # dropout depends on the rows, not on the rank that has them
        loss = loss_of(engine, batch.inputs.to(world.device))
        beat()  # before ranks wait for each other: one that hangs falls behind
        engine.backward(loss * scale, scale_wrt_gas=False)
        if at != positions[-1]:
            engine.step()  # only counts the micro-batch
        else:
            grad_norm = ds.step(engine, max_grad_norm)
        losses.append(loss.detach())
        num_samples, num_tokens = num_samples + batch.num_samples, num_tokens + batch.num_tokens
        beat()
    # Read once, after the step: until here the host only hands out work, and the device never waits for it.
    total = 0.0
    for value in torch.stack(losses).tolist():
        total += value  # one after the other in float64; `sum` compensates from Python 3.12 on
    loss_total, samples, tokens, stops = world.sum([total, num_samples, num_tokens, float(stop_requested())])
    return StepResult(
        loss=loss_total / max(1, rows.targets_in(batch_rows)),
        grad_norm=grad_norm,
        num_samples=int(samples),
        num_tokens=int(tokens),
        stop=stops > 0,
        data_wait_seconds=wait,
    )


@torch.no_grad()
def evaluate(
    engine: Any,
    rows: Rows,
    world: World,
    *,
    micro_batch_size: int,
    stop_requested: Callable[[], bool],
    beat: Callable[[], None],
    workers: int = 1,
) -> HeldOut | None:
    """Mean loss for each target token, and accuracy, on held-out rows; all ranks call it.

    Batches do not depend on the number of ranks, and their sums are added in one fixed order, so that neither does the result.

    Returns:
        The measures; None if any rank was asked to leave before the end.
    """
    order = sorted(range(len(rows)), key=lambda row: (-int(rows.row_lengths[row]), row))  # least padding
    batches = [order[at : at + micro_batch_size] for at in range(0, len(order), micro_batch_size)]
    sums, correct = [0.0] * len(batches), 0
    own = range(world.rank, len(batches) + world.rank, world.size)
    plan: Iterator[Sequence[int | None]] = (batches[index] if index < len(batches) else [None] for index in own)
    engine.eval()
    try:
        with closing(micro_batches(engine, rows, world.device, plan, workers)) as ahead:
            for index in own:
                value, right = measures_of(engine, ahead.take().inputs.to(world.device))
                if index < len(batches):
                    sums[index] = value
                    correct += right
                beat()
                if world.sum([float(stop_requested())])[0] > 0:
                    return None
    finally:
        engine.train()
    targets = int(rows.row_targets.sum())
    return HeldOut(math.fsum(world.sum(sums)) / targets, world.sum([correct])[0] / targets)
