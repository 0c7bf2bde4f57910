"""What is said about the data before training: what was read, what was lost, how much of the batches is padding."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune_trainer.data.order import RowOrder
from finetune_trainer.data.store import Ints

log = logging.getLogger("finetune_trainer")


def padding_share(lengths: Ints, order: RowOrder, micro_batch_size: int) -> float:
    """The share of padding in all tokens that the model computes in the first epoch, or up to the last step before its end.

    Args:
        lengths: tokens of each row.
        order: of the rows.
        micro_batch_size: rows that are padded to one length.
    """
    rows = order.epoch(0)
    if order.max_steps is not None:
        rows = rows[: order.max_steps * order.global_batch_size]
    taken = lengths[rows]
    widths = np.maximum.reduceat(taken, np.arange(0, len(taken), micro_batch_size))
    last = len(taken) - (len(widths) - 1) * micro_batch_size
    computed = int(widths[:-1].sum()) * micro_batch_size + int(widths[-1]) * last
    return 1.0 - int(taken.sum()) / computed


def log_reports(name: str, reports: Sequence[dict[str, Any]]) -> None:
    """Says one line for each data set.

    Args:
        name: `train` or `evaluation`.
        reports: fields of `store.DatasetReport`.
    """
    for r in reports:
        log.info(
            f"{name} {r['uri']}: read {r['read']:,}, used {r['used']:,} (truncated {r['truncated']:,}, split {r['split']:,}), "
            f"left out {r['read'] - r['used']:,} (too long {r['dropped']:,}, an image would be cut {r['image_cut']:,}, without a "
            f"target {r['no_target']:,}); {r['samples']:,} samples, {r['images']:,} images, {r['tokens']:,} tokens, "
            f"{r['targets']:,} of them targets, {r['tokens_lost']:,} lost"
        )
