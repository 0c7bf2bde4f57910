"""Loads tokenizer and model from a local folder, and puts adapters on. Owns what transformers and peft are told.

Nothing here goes to a network: hub models are downloaded before (see `hub`), and only paths are handed on.
"""

import inspect
import json
import logging
from pathlib import Path
from typing import Any

from finetune_api.launch import LaunchAdapter, LaunchSpec
from finetune_api.spec import ActivationCheckpointing, Method, Precision
from finetune_trainer.data.chat_templates import set_chat_template
from finetune_trainer.errors import ConfigError

log = logging.getLogger("finetune_trainer")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def check_model_folder(path: Path, uri: str) -> dict[str, Any]:
    """Checks that a folder holds a whole model and returns its config.json, before anything heavy is imported.

    Raises:
        ConfigError: something is missing; the message names it.
    """
    if not path.is_dir():
        raise ConfigError(f"model.uri: {uri}: no folder at {path}")
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ConfigError(f"model.uri: {uri}: {path} has no config.json; it must be in Hugging Face layout")
    try:
        config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"model.uri: {uri}: {config_file} is broken JSON: {error}") from error
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(f"model.uri: {uri}: {path} has no tokenizer (tokenizer.json)")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        wanted = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        wanted = ["model.safetensors"]
    missing = [name for name in wanted if not (path / name).is_file()]
    if missing:
        raise ConfigError(f"model.uri: {uri}: {path} is incomplete; missing: {', '.join(missing[:5])}")
    return config


def check_max_length(config: dict[str, Any], max_length: int, uri: str) -> None:
    """Refuses rows longer than the model's positions.

    Raises:
        ConfigError: naming both numbers.
    """
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    if isinstance(limit, int) and max_length > limit:
        raise ConfigError(
            f"training.maxLength: {max_length} is more than the {limit} positions of {uri} (max_position_embeddings)"
        )


def load_tokenizer(path: Path, spec: LaunchSpec) -> Any:
    """The model's tokenizer, with the job's chat template if it has one.

    Raises:
        ConfigError: transformers cannot read it, or it does not fit the job's template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.uri: {spec.model.uri}: the tokenizer cannot be read: {error}") from error
    if spec.model.chat_template is not None:
        set_chat_template(tokenizer, spec.model.chat_template)
    return tokenizer


def load_model(path: Path, spec: LaunchSpec, deepspeed_config: dict[str, Any]) -> Any:
    """The model ready for the engine: weights, adapters, activation checkpointing.

    Under ZeRO-3 every weight is partitioned as it is created, so no rank ever holds the whole model.

    Raises:
        ConfigError: the folder is no causal language model, or a target module does not exist.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    keep_alive = None
    if spec.deepspeed.zero_stage == 3:
        from transformers.integrations import HfDeepSpeedConfig

        keep_alive = HfDeepSpeedConfig(deepspeed_config)  # from_pretrained looks for it
    dtype = torch.bfloat16 if spec.training.precision is Precision.BF16 else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"model.uri: {spec.model.uri}: the model cannot be loaded: {error}") from error
    del keep_alive
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ConfigError(f"model.uri: {spec.model.uri}: {type(model).__name__} is no causal language model known here")
    model.config.use_cache = False
    if spec.method is Method.LORA:
        assert spec.adapter is not None
        model = _add_adapter(model, spec.adapter, spec)
    if spec.training.activation_checkpointing is ActivationCheckpointing.FULL:
        _checkpoint_activations(model, reentrant=spec.deepspeed.zero_stage == 3)
    return model


def _add_adapter(model: Any, adapter: LaunchAdapter, spec: LaunchSpec) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(spec.training.seed)  # the same new weights on every rank, whatever came before
    targets = adapter.target_modules
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules="all-linear" if targets == ["All"] else sorted(targets),
        task_type="CAUSAL_LM",
    )
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(
            f"adapter.targetModules: {', '.join(targets)} does not fit {spec.model.uri}; its linear layers are "
            f"{', '.join(sorted(linear))} ({error})"
        ) from error


def _checkpoint_activations(model: Any, *, reentrant: bool) -> None:
    """Recomputes every layer in the backward pass.

    Under ZeRO-3 the reentrant form is needed: the other one compares shapes of parameters, which are empty once released.
    The reentrant form in turn needs an input that requires a gradient, which a frozen embedding does not give.
    """
    if reentrant:
        model.enable_input_require_grads()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
