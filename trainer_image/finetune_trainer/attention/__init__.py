"""Attention: which implementation a job gets, and our own ones beside those of transformers.

Whatever is chosen, a token sees the earlier tokens of its own sample and nothing else.
"""

from finetune_trainer.attention.choose import Choice, choose
from finetune_trainer.attention.layout import layout_arguments
from finetune_trainer.attention.registry import plain_attention, use
from finetune_trainer.attention.separation import keeps_apart

__all__ = ["Choice", "choose", "keeps_apart", "layout_arguments", "plain_attention", "use"]
