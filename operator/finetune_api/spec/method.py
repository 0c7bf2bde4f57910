"""`spec.method` and its blocks: which weights are trained, and in which form the others are held."""

from enum import IntEnum, StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel, LoraPlusRatio, Ratio, rules
from finetune_api.spec.common import Short


class Method(StrEnum):
    FULL = "Full"
    LORA = "LoRA"
    FREEZE = "Freeze"
    QLORA = "QLoRA"


class AdapterVariant(StrEnum):
    LORA = "LoRA"
    DORA = "DoRA"
    RSLORA = "RSLoRA"


class QuantizationBits(IntEnum):
    FOUR = 4
    EIGHT = 8


class AdapterSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            (
                "!('All' in self.targetModules) || size(self.targetModules) == 1",
                "`All` of `targetModules` stands alone; give it, or the names of all layers that are meant",
            ),
        )
    }

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the LoRA matrices."""
    alpha: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Scaling numerator: updates are scaled by alpha / rank. Absent: 2 x rank."""
    dropout: Ratio = "0"
    """Dropout on the adapter's input."""
    target_modules: Annotated[list[Short], Field(min_length=1, max_length=64)] = ["All"]
    """Names of the linear layers that get an adapter, or `All` for every one but the head."""
    variant: AdapterVariant = AdapterVariant.LORA
    """DoRA learns a magnitude for each output beside the direction; RSLoRA scales by alpha / sqrt(rank)."""
    lora_plus_ratio: LoraPlusRatio | None = None
    """LoRA+: the B matrices learn at this multiple of the learning rate, a decimal in quotes such as "16". Absent: the same
    rate for both."""


class FreezeSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            (
                "self.trainableLayers != 0 || (has(self.extraModules) && size(self.extraModules) > 0)",
                "`trainableLayers: 0` needs `extraModules`, or nothing would be trained",
            ),
        )
    }

    trainable_layers: Annotated[int, Field(ge=-1024, le=1024)] = 2
    """Decoder layers that are trained: the last n, or with a negative number the first n."""
    trainable_modules: Annotated[list[Short], Field(min_length=1, max_length=64)] = ["All"]
    """Names of the modules within these layers, such as `mlp` or `q_proj`, or `All`."""
    extra_modules: Annotated[list[Short], Field(max_length=64)] = []
    """Names of modules outside the layers that are trained too, such as `lm_head`, `embed_tokens` or `norm`."""


class QuantizationSpec(ApiModel):
    bits: QuantizationBits = QuantizationBits.FOUR
    """4: NF4 in blocks of 64. 8: LLM.int8(). The layers that get no adapter are quantised as well, all but the head and
    the experts of a mixture."""
    double_quantization: bool = True
    """Quantise the scales of the 4-bit blocks again; it saves 0.4 bits a parameter. Without effect for 8 bits."""
