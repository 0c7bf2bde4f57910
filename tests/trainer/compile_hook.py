"""Imported by a test's ranks (`TEST_HOOK`): compiled AdamW takes a tiny model's weights for large ones.

Nothing is compiled, only traced: on a busy CPU it takes a minute and more.
"""

from functools import partial

from finetune_trainer import kernels, optimizers

optimizers.CompiledAdamW = partial(optimizers.CompiledAdamW, large=1024, backend="aot_eager")  # type: ignore[assignment,misc]
kernels.compile_layers = partial(kernels.compile_layers, backend="aot_eager")
