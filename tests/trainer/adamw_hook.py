"""Imported by a test's ranks (`TEST_HOOK`): compiled AdamW takes a tiny model's weights for large ones."""

from functools import partial

from finetune_trainer import optimizers

optimizers.CompiledAdamW = partial(optimizers.CompiledAdamW, large=1024)  # type: ignore[assignment,misc]
