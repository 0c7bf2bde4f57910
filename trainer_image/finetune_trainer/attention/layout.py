"""Where sequences begin in a batch, as the kernels for variable lengths want it: worked out once a batch, on the host.

transformers would find it out from `position_ids` in every layer, and wait for the device each time. The names are those that
transformers hands through to the attention function (`FlashAttentionKwargs`).
"""

from typing import Any

import numpy as np
import torch

from finetune_trainer.data.store import Ints

BUCKET = 16
"""The number of boundaries is rounded up to a multiple of this, by empty sequences at the end: few shapes for compiled code,
and an empty sequence costs a kernel next to nothing."""


def layout_arguments(sequence_lengths: Ints) -> dict[str, Any]:
    """Keyword arguments for the model.

    Args:
        sequence_lengths: tokens of each sequence of the flattened batch; they cover it.

    Returns:
        Boundaries (int32, on the host) and the true longest length: a rounded one would make kernels do more work.
    """
    ends = np.cumsum(sequence_lengths)
    size = -(-(len(ends) + 1) // BUCKET) * BUCKET
    boundaries = np.full(size, ends[-1], dtype=np.int32)
    boundaries[0] = 0
    boundaries[1 : len(ends) + 1] = ends
    tensor, longest = torch.from_numpy(boundaries), int(sequence_lengths.max())
    return {"cu_seq_lens_q": tensor, "cu_seq_lens_k": tensor, "max_length_q": longest, "max_length_k": longest}
