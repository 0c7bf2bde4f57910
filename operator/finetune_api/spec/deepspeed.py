"""`spec.deepspeed`: how the training state is spread."""

from enum import IntEnum, StrEnum

from finetune_api.base import ApiModel, rules
from finetune_api.deepspeed_config import DeepSpeedConfig


class Offload(StrEnum):
    NONE = "None"
    CPU = "CPU"


class ZeroStage(IntEnum):
    NONE = 0
    OPTIMIZER = 1
    GRADIENTS = 2
    PARAMETERS = 3


class DeepSpeedSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            (
                "self.offloadOptimizer == 'None' || self.zeroStage >= 1",
                "`offloadOptimizer: CPU` needs `zeroStage` 1, 2 or 3",
            ),
            (
                "self.offloadParameters == 'None' || self.zeroStage == 3",
                "`offloadParameters: CPU` needs `zeroStage: 3`",
            ),
        )
    }

    zero_stage: ZeroStage = ZeroStage.NONE
    """What is partitioned over the ranks: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""
    offload_optimizer: Offload = Offload.NONE
    """Keep the optimizer state, and its computation, on the CPU."""
    offload_parameters: Offload = Offload.NONE
    """Keep the parameters in CPU memory between uses."""
    config: DeepSpeedConfig | None = None
    """DeepSpeed settings that have no field here, in DeepSpeed's own names, merged over what the fields give, such as
    `{zero_optimization: {zero_hpz_partition_size: 8}}`. What a field decides is refused here; the rest is checked by
    DeepSpeed's own schema before the model is loaded."""
