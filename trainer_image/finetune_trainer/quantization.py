"""The quantised base model of QLoRA: what transformers is told, and what it leaves undone.

peft's `prepare_model_for_kbit_training` is not used: it turns every weight that is not quantised (embeddings, norms, head) into
float32, which costs memory and changes what the model computes. Frozen weights keep their own precision here; adapters are
float32 masters in bf16 compute, as on a base that is not quantised.
"""

import logging
from typing import Any

from finetune_api.launch import LaunchQuantization, LaunchSpec
from finetune_api.spec import Precision, QuantizationBits
from finetune_trainer.errors import ConfigError
from finetune_trainer.vision import PROJECTOR, TOWER

log = logging.getLogger("finetune_trainer")


def quantization_config(quantization: LaunchQuantization, spec: LaunchSpec, *, sees: bool) -> Any:
    """What `from_pretrained` takes as `quantization_config`: NF4 or LLM.int8() for every linear layer of the language model but
    the head. The experts of a mixture are no linear layers: transformers fuses them into one weight."""
    import torch
    from transformers import BitsAndBytesConfig

    whole = ["lm_head", f"model.{TOWER}", f"model.{PROJECTOR}"] if sees else None  # None: the head, whatever its name
    if quantization.bits is QuantizationBits.EIGHT:
        # Its activations are rounded through float16 at every layer, with one message each time.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        log.info("8-bit: activations pass each quantised layer as float16 and int8, as in LLM.int8()")
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    compute = torch.float32 if spec.training.precision is Precision.FP32 else torch.bfloat16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=whole,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quantization.double_quantization,
        bnb_4bit_compute_dtype=compute,
    )


def device_map() -> dict[str, Any]:
    """Loads each weight straight to this rank's device: no copy of the model in host memory, and quantised weight by weight."""
    import torch

    return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}


def keep_packing(model: Any) -> None:
    """Leaves 4-bit weights as they are loaded.

    On CPUs with AVX512-BF16 bitsandbytes lays a weight out anew in its first forward pass outside training, for a product without
    a backward pass. Any evaluation would do it, and from then on no gradient goes through the layer, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_quantised(model: Any, uri: str) -> None:
    """Logs which share of a model's weights is quantised.

    Raises:
        ConfigError: none is; bitsandbytes replaces plain linear layers only, not those of a class of the model's own.
    """
    layers = [m for m in model.modules() if type(getattr(m, "weight", None)).__name__ in ("Params4bit", "Int8Params")]
    if not layers:
        raise ConfigError(
            f"method: QLoRA: no weight of {type(model).__name__} ({uri}) can be quantised: its linear layers are of a class of "
            "their own; use `method: LoRA`"
        )
    packed = {id(layer.weight) for layer in layers}
    quantised = sum(layer.in_features * layer.out_features for layer in layers)
    whole = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in packed)
    log.info("quantised: %.1f %% of the weights", 100 * quantised / (quantised + whole))
