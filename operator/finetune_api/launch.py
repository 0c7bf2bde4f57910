"""`LaunchSpec`: everything the trainer needs, fully resolved by the operator and mounted as `launch.json`.

Nothing is left to a default or to the environment: the same file drives a pod and a run on one's own machine. Secrets never
stand in it, only the paths of the files that hold them.
"""

from datetime import date
from typing import Literal

from pydantic import Field

from finetune_api.base import ApiModel
from finetune_api.deepspeed_config import DeepSpeedConfig
from finetune_api.spec import (
    ActivationCheckpointing,
    AdapterVariant,
    Attention,
    BenchmarkName,
    ColumnsSpec,
    DatasetFormat,
    EvaluationMetric,
    Method,
    Offload,
    Optimizer,
    Overlong,
    Precision,
    QuantizationBits,
    Scheduler,
    TagsSpec,
    ZeroStage,
)

UNDATED = date(2024, 7, 26)
"""Of a launch file that says no day: the one that Llama 3.2's template writes where it is told none."""


class PathSource(ApiModel):
    """A file or folder that is there already."""

    kind: Literal["Path"] = "Path"
    path: str


class HubSource(ApiModel):
    """A repository on a hub that speaks Hugging Face's API, downloaded once into `LaunchSpec.cache_dir`."""

    kind: Literal["Hub"] = "Hub"
    repo_id: str
    repo_type: Literal["model", "dataset"]
    revision: str
    """A branch, tag or commit; from the second attempt on the commit that the first one resolved."""
    path: str = ""
    """A file or folder inside the repository; empty: all of it."""
    token_file: str | None = None


class LaunchDataset(ApiModel):
    uri: str
    """As the user wrote it, for messages."""
    source: PathSource | HubSource = Field(discriminator="kind")
    format: DatasetFormat
    max_samples: int | None
    split: str | None
    columns: ColumnsSpec | None
    """Other names of the format's columns."""
    tags: TagsSpec | None
    """Other names of turns' keys and roles."""
    weight: float | None
    """Relative share of the mixed rows; None: every record once an epoch."""


class LaunchModel(ApiModel):
    uri: str
    """As the user wrote it, for messages."""
    source: PathSource | HubSource = Field(discriminator="kind")
    chat_template: str | None
    """A name of `CHAT_TEMPLATES` or a Jinja template; None: the tokenizer's own."""


class LaunchAdapter(ApiModel):
    rank: int
    alpha: int
    dropout: float
    target_modules: list[str]
    """Module names; `["All"]` is every linear layer but the head."""
    variant: AdapterVariant
    lora_plus_ratio: float | None
    """None: B matrices learn at the same rate."""


class LaunchFreeze(ApiModel):
    trainable_layers: int
    """The last n decoder layers; negative: the first n."""
    trainable_modules: list[str]
    """Names within the layers, or `["All"]`."""
    extra_modules: list[str]
    """Names outside the layers."""


class LaunchQuantization(ApiModel):
    bits: QuantizationBits
    double_quantization: bool


class LaunchVision(ApiModel):
    freeze_tower: bool
    projector_learning_rate: float | None
    """None: the projector is frozen."""


class LaunchSchedulerParameters(ApiModel):
    """Every parameter has its value, whichever the scheduler uses."""

    num_cycles: int
    min_lr_rate: float
    lr_end: float
    power: float
    timescale: int | None
    """None: the steps of warm-up, or 10,000 without."""
    num_decay_steps: int | None
    """None: two thirds of the steps after warm-up."""


class LaunchTraining(ApiModel):
    max_length: int
    """Tokens of one sample, or of one packed row."""
    packing: bool
    global_batch_size: int
    """Rows of one optimizer step over all ranks."""
    micro_batch_size: int
    """Rows of one forward pass on one rank."""
    gradient_accumulation_steps: int
    """global_batch_size / (micro_batch_size x world size)."""
    epochs: int | None
    max_steps: int | None
    """Exactly one of `epochs` and `max_steps` is set."""
    learning_rate: float
    scheduler: Scheduler
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    """0: no clipping."""
    precision: Precision
    activation_checkpointing: ActivationCheckpointing
    seed: int
    eval_every_steps: int | None
    optimizer: Optimizer
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    warmup_steps: int | None
    """Set: `warmup_ratio` is 0 and has no meaning."""
    scheduler_parameters: LaunchSchedulerParameters
    overlong: Overlong
    train_on_prompt: bool
    mask_history: bool
    group_by_length: bool
    attention: Attention
    liger_kernel: bool
    compile: bool
    loader_workers: int


class LaunchDeepSpeed(ApiModel):
    zero_stage: ZeroStage
    offload_optimizer: Offload
    offload_parameters: Offload
    config: DeepSpeedConfig | None
    """DeepSpeed's own names, merged last."""


class LaunchCheckpoint(ApiModel):
    dir: str
    """Belongs to this job alone."""
    every_steps: int
    keep: int
    on_termination: bool
    background: bool


class LaunchOutput(ApiModel):
    merge_adapter: bool
    max_shard_bytes: int


class LaunchWandb(ApiModel):
    project: str
    entity: str | None
    run_name: str
    token_file: str | None


class LaunchTensorBoard(ApiModel):
    dir: str
    """Belongs to this job alone."""


class LaunchProfiler(ApiModel):
    dir: str
    """Belongs to this job alone."""
    wait: int
    warmup: int
    active: int


class LaunchTracking(ApiModel):
    wandb: LaunchWandb | None
    tensor_board: LaunchTensorBoard | None
    profiler: LaunchProfiler | None


class LaunchBenchmark(ApiModel):
    uri: str
    """As the user wrote it, for messages."""
    source: PathSource | HubSource = Field(discriminator="kind")
    benchmark: BenchmarkName
    max_samples: int | None
    """Use only so many problems, from the start."""


class LaunchGeneration(ApiModel):
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    batch_size: int
    k: list[int]
    timeout_seconds: int


class LaunchSelection(ApiModel):
    """Which checkpoint is the best, and when to stop."""

    metric: EvaluationMetric | None
    export_best: bool
    early_stopping_patience: int | None
    """Evaluations; None: never stop early."""
    early_stopping_min_delta: float


class JobIdentity(ApiModel):
    namespace: str
    name: str
    uid: str


class Rendezvous(ApiModel):
    host: str
    """Rank 0's DNS name; `localhost` for one node."""
    port: int


class LaunchSpec(ApiModel):
    """The resolved job of one attempt.

    A job keeps its image when the operator is upgraded, so an older trainer reads it too: it leaves out fields that it does
    not know. Raise `schema_version`, which it refuses, when a new field changes what is computed.
    """

    schema_version: Literal[1] = 1
    job: JobIdentity
    created_on: date = UNDATED
    """The job's day (UTC): what chat templates that write the date write in every attempt and on every node."""
    attempt: int
    """From 1. The newest attempt owns the checkpoint folder; an older one that still runs ends itself."""
    num_nodes: int
    num_proc_per_node: int
    threads_per_process: int
    """CPU threads of one rank; fixed, since sums depend on it."""
    rendezvous: Rendezvous
    http_port: int
    """`/progress`, `/metrics` and `/healthz` of each pod."""
    termination_grace_seconds: int
    communication_timeout_seconds: int
    hang_timeout_seconds: int
    """A rank without a heartbeat for so long while training has hung (loading and exporting have no such limit)."""
    model: LaunchModel
    train: list[LaunchDataset]
    evaluation: list[LaunchDataset]
    method: Method
    adapter: LaunchAdapter | None
    """None for `Full` and `Freeze`."""
    training: LaunchTraining
    deepspeed: LaunchDeepSpeed
    checkpoint: LaunchCheckpoint
    output_dir: str
    cache_dir: str
    freeze: LaunchFreeze | None
    """Only for `Freeze`."""
    quantization: LaunchQuantization | None
    """Only for `QLoRA`."""
    vision: LaunchVision | None
    """None: the job says nothing of it, and nothing beside the language model is trained."""
    output: LaunchOutput
    tracking: LaunchTracking
    benchmarks: list[LaunchBenchmark]
    generation: LaunchGeneration
    """Of programs for `benchmarks`."""
    selection: LaunchSelection

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.num_proc_per_node
