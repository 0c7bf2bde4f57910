"""`spec.training`: hyperparameters, and how a step is computed."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel, NonNegativeDecimal, PositiveDecimal, Ratio, rules


class Scheduler(StrEnum):
    CONSTANT = "Constant"
    LINEAR = "Linear"
    COSINE = "Cosine"
    COSINE_WITH_RESTARTS = "CosineWithRestarts"
    COSINE_WITH_MIN_LR = "CosineWithMinLR"
    POLYNOMIAL = "Polynomial"
    INVERSE_SQRT = "InverseSqrt"
    WARMUP_STABLE_DECAY = "WarmupStableDecay"


class Precision(StrEnum):
    BF16 = "BF16"
    FP32 = "FP32"
    PURE_BF16 = "PureBF16"


class ActivationCheckpointing(StrEnum):
    NONE = "None"
    FULL = "Full"
    SELECTIVE_OP = "SelectiveOp"
    SELECTIVE_LAYER = "SelectiveLayer"
    FULL_OFFLOAD = "FullOffload"


class Optimizer(StrEnum):
    ADAMW = "AdamW"
    ADAMW_8BIT = "AdamW8bit"
    PAGED_ADAMW = "PagedAdamW"
    PAGED_ADAMW_8BIT = "PagedAdamW8bit"


class Attention(StrEnum):
    AUTO = "Auto"
    FLASH_ATTENTION_2 = "FlashAttention2"
    FLASH_ATTENTION_3 = "FlashAttention3"
    VARLEN = "Varlen"
    SDPA = "SDPA"
    FLEX = "Flex"
    EAGER = "Eager"


class Overlong(StrEnum):
    TRUNCATE = "Truncate"
    TRUNCATE_SHARE = "TruncateShare"
    DROP = "Drop"
    SPLIT = "Split"


class SchedulerParametersSpec(ApiModel):
    num_cycles: Annotated[int, Field(ge=1, le=10000)] | None = None
    """CosineWithRestarts: half waves from the peak to 0. Absent: 1."""
    min_lr_rate: Ratio | None = None
    """CosineWithMinLR and WarmupStableDecay: the lowest rate as a share of the peak. Absent: 0.1 and 0."""
    lr_end: PositiveDecimal | None = None
    """Polynomial: the rate at the end. Absent: 1e-7."""
    power: NonNegativeDecimal | None = None
    """Polynomial: its power. Absent: 1."""
    timescale: Annotated[int, Field(ge=1, le=100000000)] | None = None
    """InverseSqrt: steps in which the rate falls to 0.71 of the peak. Absent: the steps of warm-up, or 10,000 without."""
    num_decay_steps: Annotated[int, Field(ge=1, le=100000000)] | None = None
    """WarmupStableDecay: steps of the decay (a half cosine) at the end. Absent: two thirds of the steps after warm-up."""


def _only_for(field: str, schedulers: str) -> tuple[str, str]:
    names = schedulers.split(" and ")
    return (
        f"!has(self.schedulerParameters) || !has(self.schedulerParameters.{field}) || self.scheduler in {names}",
        f"`schedulerParameters.{field}` is only for `scheduler: {schedulers}`; remove it",
    )


class TrainingSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            ("!(has(self.epochs) && has(self.maxSteps))", "set `epochs` or `maxSteps`, not both"),
            (
                "self.globalBatchSize % self.microBatchSize == 0",
                "`globalBatchSize` must be a multiple of `microBatchSize`",
            ),
            (
                "!(has(self.warmupRatio) && has(self.warmupSteps))",
                "set `warmupRatio` or `warmupSteps`, not both",
            ),
            _only_for("numCycles", "CosineWithRestarts"),
            _only_for("minLrRate", "CosineWithMinLR and WarmupStableDecay"),
            _only_for("lrEnd", "Polynomial"),
            _only_for("power", "Polynomial"),
            _only_for("timescale", "InverseSqrt"),
            _only_for("numDecaySteps", "WarmupStableDecay"),
            (
                "!(self.trainOnPrompt && self.maskHistory)",
                "set `trainOnPrompt` or `maskHistory`, not both: one learns every turn, the other only the last answer",
            ),
            (
                "!(self.groupByLength && self.packing)",
                "`groupByLength` is only for `packing: false`: packed rows are of one length anyway",
            ),
        )
    }

    max_length: Annotated[int, Field(ge=8, le=1048576)] = 2048
    """Tokens of one sample (what becomes of longer ones: `overlong`) or, with `packing`, of one packed row."""
    packing: bool = False
    """Put several samples into one row; they never see each other. A model that would let them (state space, convolution,
    linear attention, and a few others) is refused when it is loaded."""
    global_batch_size: Annotated[int, Field(ge=1, le=65536)] = 8
    """Rows of one optimizer step over all ranks. It stays the same whatever the number of ranks."""
    micro_batch_size: Annotated[int, Field(ge=1, le=4096)] = 1
    """Rows of one forward pass on one rank; gradient accumulation fills up to `globalBatchSize`."""
    epochs: Annotated[int, Field(ge=1, le=10000)] | None = None
    """Passes over the training data. 1 if neither this nor `maxSteps` is set."""
    max_steps: Annotated[int, Field(ge=1, le=100000000)] | None = None
    """Optimizer steps, over as many passes as they take."""
    learning_rate: PositiveDecimal | None = None
    """Peak learning rate, a decimal in quotes. Absent: 2e-4 for LoRA and QLoRA, 2e-5 for Full and Freeze."""
    scheduler: Scheduler = Scheduler.COSINE
    """Course of the learning rate after warm-up."""
    warmup_ratio: Ratio | None = None
    """Share of all steps in which the learning rate rises from 0. Absent: 0.03, unless `warmupSteps` is set."""
    weight_decay: Ratio = "0"
    """AdamW's decoupled weight decay."""
    max_grad_norm: NonNegativeDecimal = "1"
    """Gradients are clipped to this norm; 0 switches clipping off."""
    precision: Precision = Precision.BF16
    """BF16: bfloat16 compute with float32 master weights. FP32: float32 throughout. PureBF16: weights, gradients and Adam's
    moments in bfloat16 only, half of the memory; updates smaller than half a bit of a weight are lost to rounding."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.NONE
    """Full recomputes every layer's activations in the backward pass: less memory, a quarter to a third slower. FullOffload also
    keeps the layers' inputs in CPU memory. SelectiveLayer recomputes every second layer. SelectiveOp keeps the results of
    linear layers and attention and recomputes the rest."""
    seed: Annotated[int, Field(ge=0, le=4294967295)] = 42
    """Seed of data order, dropout and new weights."""
    eval_every_steps: Annotated[int, Field(ge=1)] | None = None
    """Also evaluate after every so many steps."""
    optimizer: Optimizer = Optimizer.ADAMW
    """AdamW; with its moments in 8 bits (AdamW8bit); with moments that move to CPU memory when the GPU's is full (PagedAdamW,
    PagedAdamW8bit; on a CPU the same without paging)."""
    adam_beta1: Ratio = "0.9"
    """Decay of Adam's first moment."""
    adam_beta2: Ratio = "0.999"
    """Decay of Adam's second moment."""
    adam_epsilon: PositiveDecimal = "1.0e-8"
    """Adam's epsilon."""
    warmup_steps: Annotated[int, Field(ge=0, le=100000000)] | None = None
    """Steps in which the learning rate rises from 0; instead of `warmupRatio`."""
    scheduler_parameters: SchedulerParametersSpec | None = None
    """Parameters of some schedulers, named as in transformers."""
    overlong: Overlong = Overlong.TRUNCATE
    """Samples of more than `maxLength` tokens. Truncate: the end goes. TruncateShare: prompts and answers are cut in
    proportion, turn by turn, and turns that no longer fit go. Drop: the sample goes. Split: the sample becomes several rows,
    cut between turns where that can be."""
    train_on_prompt: bool = False
    """Also learn the prompts, not only the assistant's turns."""
    mask_history: bool = False
    """Learn only the last of the assistant's turns."""
    group_by_length: bool = False
    """Put rows of similar length into the same step: less padding, and a less random order."""
    attention: Attention = Attention.AUTO
    """Implementation of attention; packed samples never see each other with any of them. Auto takes the fastest that is exact
    for the model and the device, and says so in the log. FlashAttention2 and 3 must be installed in the trainer image;
    Varlen is PyTorch's own for rows of several samples."""
    liger_kernel: bool = False
    """Use Liger's kernels on GPUs: fused cross-entropy and, without `compile`, its norms, SwiGLU and, unless
    `activationCheckpointing` is SelectiveOp, its rotary embedding."""
    loader_workers: Annotated[int, Field(ge=1, le=64)] = 2
    """Micro-batches that each rank builds ahead at the same time, each in a thread: images are read and decoded there. Neither
    the order of data nor the result depends on it."""
    compile: bool = False
    """Compile each decoder layer, and AdamW for large weights, with `torch.compile`: the first step takes longer, the others
    less."""
