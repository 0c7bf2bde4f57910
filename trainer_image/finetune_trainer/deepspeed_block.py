"""The raw block `deepspeed.config`: merged over what the fields give, and checked by DeepSpeed's own schema.

What fields decide is refused at admission (`finetune_api.deepspeed_config`). Here are refused the top-level keys that mean
nothing to the trainer, and what its device cannot do.
"""

from typing import Any

from finetune_api.deepspeed_keys import TOP_LEVEL
from finetune_trainer.errors import ConfigError

FIELD = "deepspeed.config"
ONLY_CUDA = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
PREDIVIDE = "gradient_predivide_factor"


def merged(config: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """`config` with the values of `raw` over it, object by object."""
    out = dict(config)
    for key, value in raw.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merged(out[key], value) if both else value
    return out


def check_block(raw: dict[str, Any] | None, config: dict[str, Any], *, cuda: bool) -> None:
    """Refuses a raw block that would not do what it says; to be called before the model is loaded.

    Args:
        raw: the job's block.
        config: the whole configuration, with the block merged in.
        cuda: whether ranks compute on GPUs.

    Raises:
        ConfigError: naming the key.
    """
    if not raw:
        return
    for key in raw:
        if key not in TOP_LEVEL:
            raise ConfigError(f"{FIELD}.{key}: is not taken here; allowed are {', '.join(TOP_LEVEL)}")
    zero = raw.get("zero_optimization", {})
    for key in ONLY_CUDA:
        if zero.get(key) and not cuda:
            raise ConfigError(f"{FIELD}.zero_optimization.{key}: needs GPUs; DeepSpeed has no CPU kernels for it")
    for name, field in (("offload_optimizer", "offloadOptimizer"), ("offload_param", "offloadParameters")):
        if name in zero and "device" not in config["zero_optimization"][name]:  # the field's
            raise ConfigError(f"{FIELD}.zero_optimization.{name}: needs `deepspeed.{field}: CPU`")
    _check_numbers(raw)
    _check_stage(_ask_deepspeed(config))


def _check_numbers(raw: dict[str, Any]) -> None:
    """DeepSpeed's schema has no types for these."""
    steps = raw.get("steps_per_print")
    if steps is not None and (type(steps) is not int or steps < 1):
        raise ConfigError(f"{FIELD}.steps_per_print: must be a positive integer or null, got `{steps}`")
    factor = raw.get(PREDIVIDE, 1)
    if type(factor) not in (int, float) or factor <= 0:
        raise ConfigError(f"{FIELD}.{PREDIVIDE}: must be a positive number, got `{factor}`")


def _check_stage(parsed: Any) -> None:
    """What the engine would refuse by an assertion, once the model is loaded."""
    zero, stage = parsed.zero_config, int(parsed.zero_config.stage)
    divided = parsed.gradient_predivide_factor != 1
    if stage == 3 and divided:
        raise ConfigError(f"{FIELD}.{PREDIVIDE}: must be 1 with zeroStage 3, whose gradients are divided once")
    if stage == 3 and zero.module_granularity_threshold > 0:
        raise ConfigError(
            f"{FIELD}.zero_optimization.stage3_module_granularity_threshold: must be 0; the unit of ZeRO-3 is the decoder layer"
        )
    if stage >= 2 and zero.reduce_scatter:
        unless = f"with zeroStage {stage}, unless `zero_optimization.reduce_scatter` is false"
        if divided:
            raise ConfigError(f"{FIELD}.{PREDIVIDE}: must be 1 {unless}")
        if parsed.prescale_gradients:
            raise ConfigError(f"{FIELD}.prescale_gradients: must be false {unless}")


def _ask_deepspeed(config: dict[str, Any]) -> Any:
    """DeepSpeed's reading of the configuration."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from pydantic import ValidationError

    try:
        return DeepSpeedConfig(config)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5]]
        raise ConfigError(f"{FIELD}: DeepSpeed's {error.title} refuses it: {'; '.join(lines)}") from error
    except (AssertionError, DeepSpeedConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"{FIELD}: DeepSpeed refuses it: {error}") from error
