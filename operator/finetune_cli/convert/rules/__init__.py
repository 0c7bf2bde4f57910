"""The rules: each reads a few keys that belong together and decides the fields that they have here."""

from collections.abc import Callable

from finetune_cli.convert.conversion import Conversion
from finetune_cli.convert.rules import compute, evaluation, method, model, output, training

RULES: tuple[Callable[[Conversion], None], ...] = (
    model.source,
    model.cache,
    model.template,
    method.stage,
    method.adapter,
    method.freeze,
    method.quantization,
    method.vision,
    training.batch,
    training.duration,
    training.data_order,
    training.lengths,
    training.learning_rate,
    training.optimizer,
    compute.precision,
    compute.checkpointing,
    compute.kernels,
    evaluation.schedule,
    evaluation.best,
    evaluation.generation,
    output.place,
    output.saving,
    output.tracking,
)
"""All but data sets and DeepSpeed, which read files of their own."""
