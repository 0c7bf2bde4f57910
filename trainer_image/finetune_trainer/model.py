"""Loads tokenizer and model from a local folder, ready to be trained. Owns what transformers is told.

Nothing here goes to a network: hub models are downloaded before (see `hub`), and only paths are handed on.
"""

import inspect
import json
import logging
from pathlib import Path
from typing import Any

from finetune_api.launch import LaunchSpec
from finetune_api.spec import Precision
from finetune_trainer import vision
from finetune_trainer.activation_checkpointing import check_recomputation, checkpoint_activations
from finetune_trainer.adapters import add_adapter, freeze, unwrap
from finetune_trainer.data.chat_templates import fix_date, set_chat_template
from finetune_trainer.errors import ConfigError, reading
from finetune_trainer.quantization import check_quantised, device_map, keep_packing, quantization_config
from finetune_trainer.weights import weight_files

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
    missing = [str(file.relative_to(path)) for file in weight_files(path) if not file.is_file()]
    if missing:
        raise ConfigError(f"model.uri: {uri}: {path} is incomplete; missing: {', '.join(missing[:5])}")
    return config


def position_limit(config: dict[str, Any]) -> int | None:
    """Tokens that a model has positions for; None where its configuration names no number."""
    text = config.get("text_config", config)  # of a model that sees
    limit = text.get("max_position_embeddings") or text.get("n_positions")
    return limit if isinstance(limit, int) else None


def check_max_length(config: dict[str, Any], max_length: int, uri: str) -> None:
    """Refuses rows longer than the model's positions.

    Raises:
        ConfigError: naming both numbers.
    """
    limit = position_limit(config)
    if limit is not None and max_length > limit:
        raise ConfigError(
            f"training.maxLength: {max_length} is more than the {limit} positions of {uri} (max_position_embeddings)"
        )


def load_tokenizer(path: Path, spec: LaunchSpec) -> Any:
    """The model's tokenizer, with the job's chat template if it has one.

    Raises:
        ConfigError: transformers cannot read it, or it does not fit the job's template.
        StorageError: the volume fails.
    """
    from transformers import AutoTokenizer

    try:
        with reading("model.uri", path):
            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.uri: {spec.model.uri}: the tokenizer cannot be read: {error}") from error
    if spec.model.chat_template is not None:
        set_chat_template(tokenizer, spec.model.chat_template)
    fix_date(tokenizer, spec.created_on)
    return tokenizer


def load_model(path: Path, spec: LaunchSpec, deepspeed_config: dict[str, Any]) -> Any:
    """The model ready for the engine: weights, adapters, activation checkpointing.

    Under ZeRO-3 every weight is partitioned as it is created, so no rank ever holds the whole model.

    Raises:
        ConfigError: the folder is no causal language model, nothing of it can be quantised, a target module does not exist, or
            gradients would be wrong.
        StorageError: the volume fails.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    recomputed, partitioned = spec.training.activation_checkpointing, spec.deepspeed.zero_stage == 3
    keep_alive = None
    if partitioned:
        from transformers.integrations import HfDeepSpeedConfig

        keep_alive = HfDeepSpeedConfig(deepspeed_config)  # from_pretrained looks for it
    dtype = torch.float32 if spec.training.precision is Precision.FP32 else torch.bfloat16
    placed: dict[str, Any] = {}
    if spec.quantization is not None or (not partitioned and torch.cuda.is_available()):
        placed["device_map"] = device_map()
    try:
        with reading("model.uri", path):
            loaded = AutoConfig.from_pretrained(str(path), local_files_only=True)
            check_recomputation(loaded, recomputed, reentrant=partitioned)
            config = loaded.to_dict()
            sees = vision.sees(config)
            if spec.quantization is not None:
                placed["quantization_config"] = quantization_config(spec.quantization, spec, sees=sees)
            model, loading = vision.model_class(config).from_pretrained(
                str(path),
                dtype=dtype,
                attn_implementation=None,  # transformers' choice, whatever config.json says; `attention.use` comes later
                local_files_only=True,
                output_loading_info=True,
                **placed,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"model.uri: {spec.model.uri}: the model cannot be loaded: {error}") from error
    del keep_alive
    if missing := sorted(loading["missing_keys"]):
        some = ", ".join(missing[:3])
        raise ConfigError(
            f"model.uri: {spec.model.uri}: {len(missing)} of the tensors of {type(model).__name__} are in no file: {some}; "
            "training would begin with random values in their place. Use a whole model, in transformers' own names"
        )
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ConfigError(f"model.uri: {spec.model.uri}: {type(model).__name__} is no causal language model known here")
    if spec.quantization is not None:
        check_quantised(model, spec.model.uri)
        keep_packing(model)
    if spec.adapter is not None:
        model = add_adapter(model, spec.adapter, spec)
    elif spec.freeze is not None:
        freeze(model, spec.freeze, spec.model.uri)
    if sees:
        vision.choose_trained(model, spec.vision or vision.NOTHING_TRAINED)
    checkpoint_activations(model, recomputed, reentrant=partitioned)
    if sees:
        vision.prepare(unwrap(model))
    # from_pretrained leaves the model in eval mode: no dropout, no recomputation. The first evaluation would end that, but a run
    # may have none, and a resumed run has none before its first step.
    model.train()
    return model
