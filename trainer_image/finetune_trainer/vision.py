"""Models of LLaVA-1.5's kind: a vision tower, a projector and a language model. Owns what is said about the first two.

Adapters and layers that a job names are the language model's; tower and projector are trained whole or not at all.
"""

import logging
import re
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np

from finetune_api.launch import LaunchSpec, LaunchVision
from finetune_trainer.data.images import PLACEHOLDER, Floats, ImageInput
from finetune_trainer.errors import ConfigError, reading

TOWER, PROJECTOR = "vision_tower", "multi_modal_projector"
"""Names of the modules, as in transformers."""
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""How images are made into pixels; the first that is there."""
NOTHING_TRAINED = LaunchVision(freeze_tower=True, projector_learning_rate=None)
"""Where a job says nothing."""
_EXTRA_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""What each kind of tower puts out beside one vector for each patch."""
_UNUSED = {"post_layernorm", "head"}
"""Of a tower: what makes one vector of the whole image."""
_PROBE_SIZE = (20, 10)
"""Pixels of an image that is not square."""
log = logging.getLogger("finetune_trainer")


def sees(config: dict[str, Any]) -> bool:
    """Whether a model's config.json is that of one that sees."""
    return config.get("model_type") == "llava"


def model_class(config: dict[str, Any]) -> Any:
    """The class of transformers that makes or loads a model with this config.json."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM


def trained_parts(vision: LaunchVision) -> dict[str | None, bool]:
    """Whether each part is trained whole."""
    return {TOWER: not vision.freeze_tower, PROJECTOR: vision.projector_learning_rate is not None}


def trains(spec: LaunchSpec) -> bool:
    """Whether a job trains tower or projector, whole or by an adapter in them."""
    whole = any(trained_parts(spec.vision or NOTHING_TRAINED).values())
    return whole or any(part_of(target) for target in (spec.adapter.target_modules if spec.adapter else ()))


def part_of(name: str) -> str | None:
    """`TOWER` or `PROJECTOR` if the module or parameter is within it; None for the language model."""
    return next((part for part in name.split(".") if part in (TOWER, PROJECTOR)), None)


def image_input(path: Path, config: dict[str, Any], tokenizer: Any, spec: LaunchSpec) -> ImageInput | None:
    """How a model takes images; None for one that does not see.

    Args:
        path: the model's folder.
        config: its config.json.
        tokenizer: has to know the placeholder.
        spec: the launch.

    Raises:
        ConfigError: the job has a `vision` block for a model that does not see, or something is missing or does not fit.
    """
    uri = spec.model.uri
    if not sees(config):
        if spec.vision is not None:
            raise ConfigError(
                f"vision: {uri} is a model of type {config.get('model_type')}, which has no vision tower; remove `vision`, or "
                "give a model of type llava"
            )
        return None
    from transformers import AutoConfig

    whole = AutoConfig.from_pretrained(str(path), local_files_only=True)
    tower = whole.vision_config
    if tower.model_type not in _EXTRA_TOKENS:
        raise ConfigError(
            f"model.uri: {uri} has a vision tower of type {tower.model_type}; allowed are {', '.join(_EXTRA_TOKENS)}"
        )
    found = tokenizer.encode(PLACEHOLDER, add_special_tokens=False)
    if found != [whole.image_token_id]:
        raise ConfigError(
            f"model.uri: {uri}: the tokenizer makes {found} of `{PLACEHOLDER}` and the model's image_token_index is "
            f"{whole.image_token_id}; tokenizer and model have to belong together"
        )
    process = _processor(path, uri)
    shape = _shape(process)
    if shape[1:] != (tower.image_size, tower.image_size):
        raise ConfigError(
            f"model.uri: {uri}: its image processor makes {shape[1]}x{shape[2]} pixels of an image of "
            f"{_PROBE_SIZE[0]}x{_PROBE_SIZE[1]}, and the vision tower takes {tower.image_size}x{tower.image_size}; crop_size (or "
            f"height and width of size) in {' or '.join(PROCESSOR_FILES)} must say so"
        )
    cut = whole.vision_feature_select_strategy == "default"  # leaves out the first vector
    patches = (tower.image_size // tower.patch_size) ** 2
    num_tokens = patches + _EXTRA_TOKENS[tower.model_type] - cut
    log.info("images: %d tokens each, of %dx%d pixels", num_tokens, *shape[1:])
    return ImageInput(
        whole.image_token_id, num_tokens, shape, process, blank=trains(spec) or spec.deepspeed.zero_stage == 3
    )


def _processor(path: Path, uri: str) -> Any:
    from transformers import AutoImageProcessor

    if not any((path / name).is_file() for name in PROCESSOR_FILES):
        raise ConfigError(f"model.uri: {uri}: {path} has no image processor ({' or '.join(PROCESSOR_FILES)})")
    try:
        with reading("model.uri", path):
            processor = AutoImageProcessor.from_pretrained(str(path), local_files_only=True, backend="pil")
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"model.uri: {uri}: the image processor cannot be read: {error}") from error

    def process(image: Any) -> Floats:
        # Some processors' files do not say that grey or transparent images become RGB, and towers take nothing else.
        made = processor(image, do_convert_rgb=True, return_tensors="np")
        pixels: Floats = np.asarray(made["pixel_values"][0], dtype=np.float32)
        return pixels

    return process


def _shape(process: Any) -> tuple[int, int, int]:
    import PIL.Image

    channels, height, width = process(PIL.Image.new("RGB", _PROBE_SIZE)).shape
    return channels, height, width


def choose_trained(model: Any, vision: LaunchVision) -> None:
    """Freezes or unfreezes tower and projector; call it when adapters and layers of the language model have been chosen.

    Layers of the tower from which nothing goes into the projector (in LLaVA-1.5 the last one) stay frozen: they would get no
    gradient, and only weight decay would change them.

    Raises:
        ConfigError: an adapter is in a part that is trained whole.
    """
    trained = trained_parts(vision)
    layers = _layers_used(model.config)
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if part is None:
            continue
        if ".lora_" not in name:
            parameter.requires_grad_(trained[part] and (part == PROJECTOR or _is_used(name, layers)))
        elif trained[part]:
            field = "freezeTower: false" if part == TOWER else "projectorLearningRate"
            raise ConfigError(
                f"adapter.targetModules: names a layer in {part}, which `vision.{field}` trains whole; leave one of the two out"
            )


def _layers_used(config: Any) -> int:
    """Layers of the tower whose output, or a later one's, the projector gets."""
    chosen = config.vision_feature_layer
    count = config.vision_config.num_hidden_layers
    return max(at if at >= 0 else count + 1 + at for at in ([chosen] if isinstance(chosen, int) else chosen))


def _is_used(name: str, layers: int) -> bool:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) < layers if found else not _UNUSED & set(name.split("."))


def prepare(causal_lm: Any) -> None:
    """Gives the model a forward pass that waits for no device, once it is known what is trained.

    transformers' own counts image tokens on the device, and hands the arguments of the language model's attention to the tower
    as well. And where activation checkpointing makes embeddings ask for a gradient, it would go back through a frozen tower.
    """
    import torch

    seeing = causal_lm.model
    seeing.forward = MethodType(_forward, seeing)
    tower = seeing.vision_tower
    if not any(parameter.requires_grad for parameter in tower.parameters()):
        tower.forward = torch.no_grad()(tower.forward)


def _forward(self: Any, *args: Any, image_places: Any = None, **kwargs: Any) -> Any:
    """What `LlavaModel.forward` computes.

    Args:
        self: the LlavaModel.
        args: of a pass that is not of the loop's batches, such as generation.
        image_places: where image tokens are in the flattened batch, int64. Fewer of them than the pixels make: those of a blank
            image go nowhere, and their gradient is zero.
        kwargs: `input_ids`, `pixel_values`, and what is the language model's.
    """
    import torch
    from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast

    if image_places is None:
        return type(self).forward(self, *args, **kwargs)
    embeddings = self.get_input_embeddings()(kwargs["input_ids"])
    features = self.get_image_features(pixel_values=kwargs["pixel_values"], return_dict=True).pooler_output
    taken = torch.cat(list(features))[: len(image_places)].to(embeddings.dtype)
    embeddings = embeddings.flatten(0, 1).index_copy(0, image_places, taken).view_as(embeddings)
    others = {name: value for name, value in kwargs.items() if name not in _OWN_ARGUMENTS}
    outputs = self.language_model(inputs_embeds=embeddings, **others)
    return LlavaModelOutputWithPast(**outputs)


_OWN_ARGUMENTS = {
    "input_ids",
    "inputs_embeds",
    "pixel_values",
    "image_sizes",
    "mm_encoder_outputs",
    "vision_feature_layer",
    "vision_feature_select_strategy",
}
"""Not handed on to the language model."""
