"""Whether samples that share a row see each other: by a trial, since no model says it of itself.

Layers with a state (state space, convolution, linear attention) know nothing of where a sample begins, and some models of plain
attention make their masks or positions without `position_ids`.
"""

from typing import Any

import numpy as np
import torch

from finetune_trainer.attention.layout import layout_arguments
from finetune_trainer.trial import trial

BEFORE, AFTER = 6, 3
"""Tokens of a row's first sample, and of the second."""
EXACT, ROUNDED = 1e-5, 1e-2
"""What may differ in float32 and below, as a share of the largest logit. Nothing does, but for experts that get other tokens."""


def keeps_apart(engine: Any, vocabulary: int, device: torch.device, *, by_layout: bool) -> bool:
    """Whether the same sample gets the same logits behind two others; all ranks call it.

    Args:
        engine: what is called, the model or a wrapper of it.
        vocabulary: its number of tokens.
        device: of its inputs.
        by_layout: whether attention is told where sequences begin (see `attention.Choice`).
    """
    random = torch.Generator().manual_seed(0)
    first = torch.randint(vocabulary, (2, BEFORE), generator=random)
    second = torch.randint(vocabulary, (1, AFTER), generator=random).expand(2, -1)
    arguments: dict[str, Any] = {
        "input_ids": torch.cat([first, second], dim=1),
        "position_ids": torch.cat([torch.arange(BEFORE), torch.arange(AFTER)]).expand(2, -1),
        "logits_to_keep": torch.arange(BEFORE, BEFORE + AFTER),
    }
    if by_layout:
        arguments |= layout_arguments(np.array([BEFORE, AFTER, BEFORE, AFTER]))
    arguments = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
    with trial(engine):
        logits = engine(**arguments, use_cache=False).logits
    limit = EXACT if logits.dtype == torch.float32 else ROUNDED
    one, other = logits.float()
    # Of most tokens: experts that get other tokens may change one, and padding has no embedding that could change.
    return bool((one - other).abs().amax(dim=-1).median() <= limit * logits.float().abs().max())
