"""`spec` of a FineTuneJob: what a person writes.

Defaults stand here and nowhere else: the API server fills them in from the generated CRD. Numbers with a fraction are
decimal strings, since floats do not survive every Kubernetes client unchanged.
"""

from enum import IntEnum, StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api import combinations
from finetune_api.base import (
    ApiModel,
    DatasetUri,
    EnvVarName,
    FileSize,
    LoraPlusRatio,
    ModelUri,
    NonNegativeDecimal,
    PositiveDecimal,
    Ratio,
    ResourceName,
    VolumeUri,
    Weight,
    rules,
)
from finetune_api.deepspeed_config import DeepSpeedConfig

Short = Annotated[str, Field(min_length=1, max_length=253)]
QUANTITY = "must be a positive Kubernetes quantity such as `4`, `500m` or `16Gi`"
Quantity = Annotated[
    str | int,
    Field(
        json_schema_extra=rules(
            ("isQuantity(string(self)) && quantity(string(self)).isGreaterThan(quantity('0'))", QUANTITY)
        )
        | {"x-finetune-quantity": True}
    ),
]
"""A Kubernetes quantity such as `4`, `500m` or `16Gi`."""


class DatasetFormat(StrEnum):
    AUTO = "Auto"
    ALPACA = "Alpaca"
    SHARE_GPT = "ShareGPT"
    MESSAGES = "Messages"
    TEXT = "Text"


class Method(StrEnum):
    FULL = "Full"
    LORA = "LoRA"
    FREEZE = "Freeze"
    QLORA = "QLoRA"


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


class AdapterVariant(StrEnum):
    LORA = "LoRA"
    DORA = "DoRA"
    RSLORA = "RSLoRA"


class Optimizer(StrEnum):
    ADAMW = "AdamW"
    ADAMW_8BIT = "AdamW8bit"
    PAGED_ADAMW = "PagedAdamW"
    PAGED_ADAMW_8BIT = "PagedAdamW8bit"


class QuantizationBits(IntEnum):
    FOUR = 4
    EIGHT = 8


class Attention(StrEnum):
    AUTO = "Auto"
    FLASH_ATTENTION_2 = "FlashAttention2"
    FLASH_ATTENTION_3 = "FlashAttention3"
    VARLEN = "Varlen"
    SDPA = "SDPA"
    FLEX = "Flex"
    EAGER = "Eager"


class Offload(StrEnum):
    NONE = "None"
    CPU = "CPU"


class ZeroStage(IntEnum):
    NONE = 0
    OPTIMIZER = 1
    GRADIENTS = 2
    PARAMETERS = 3


class BenchmarkName(StrEnum):
    HUMAN_EVAL = "HumanEval"
    MBPP = "MBPP"


class EvaluationMetric(StrEnum):
    EVAL_LOSS = "EvalLoss"
    TOKEN_ACCURACY = "TokenAccuracy"
    HUMAN_EVAL_PASS_AT_1 = "HumanEvalPassAt1"
    MBPP_PASS_AT_1 = "MBPPPassAt1"


class SecretKeyRef(ApiModel):
    name: ResourceName
    """Secret in the job's namespace."""
    key: Short = "token"
    """Key in the Secret that holds the token."""


HUB_ONLY = "is only for `hf://` URIs; remove it or use an `hf://` URI"


class Overlong(StrEnum):
    TRUNCATE = "Truncate"
    TRUNCATE_SHARE = "TruncateShare"
    DROP = "Drop"
    SPLIT = "Split"


CHAT_TEMPLATES = ("llama2", "llama3", "codellama", "chatml", "qwen", "mistral", "gemma", "llava")
"""Templates that `model.chatTemplate` knows by name."""
CHAT_TEMPLATE_RULE = (
    f"`chatTemplate` must be one of {', '.join(CHAT_TEMPLATES)}, or a Jinja template (with `{{{{` or `{{%`)"
)


class ModelSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            ("!has(self.revision) || self.uri.startsWith('hf://')", f"`revision` {HUB_ONLY}"),
            ("!has(self.credentialsRef) || self.uri.startsWith('hf://')", f"`credentialsRef` {HUB_ONLY}"),
            (
                "!has(self.chatTemplate) || self.chatTemplate.contains('{{') || self.chatTemplate.contains('{%')"
                f" || self.chatTemplate in {list(CHAT_TEMPLATES)}",
                CHAT_TEMPLATE_RULE,
            ),
        )
    }

    uri: ModelUri
    """Where the model is: `hf://org/name`, `pvc://claim/path` or `file:///path` (inside the trainer's container), in Hugging
    Face layout (config.json, safetensors, tokenizer)."""
    revision: Short | None = None
    """Branch, tag or commit of an `hf://` model; the commit that it named at the first start is kept in status for all
    later attempts."""
    credentials_ref: SecretKeyRef | None = None
    """Token for an `hf://` model that is private or gated."""
    chat_template: Annotated[str, Field(min_length=1, max_length=32768)] | None = None
    """Chat template that replaces the tokenizer's own: one of the names llama2, llama3, codellama, chatml, qwen, mistral,
    gemma and llava, or a Jinja template."""


class ColumnsSpec(ApiModel):
    """What a data set calls the columns that its format needs; absent: the format's own names."""

    prompt: Short | None = None
    """Alpaca's `instruction`."""
    query: Short | None = None
    """Alpaca's `input`."""
    response: Short | None = None
    """Alpaca's `output`."""
    history: Short | None = None
    """Alpaca's `history`: pairs of earlier questions and answers."""
    messages: Short | None = None
    """The list of turns: ShareGPT's `conversations`, Messages' `messages`."""
    system: Short | None = None
    """`system`: the system turn's text."""
    tools: Short | None = None
    """`tools`: the functions that the assistant may call, a list or its JSON text."""
    text: Short | None = None
    """Text's `text`."""


class TagsSpec(ApiModel):
    """How the turns of ShareGPT and Messages are written; absent: the format's own names."""

    role_tag: Short | None = None
    """Key of a turn's role: ShareGPT's `from`, Messages' `role`."""
    content_tag: Short | None = None
    """Key of a turn's text: ShareGPT's `value`, Messages' `content`."""
    user_tag: Short | None = None
    """The user's role: ShareGPT's `human` (or `user`), Messages' `user`."""
    assistant_tag: Short | None = None
    """The assistant's role: ShareGPT's `gpt` (or `assistant`), Messages' `assistant`."""
    observation_tag: Short | None = None
    """The role of a function's result: ShareGPT's `observation` (or `tool`), Messages' `tool`."""
    function_tag: Short | None = None
    """The role of a turn in which the assistant calls functions, its text being JSON: ShareGPT's `function_call`. Messages
    has `tool_calls` in the assistant's turn instead."""
    system_tag: Short | None = None
    """The system turn's role: `system`."""


_NOT_HERE = "which `format: {}` does not have"


_DATASET_RULES = (
    ("!has(self.revision) || self.uri.startsWith('hf://')", f"`revision` {HUB_ONLY}"),
    ("!has(self.credentialsRef) || self.uri.startsWith('hf://')", f"`credentialsRef` {HUB_ONLY}"),
    (
        "!has(self.tags) || self.format in ['ShareGPT', 'Messages']",
        "`tags` needs `format: ShareGPT` or `format: Messages`",
    ),
    (
        "!has(self.columns) || self.format != 'Alpaca' || !(has(self.columns.messages) || has(self.columns.text))",
        f"`columns` names `messages` or `text`, {_NOT_HERE.format('Alpaca')}",
    ),
    (
        "!has(self.columns) || !(self.format in ['ShareGPT', 'Messages']) || !(has(self.columns.prompt)"
        " || has(self.columns.query) || has(self.columns.response) || has(self.columns.history)"
        " || has(self.columns.text))",
        "`columns` names `prompt`, `query`, `response`, `history` or `text`, "
        "which `format: ShareGPT` and `format: Messages` do not have",
    ),
    (
        "!has(self.columns) || self.format != 'Text' || !(has(self.columns.prompt) || has(self.columns.query)"
        " || has(self.columns.response) || has(self.columns.history) || has(self.columns.messages)"
        " || has(self.columns.system) || has(self.columns.tools))",
        f"`columns` names more than `text`, {_NOT_HERE.format('Text')}",
    ),
)
"""Of train and evaluation data; pydantic does not join a subclass's rules with its parent's."""


class DatasetSpec(ApiModel):
    model_config = {"json_schema_extra": rules(*_DATASET_RULES)}

    uri: DatasetUri
    """A .jsonl, .json, .csv, .parquet or .arrow file, a folder of them, or a folder written by Hugging Face's `save_to_disk`:
    `hf://datasets/org/name[/path]`, `pvc://claim/path` or `file:///path`."""
    format: DatasetFormat = DatasetFormat.AUTO
    """Layout of one record. Auto tells it from the first record's keys."""
    max_samples: Annotated[int, Field(ge=1)] | None = None
    """Use only so many records, from the start."""
    revision: Short | None = None
    """Branch, tag or commit of an `hf://` data set."""
    credentials_ref: SecretKeyRef | None = None
    """Token for an `hf://` data set that is private or gated."""
    split: Short | None = None
    """Of a saved `DatasetDict`: the split to read. Of a folder of files: only those that have it as a word in their name or
    their folder's."""
    columns: ColumnsSpec | None = None
    """What this data set calls the columns of its format."""
    tags: TagsSpec | None = None
    """How this data set writes turns and roles."""
    weight: Weight | None = None
    """Relative share of this data set in the rows of an epoch, a decimal in quotes; an epoch has as many rows as all data
    sets together, and a data set with too few of them repeats, one with too many takes turns. With `packing` a row holds
    samples of one data set only. Absent: every record once an epoch."""


class EvaluationDatasetSpec(DatasetSpec):
    model_config = {
        "json_schema_extra": rules(
            *_DATASET_RULES,
            (
                "!has(self.benchmark) || (self.format == 'Auto' && !has(self.columns) && !has(self.split))",
                "`format`, `columns` and `split` are for held-out data; remove them: a `benchmark`'s problems have a layout of"
                " their own",
            ),
        )
    }

    benchmark: BenchmarkName | None = None
    """The records are this benchmark's problems: the model writes programs, which are run in a sandbox, and pass@k is
    measured (see `evaluation.generation`). Absent: held-out data."""


class DatasetsSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            (
                "self.train.all(d, has(d.weight)) || !self.train.exists(d, has(d.weight))",
                "set `weight` on every data set in `train`, or on none",
            ),
            (
                "!has(self.evaluation) || !self.evaluation.exists(d, has(d.weight))",
                "`weight` is only for data sets in `train`; remove it from `evaluation`",
            ),
            (
                "!has(self.evaluation) || ['HumanEval', 'MBPP'].all(name,"
                " self.evaluation.filter(e, has(e.benchmark) && e.benchmark == name).size() <= 1)",
                "each `benchmark` may stand in `evaluation` once",
            ),
        )
    }

    train: Annotated[list[DatasetSpec], Field(min_length=1, max_length=16)]
    """Data sets to train on, mixed record by record."""
    evaluation: Annotated[list[EvaluationDatasetSpec], Field(max_length=16)] = []
    """Held-out data sets, whose loss is measured, and benchmarks, whose programs are run: before the first step, every
    `training.evalEverySteps` and at the end."""


class AdapterSpec(ApiModel):
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
    """4: NF4 in blocks of 64. 8: LLM.int8(). The layers that get no adapter are quantised as well, all but the head."""
    double_quantization: bool = True
    """Quantise the scales of the 4-bit blocks again; it saves 0.4 bits a parameter. Without effect for 8 bits."""


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
    """Put several samples into one row; they never see each other."""
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
    moments in bfloat16 only, a quarter of the memory; updates smaller than half a bit of a weight are lost to rounding."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.NONE
    """Full recomputes every layer's activations in the backward pass: less memory, about a fifth slower. FullOffload also
    keeps the layers' inputs in CPU memory. SelectiveLayer recomputes every second layer. SelectiveOp keeps the results of
    matrix products and attention and recomputes the rest."""
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
    """Use Liger's kernels on GPUs: fused cross-entropy and, without `compile`, its norms, rotary embedding and SwiGLU."""
    compile: bool = False
    """Compile each decoder layer with `torch.compile`: the first steps take minutes, the others are faster."""


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


class ResourcesSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            (
                "!has(self.requests) || !has(self.limits) || self.requests.all(name, !(name in self.limits)"
                " || quantity(string(self.requests[name])).compareTo(quantity(string(self.limits[name]))) <= 0)",
                "each of `requests` must be at most the same resource's `limits`",
            ),
        )
    }

    requests: Annotated[dict[str, Quantity], Field(max_length=16)] = {}
    """Minimum of each resource, as in a container's `resources.requests`."""
    limits: Annotated[dict[str, Quantity], Field(max_length=16)] = {}
    """Maximum of each resource, as in a container's `resources.limits`; GPUs (`nvidia.com/gpu`) stand here."""


class EnvVarSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            ("has(self.value) != has(self.secretKeyRef)", "set `value` or `secretKeyRef`, not both")
        ),
    }

    name: EnvVarName
    """Name of the variable."""
    value: Annotated[str, Field(max_length=4096)] | None = None
    """Its value, in the open; use `secretKeyRef` for secrets."""
    secret_key_ref: SecretKeyRef | None = None
    """The Secret that holds its value."""


class TolerationOperator(StrEnum):
    EQUAL = "Equal"
    EXISTS = "Exists"


class TaintEffect(StrEnum):
    NO_SCHEDULE = "NoSchedule"
    PREFER_NO_SCHEDULE = "PreferNoSchedule"
    NO_EXECUTE = "NoExecute"


class TolerationSpec(ApiModel):
    key: Annotated[str, Field(max_length=316)] | None = None
    """Taint key; absent with `operator: Exists` matches all."""
    operator: TolerationOperator = TolerationOperator.EQUAL
    """How `value` is compared."""
    value: Annotated[str, Field(max_length=63)] | None = None
    """Taint value, for `Equal`."""
    effect: TaintEffect | None = None
    """Taint effect; absent matches all."""
    toleration_seconds: Annotated[int, Field(ge=0)] | None = None
    """For NoExecute: stay bound so long."""


class TrainerSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            (
                "!has(self.resourcesPerNode) || !has(self.resourcesPerNode.limits)"
                " || !('nvidia.com/gpu' in self.resourcesPerNode.limits)"
                " || string(self.resourcesPerNode.limits['nvidia.com/gpu']) == string(self.numProcPerNode)",
                "`resourcesPerNode.limits['nvidia.com/gpu']` must equal `numProcPerNode`: one process drives one GPU",
            ),
        )
    }

    image: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """Trainer image; absent: the one that the operator was installed with."""
    num_nodes: Annotated[int, Field(ge=1, le=512)] = 1
    """Pods of the gang, spread over Kubernetes nodes."""
    num_proc_per_node: Annotated[int, Field(ge=1, le=16)] = 1
    """Processes (ranks) in each pod; one for each GPU."""
    resources_per_node: ResourcesSpec = ResourcesSpec()
    """Resources of each pod."""
    env: Annotated[list[EnvVarSpec], Field(max_length=64)] = []
    """Environment of each pod, for libraries such as NCCL."""
    node_selector: Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=16)] = {}
    """Labels that a node must have."""
    tolerations: Annotated[list[TolerationSpec], Field(max_length=16)] = []
    """Taints that the pods tolerate."""
    priority_class_name: ResourceName | None = None
    """PriorityClass of the pods."""
    service_account_name: ResourceName | None = None
    """ServiceAccount of the pods (for image pull secrets); its token is not mounted."""


class CheckpointSpec(ApiModel):
    uri: VolumeUri | None = None
    """Folder in which each job gets one of its own, on a volume that all pods of the job can write. Absent: `checkpoints`
    beside the folder `output.uri`."""
    every_steps: Annotated[int, Field(ge=1)] = 100
    """Save after every so many steps."""
    keep: Annotated[int, Field(ge=1, le=100)] = 2
    """Keep so many of the newest complete checkpoints."""
    on_termination: bool = True
    """On SIGTERM (suspension, eviction, drain) save before leaving."""
    background: bool = True
    """Training stands still only while the state is copied to host memory, which needs room for the state once more; it is
    written while training goes on. False waits until it is written."""


class RecoverySpec(ApiModel):
    backoff_limit: Annotated[int, Field(ge=0, le=1000)] = 3
    """Restarts after failures of the job itself; more, and it is Failed. What the platform does (eviction, a lost node,
    preemption, suspension) is not counted."""


class OutputSpec(ApiModel):
    uri: VolumeUri
    """Folder that receives the adapter (LoRA, QLoRA) or the model (Full, Freeze), in Hugging Face layout."""
    merge_adapter: bool = False
    """Also write the whole model with the adapter merged into its weights, into the subfolder `merged`. Only for
    `method: LoRA`."""
    max_shard_size: FileSize = "5GB"
    """Files of a whole model are at most so large; more than one comes with an index, as transformers writes it."""


class WandbSpec(ApiModel):
    project: Short
    """Project in Weights & Biases."""
    entity: Short | None = None
    """User or team that owns the project. Absent: the default of the credentials' owner."""
    run_name: Short | None = None
    """Name of the run. Absent: the job's name."""
    credentials_ref: SecretKeyRef | None = None
    """API key. Absent: only for offline runs (`WANDB_MODE: offline` in `trainer.env`)."""


class TensorBoardSpec(ApiModel):
    uri: VolumeUri
    """Folder in which each job gets one of its own for its event files."""


class TrackingSpec(ApiModel):
    wandb: WandbSpec | None = None
    """Weights & Biases."""
    tensor_board: TensorBoardSpec | None = None
    """TensorBoard event files."""


class CacheSpec(ApiModel):
    uri: VolumeUri
    """Folder for `hf://` downloads, shared by jobs; each file is downloaded once."""


class GenerationSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            (
                "self.samples == 1 || double(self.temperature) > 0.0",
                "`samples` above 1 need a `temperature` above 0, else all samples of a problem are the same",
            ),
            ("self.k.all(n, n <= self.samples)", "each of `k` must be at most `samples`"),
        )
    }

    samples: Annotated[int, Field(ge=1, le=1000)] = 1
    """Programs that are generated for each problem."""
    temperature: NonNegativeDecimal = "0"
    """0 takes the likeliest token; above, tokens are drawn."""
    top_p: PositiveDecimal = "1"
    """Draw from the likeliest tokens that together have this probability."""
    max_new_tokens: Annotated[int, Field(ge=1, le=32768)] = 512
    """Length of one answer at most."""
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 8
    """Answers that one rank generates at the same time."""
    k: Annotated[list[Annotated[int, Field(ge=1, le=1000)]], Field(min_length=1, max_length=8)] = [1]
    """pass@k is reported for each."""
    timeout_seconds: Annotated[int, Field(ge=1, le=600)] = 5
    """CPU time of one program; it is given up after four times as much wall-clock time."""


class EvaluationSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            (
                "has(self.metric) || !(self.exportBest || has(self.earlyStoppingPatience))",
                "`exportBest` and `earlyStoppingPatience` need a `metric`",
            ),
            (
                "has(self.earlyStoppingPatience) || !has(self.earlyStoppingMinDelta)",
                "`earlyStoppingMinDelta` needs `earlyStoppingPatience`",
            ),
            (
                "!has(self.metric) || !self.metric.endsWith('PassAt1') || 1 in self.generation.k",
                "this `metric` needs 1 in `generation.k`",
            ),
        )
    }

    generation: GenerationSpec = GenerationSpec()
    """How programs for benchmarks are generated and run."""
    metric: EvaluationMetric | None = None
    """What tells the best checkpoint, which is saved when it is measured and then kept, whatever `checkpoint.keep` says.
    The loss is better when it is lower, all else when it is higher. Absent: no checkpoint is the best."""
    export_best: bool = False
    """Export the best checkpoint instead of the last."""
    early_stopping_patience: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Stop after so many evaluations in a row without an improvement of `metric`; the job is then Complete."""
    early_stopping_min_delta: NonNegativeDecimal | None = None
    """Less than this is no improvement. Absent: 0."""


IMMUTABLE = (
    "model",
    "datasets",
    "method",
    "adapter",
    "training",
    "deepspeed",
    "trainer",
    "checkpoint",
    "output",
    "cache",
    "managedBy",
    "freeze",
    "quantization",
    "tracking",
    "evaluation",
)
"""What may not change once the job exists: another value would be another run."""


def _immutable(name: str) -> tuple[str, str]:
    return (
        f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})",
        f"`{name}` cannot be changed once the job exists; delete the job and create it again"
        " (`suspend`, `recovery`, `activeDeadlineSeconds` and `ttlSecondsAfterFinished` can be changed)",
    )


class FineTuneJobSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            *map(_immutable, IMMUTABLE),
            (
                "self.method in ['LoRA', 'QLoRA'] || !has(self.adapter)",
                "`adapter` is only for `method: LoRA` and `method: QLoRA`; remove it",
            ),
            ("self.method == 'Freeze' || !has(self.freeze)", "`freeze` is only for `method: Freeze`; remove it"),
            (
                "self.method == 'QLoRA' || !has(self.quantization)",
                "`quantization` is only for `method: QLoRA`; remove it",
            ),
            *combinations.cel_rules(),
            ("self.method == 'LoRA' || !self.output.mergeAdapter", "`output.mergeAdapter` is only for `method: LoRA`"),
            (
                "!has(self.tracking) || !has(self.tracking.tensorBoard) || !(self.tracking.tensorBoard.uri + '/')"
                ".startsWith(self.output.uri.endsWith('/') ? self.output.uri : self.output.uri + '/')",
                "`tracking.tensorBoard.uri` must not be inside `output.uri`, which is replaced as a whole at the end",
            ),
            (
                "self.training.globalBatchSize"
                " % (self.training.microBatchSize * self.trainer.numNodes * self.trainer.numProcPerNode) == 0",
                "`training.globalBatchSize` must be a multiple of `training.microBatchSize` x `trainer.numNodes` x"
                " `trainer.numProcPerNode`, so that every rank gets the same number of rows",
            ),
            (
                "!has(self.training.evalEverySteps)"
                " || (has(self.datasets.evaluation) && size(self.datasets.evaluation) > 0)",
                "`training.evalEverySteps` needs a data set in `datasets.evaluation`",
            ),
            (
                "!self.training.compile || self.deepspeed.zeroStage != 3",
                "`training.compile` does not work with `deepspeed.zeroStage: 3`, which gathers weights between the"
                " operations of a layer; use stage 0, 1 or 2, or leave `compile` out",
            ),
            (
                "!has(self.evaluation.earlyStoppingPatience) || has(self.training.evalEverySteps)",
                "`evaluation.earlyStoppingPatience` needs `training.evalEverySteps`",
            ),
            (
                "!has(self.evaluation.metric) || (has(self.datasets.evaluation) && self.datasets.evaluation.exists(e,"
                " has(e.benchmark) ? (e.benchmark == 'HumanEval' && self.evaluation.metric == 'HumanEvalPassAt1')"
                " || (e.benchmark == 'MBPP' && self.evaluation.metric == 'MBPPPassAt1')"
                " : self.evaluation.metric in ['EvalLoss', 'TokenAccuracy']))",
                "`evaluation.metric` needs its data in `datasets.evaluation`: held-out data, or the `benchmark` that it names",
            ),
        )
    }

    model: ModelSpec
    """The model to start from."""
    datasets: DatasetsSpec
    """What to train and to evaluate on."""
    method: Method = Method.LORA
    """LoRA trains small adapter matrices; QLoRA the same on a base in 4 or 8 bits; Full trains every weight; Freeze trains
    the weights of some layers."""
    adapter: AdapterSpec | None = None
    """The adapter of `method: LoRA` and `method: QLoRA`; absent: the defaults of its fields."""
    training: TrainingSpec = TrainingSpec()
    """Hyperparameters."""
    deepspeed: DeepSpeedSpec = DeepSpeedSpec()
    """How DeepSpeed spreads the training state."""
    trainer: TrainerSpec = TrainerSpec()
    """The pods."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """When and where state is saved."""
    recovery: RecoverySpec = RecoverySpec()
    """What to do about failures."""
    output: OutputSpec
    """Where the result goes."""
    cache: CacheSpec | None = None
    """Where `hf://` downloads are kept. Absent: each pod downloads into a scratch folder of its own."""
    suspend: bool = False
    """True stops the job after a checkpoint and frees its pods; false goes on from there."""
    managed_by: Annotated[str, Field(min_length=1, max_length=63)] = "finetune.dev/finetune-operator"
    """The controller that reconciles this job; any other value than the default makes this operator leave it alone."""
    active_deadline_seconds: Annotated[int, Field(ge=1)] | None = None
    """The job is Failed when it has been active so long (suspension does not count)."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0)] | None = None
    """The job and its pods are deleted so long after it finished; checkpoints and output stay."""
    freeze: FreezeSpec | None = None
    """What `method: Freeze` trains; absent: the defaults of its fields."""
    quantization: QuantizationSpec | None = None
    """How `method: QLoRA` quantises the base model; absent: the defaults of its fields."""
    tracking: TrackingSpec | None = None
    """Where the course of training is shown, besides Prometheus. A tracker that fails never stops or slows training."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """How benchmarks are evaluated."""
