"""Makes our implementations known to transformers and a model use one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from finetune_api.spec import Attention
from finetune_trainer.attention import flash, varlen
from finetune_trainer.attention.choose import IMPLEMENTATIONS, Choice, why_not
from finetune_trainer.attention.sequences import attention_function
from finetune_trainer.errors import ConfigError

_KERNELS = {
    Attention.VARLEN: varlen.kernel,
    Attention.FLASH_ATTENTION_2: flash.kernel_2,
    Attention.FLASH_ATTENTION_3: flash.kernel_3,
}


def use(model: Any, choice: Choice) -> None:
    """Switches a loaded model, before adapters are put on.

    No mask function is registered for ours: transformers then builds no mask, and does not wait for the device to find out
    whether rows are packed.

    Raises:
        ConfigError: transformers cannot switch this model.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name, kernel in _KERNELS.items():
        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATIONS[name], attention_function(str(name), kernel))
    try:
        nested = (
            "text_config" in model.config.sub_configs
        )  # a vision tower, whose attention is not causal, keeps its own
        model.set_attn_implementation({"text_config": choice.implementation} if nested else choice.implementation)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"training.attention: {choice.name} cannot be used: {error}") from error
    used = model.config.get_text_config()._attn_implementation
    if used != choice.implementation:  # some models only warn
        raise ConfigError(f"training.attention: {type(model).__name__} cannot use {choice.name}, only {used}; use Auto")


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """For forward passes that are not of the loop's batches, such as generation: they have masks and a cache.

    Args:
        model: the causal language model of transformers, without wrappers.
    """
    configs = {id(c): c for c in (m.config for m in model.modules() if hasattr(m, "config"))}.values()
    before = [(config, config._attn_implementation) for config in configs if hasattr(config, "_attn_implementation")]
    ours = {IMPLEMENTATIONS[name] for name in _KERNELS}
    exact = why_not(Attention.SDPA, model, model.device, model.dtype) is None
    plain = IMPLEMENTATIONS[Attention.SDPA if exact else Attention.EAGER]
    try:
        for config, name in before:
            if name in ours:
                config._attn_implementation = plain
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name
