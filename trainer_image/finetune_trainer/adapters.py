"""Which weights are trained: adapters put on a model, or some of its own layers unfrozen."""

import copy
import re
from typing import Any

from finetune_api.launch import LaunchAdapter, LaunchFreeze, LaunchSpec
from finetune_api.spec import AdapterVariant, Precision, QuantizationBits
from finetune_trainer.errors import ConfigError
from finetune_trainer.vision import PROJECTOR, TOWER, part_of, trains

ALL = ["All"]


def add_adapter(model: Any, adapter: LaunchAdapter, spec: LaunchSpec) -> Any:
    """Puts an adapter on the chosen linear layers; everything else is frozen.

    In a model that sees, a name means the language model's layers; those of tower and projector are named with a part of
    their path, such as `multi_modal_projector.linear_1`.

    Raises:
        ConfigError: a target module does not exist; the message names those that do.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(spec.training.seed)  # the same new weights on every rank, whatever came before
    targets = adapter.target_modules
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    # Mostly routers are no linear layers. peft cannot adapt those that are: they return more than a product.
    routers = {_last(name) for name, module in linear.items() if "Router" in type(module).__name__}
    left_out = [rf"(?:.*\.)?{name}" for name in sorted(routers)]
    if any(part_of(name) for name, _ in model.named_modules()):
        left_out.append(_of_vision_unless_named(targets))
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules="all-linear" if targets == ALL else sorted(targets),
        exclude_modules="|".join(left_out) or None,
        use_dora=adapter.variant is AdapterVariant.DORA,
        use_rslora=adapter.variant is AdapterVariant.RSLORA,
        task_type="CAUSAL_LM",
    )
    known = ", ".join(sorted({_last(name) for name in linear} - routers))
    refused = f"adapter.targetModules: {{}} does not fit {spec.model.uri}; its linear layers are {known}"
    try:
        names = _names_of_modules(config, model)
        model = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"{refused.format(', '.join(targets))} ({error})") from error
    found = [f".{name}" for name in model.base_model.targeted_module_names]
    if lost := [target for target in names if not any(name.endswith(f".{target}") for name in found)]:
        raise ConfigError(refused.format(", ".join(lost)))
    if spec.training.precision is not Precision.FP32 and not trains_masters(spec):  # peft makes them float32
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _names_of_modules(config: Any, model: Any) -> list[str]:
    """The target modules of peft's configuration that have to be found: neither all, nor experts that transformers has fused.

    Experts have the names of the model's files, such as `w1`, and peft finds the weight that they became.

    Raises:
        ValueError: an expert's matrix is named without the one that it is fused with.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    if isinstance(config.target_modules, str):
        return []
    rest = copy.deepcopy(config)
    convert_peft_config_for_transformers(rest, model, None)
    return sorted(rest.target_modules)


def unwrap(model: Any) -> Any:
    """The causal language model of transformers inside DeepSpeed's engine and peft's model."""
    inner = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def trains_masters(spec: LaunchSpec) -> bool:
    """Whether the weights that are trained are float32 and rounded where they are used, so that DeepSpeed needs no copy.

    So it is with adapters that `lora_linear` computes. With other adapters peft would compute in float32, and a vision tower or
    a projector that is trained needs the copy.
    """
    adapter, training = spec.adapter, spec.training
    return (
        adapter is not None
        and adapter.variant is not AdapterVariant.DORA
        and (spec.quantization is None or spec.quantization.bits is QuantizationBits.FOUR)
        and training.precision is Precision.BF16
        and spec.deepspeed.zero_stage == 0
        and not trains(spec)
    )


def _of_vision_unless_named(targets: list[str]) -> str:
    """The pattern of what an adapter leaves out in a model that sees."""
    named = "|".join(re.escape(target) for target in targets if part_of(target))
    unless = rf"(?!(?:.*\.)?(?:{named})$)" if named else ""
    return rf"{unless}(?:.*\.)?(?:{TOWER}|{PROJECTOR})(?:\..*)?"


def is_b_matrix(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's B matrix, which LoRA+ gives a rate of its own."""
    return ".lora_B." in name or ".lora_embedding_B." in name


def freeze(model: Any, chosen: LaunchFreeze, uri: str) -> None:
    """Freezes all but the chosen modules of the first or last layers, and of the modules outside the layers.

    Raises:
        ConfigError: there are not so many layers, or no module of a name; the message names those that there are.
    """
    prefix, layers = _decoder_layers(model, uri)
    count = chosen.trainable_layers
    if abs(count) > len(layers):
        raise ConfigError(f"freeze.trainableLayers: {count} is more than the {len(layers)} layers of {uri}")
    model.requires_grad_(False)
    inside = layers[len(layers) - count :] if count >= 0 else layers[:-count]
    if chosen.trainable_modules == ALL:
        for layer in inside:
            layer.requires_grad_(True)
    elif inside:
        roots = [named for layer in inside for named in layer.named_modules()]
        _unfreeze(roots, chosen.trainable_modules, "freeze.trainableModules", uri)
    outside = [
        (n, m)
        for n, m in model.named_modules()
        if n and not _is_within(n, prefix) and not _holds(n, prefix) and part_of(n) is None
    ]
    _unfreeze(outside, chosen.extra_modules, "freeze.extraModules", uri)


def _is_within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _holds(name: str, prefix: str) -> bool:
    """Whether a module contains the layers: unfreezing it would unfreeze them."""
    return prefix.startswith(name + ".")


def _decoder_layers(model: Any, uri: str) -> tuple[str, list[Any]]:
    import torch

    number = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == number and part_of(name) is None:
            return name, list(module)
    raise ConfigError(f"method: Freeze: {type(model).__name__} of {uri} has no list of {number} layers")


def _unfreeze(modules: list[tuple[str, Any]], names: list[str], field: str, uri: str) -> None:
    """Unfreezes each module that has one of the names as a part of its path."""
    for wanted in names:
        found = [module for name, module in modules if wanted in name.split(".")]
        found = [module for module in found if any(True for _ in module.parameters())]
        if not found:
            known = sorted({part for name, _ in modules for part in name.split(".") if part and not part.isdigit()})
            raise ConfigError(f"{field}: {uri} has no module `{wanted}` there; it has {', '.join(known[:40])}")
        for module in found:
            module.requires_grad_(True)
