"""The arithmetic of one optimizer step and of one evaluation.

The gradient is that of (sum of token losses) / (target tokens of the whole step), whatever the number of ranks and
micro-batches: each micro-batch contributes its sum of token losses, divided by a number that every rank knows beforehand.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from finetune_trainer import engine as ds
from finetune_trainer.data.batches import IGNORE, Batch, Rows
from finetune_trainer.data.order import hash64
from finetune_trainer.distributed import World


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
    return _loss_sum(*_target_logits(model, batch, device))


def _loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def _target_logits(model: Any, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, shape (rows, kept, vocabulary), and labels, shape (rows, kept), where something is to be learnt.

    The head is applied only at positions that some row of the batch learns from: with masked prompts that is often less than
    half of a large matrix product.
    """
    labels = batch.labels.to(device)
    keep = (labels != IGNORE).any(dim=0).nonzero().flatten()
    if keep.numel() == 0:  # an empty row takes part so that the collectives of all ranks match
        keep = torch.zeros(1, dtype=torch.int64, device=device)
    positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids.to(device)}
    output = model(input_ids=batch.input_ids.to(device), use_cache=False, logits_to_keep=keep, **positions)
    return output.logits, labels[:, keep]


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
        beat: sign of life, called for each micro-batch.
    """
    share = len(batch_rows) // world.size
    first = world.rank * share
    # DeepSpeed averages gradients over ranks; the factor `world.size` turns its mean into a sum.
    scale = world.size / max(1, rows.targets_in(batch_rows))
    total, num_samples, num_tokens, wait = 0.0, 0, 0, 0.0
    for at in range(first, first + share, micro_batch_size):
        started = time.perf_counter()
        batch = rows.batch(batch_rows[at : at + micro_batch_size])
        wait += time.perf_counter() - started
        torch.manual_seed(hash64(seed, step, at))  # dropout depends on the rows, not on the rank that has them
        loss = loss_sum(engine, batch, world.device)
        engine.backward(loss * scale, scale_wrt_gas=False)
        if at + micro_batch_size < first + share:
            engine.step()  # only counts the micro-batch
        else:
            grad_norm = ds.step(engine, max_grad_norm)
        total += loss.item()
        num_samples, num_tokens = num_samples + batch.num_samples, num_tokens + batch.num_tokens
        beat()
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
) -> HeldOut | None:
    """Mean loss for each target token, and accuracy, on held-out rows; all ranks call it.

    Batches do not depend on the number of ranks, and their sums are added in one fixed order, so that neither does the result.

    Returns:
        The measures; None if any rank was asked to leave before the end.
    """
    order = sorted(range(len(rows)), key=lambda row: (-int(rows.row_lengths[row]), row))  # least padding
    batches = [order[at : at + micro_batch_size] for at in range(0, len(order), micro_batch_size)]
    sums, correct = [0.0] * len(batches), 0
    engine.eval()
    try:
        for round_start in range(0, len(batches), world.size):
            index = round_start + world.rank
            batch = rows.batch(batches[index] if index < len(batches) else [None])
            logits, labels = _target_logits(engine, batch, world.device)
            value = _loss_sum(logits, labels).item()
            if index < len(batches):
                sums[index] = value
                correct += int((logits.argmax(dim=-1) == labels).sum())  # no token has the label that is ignored
            beat()
            if world.sum([float(stop_requested())])[0] > 0:
                return None
    finally:
        engine.train()
    targets = int(rows.row_targets.sum())
    return HeldOut(math.fsum(world.sum(sums)) / targets, world.sum([correct])[0] / targets)
