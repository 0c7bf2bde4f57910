"""Rows and their order as the job wants them: packed or not, mixed by weight, grouped by length."""

import logging
from typing import Any

import numpy as np

from finetune_api.launch import LaunchSpec
from finetune_trainer.data.batches import Rows
from finetune_trainer.data.order import Mixture, RowOrder, shares
from finetune_trainer.data.packing import SampleRows, pack_parts, pack_rows, single_rows
from finetune_trainer.data.store import TokenStore
from finetune_trainer.errors import ConfigError

log = logging.getLogger("finetune_trainer")


def make_rows(spec: LaunchSpec, name: str, store: TokenStore, reports: list[dict[str, Any]]) -> SampleRows:
    """Packs samples into rows if the job wants that; data sets that are mixed by weight do not share rows."""
    training = spec.training
    if not training.packing:
        return single_rows(len(store))
    if name == "train" and spec.train[0].weight is not None:
        return pack_parts(store.lengths, [report["samples"] for report in reports], training.max_length)
    return pack_rows(store.lengths, training.max_length)


def make_order(spec: LaunchSpec, rows: Rows, reports: list[dict[str, Any]]) -> RowOrder:
    """The order of the training rows, with the mixture of data sets and the grouping that the job wants.

    Raises:
        ConfigError: a data set's weight is so small that an epoch takes none of its rows.
    """
    training = spec.training
    mixture = None
    weights = [dataset.weight for dataset in spec.train if dataset.weight is not None]
    if weights:
        ends = np.cumsum([report["samples"] for report in reports])
        firsts = rows.samples.samples[rows.samples.offsets[:-1]]  # a row's samples are of one data set
        of_row = np.searchsorted(ends, firsts, side="right")
        sizes = np.bincount(of_row, minlength=len(weights)).tolist()
        mixture = Mixture(tuple(sizes), tuple(shares(sizes, weights)))
        for dataset, size, taken in zip(spec.train, sizes, mixture.taken, strict=True):
            if taken == 0:
                raise ConfigError(
                    f"datasets.train.weight: {dataset.weight} of {dataset.uri} is less than one of the {len(rows)} rows of an "
                    "epoch; raise it, or leave the data set out"
                )
            log.info("train %s: weight %g, an epoch takes %d of %d rows", dataset.uri, dataset.weight, taken, size)
    return RowOrder(
        len(rows),
        training.seed,
        training.global_batch_size,
        training.epochs,
        training.max_steps,
        mixture,
        rows.row_lengths if training.group_by_length else None,
    )
