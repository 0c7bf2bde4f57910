"""`spec` of a FineTuneJob: what a person writes.

Defaults stand here and nowhere else: the API server fills them in from the generated CRD. Numbers with a fraction are
decimal strings, since floats do not survive every Kubernetes client unchanged.
"""

from enum import IntEnum, StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.base import (
    ApiModel,
    DatasetUri,
    EnvVarName,
    ModelUri,
    NonNegativeDecimal,
    PositiveDecimal,
    Ratio,
    ResourceName,
    VolumeUri,
    rules,
)

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


class Scheduler(StrEnum):
    CONSTANT = "Constant"
    LINEAR = "Linear"
    COSINE = "Cosine"


class Precision(StrEnum):
    BF16 = "BF16"
    FP32 = "FP32"


class ActivationCheckpointing(StrEnum):
    NONE = "None"
    FULL = "Full"


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


class ModelSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            ("!has(self.revision) || self.uri.startsWith('hf://')", f"`revision` {HUB_ONLY}"),
            ("!has(self.credentialsRef) || self.uri.startsWith('hf://')", f"`credentialsRef` {HUB_ONLY}"),
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
    """Jinja chat template that replaces the tokenizer's own."""


class DatasetSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            ("!has(self.revision) || self.uri.startsWith('hf://')", f"`revision` {HUB_ONLY}"),
            ("!has(self.credentialsRef) || self.uri.startsWith('hf://')", f"`credentialsRef` {HUB_ONLY}"),
        )
    }

    uri: DatasetUri
    """A .jsonl, .json or .parquet file, or a folder of them: `hf://datasets/org/name[/path]`, `pvc://claim/path` or
    `file:///path`."""
    format: DatasetFormat = DatasetFormat.AUTO
    """Layout of one record. Auto tells it from the first record's keys."""
    max_samples: Annotated[int, Field(ge=1)] | None = None
    """Use only so many records, from the start."""
    revision: Short | None = None
    """Branch, tag or commit of an `hf://` data set."""
    credentials_ref: SecretKeyRef | None = None
    """Token for an `hf://` data set that is private or gated."""


class EvaluationDatasetSpec(DatasetSpec):
    model_config = {
        "json_schema_extra": rules(
            ("!has(self.revision) || self.uri.startsWith('hf://')", f"`revision` {HUB_ONLY}"),
            ("!has(self.credentialsRef) || self.uri.startsWith('hf://')", f"`credentialsRef` {HUB_ONLY}"),
            (
                "!has(self.benchmark) || self.format == 'Auto'",
                "`format` is for held-out data; remove it: a `benchmark`'s problems have a layout of their own",
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


class TrainingSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            ("!(has(self.epochs) && has(self.maxSteps))", "set `epochs` or `maxSteps`, not both"),
            (
                "self.globalBatchSize % self.microBatchSize == 0",
                "`globalBatchSize` must be a multiple of `microBatchSize`",
            ),
        )
    }

    max_length: Annotated[int, Field(ge=8, le=1048576)] = 2048
    """Tokens of one sample (longer ones are truncated) or, with `packing`, of one packed row."""
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
    """Peak learning rate, a decimal in quotes. Absent: 2e-4 for LoRA, 2e-5 for Full."""
    scheduler: Scheduler = Scheduler.COSINE
    """Course of the learning rate after warm-up."""
    warmup_ratio: Ratio = "0.03"
    """Share of all steps in which the learning rate rises from 0."""
    weight_decay: Ratio = "0"
    """AdamW's decoupled weight decay."""
    max_grad_norm: NonNegativeDecimal = "1"
    """Gradients are clipped to this norm; 0 switches clipping off."""
    precision: Precision = Precision.BF16
    """BF16: bfloat16 compute with float32 master weights. FP32: float32 throughout."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.NONE
    """Full recomputes every layer's activations in the backward pass: less memory, about a fifth slower."""
    seed: Annotated[int, Field(ge=0, le=4294967295)] = 42
    """Seed of data order, dropout and new weights."""
    eval_every_steps: Annotated[int, Field(ge=1)] | None = None
    """Also evaluate after every so many steps."""


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


class RecoverySpec(ApiModel):
    backoff_limit: Annotated[int, Field(ge=0, le=1000)] = 3
    """Restarts after failures of the job itself; more, and it is Failed. What the platform does (eviction, a lost node,
    preemption, suspension) is not counted."""


class OutputSpec(ApiModel):
    uri: VolumeUri
    """Folder that receives the adapter (LoRA) or the model (Full), in Hugging Face layout."""


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
            ("self.method == 'LoRA' || !has(self.adapter)", "`adapter` is only for `method: LoRA`; remove it"),
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
    """LoRA trains small adapter matrices; Full trains every weight."""
    adapter: AdapterSpec | None = None
    """The adapter of `method: LoRA`; absent: the defaults of its fields."""
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
    evaluation: EvaluationSpec = EvaluationSpec()
    """How benchmarks are evaluated."""
