"""A forward pass that only finds something out about the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def trial(engine: Any) -> Iterator[None]:
    """Within it nothing is learned, dropped or compiled; all ranks are in it together where weights are partitioned."""
    training = engine.training
    engine.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        engine.train(training)
