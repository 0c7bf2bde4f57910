"""Imported by a test's ranks (`TEST_HOOK`): rank 1 hangs in step 4, after a sign of life that is newer than rank 0's last."""

import os
import time
from typing import Any

import finetune_trainer.engine as ds

build_engine = ds.build_engine


def build(*arguments: Any) -> Any:
    engine = build_engine(*arguments)
    forward, backward, calls = engine.forward, engine.backward, [0]

    def late(*inputs: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 7:  # two micro-batches a step
            time.sleep(0.5)
        return forward(*inputs, **named)

    def hang(*inputs: Any, **named: Any) -> Any:
        if calls[0] == 7:
            time.sleep(3600)
        return backward(*inputs, **named)

    engine.forward, engine.backward = late, hang
    return engine


if os.environ["RANK"] == "1":
    ds.build_engine = build
