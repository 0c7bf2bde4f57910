"""`spec` as a whole: the blocks together, and the rules that hold between them."""

from typing import Annotated

from pydantic import Field

from finetune_api import combinations
from finetune_api.base import ApiModel, rules
from finetune_api.spec.datasets import DatasetsSpec
from finetune_api.spec.deepspeed import DeepSpeedSpec
from finetune_api.spec.evaluation import EvaluationSpec
from finetune_api.spec.method import AdapterSpec, FreezeSpec, Method, QuantizationSpec
from finetune_api.spec.model import ModelSpec
from finetune_api.spec.results import CacheSpec, CheckpointSpec, OutputSpec, RecoverySpec, TrackingSpec
from finetune_api.spec.trainer import TrainerSpec
from finetune_api.spec.training import TrainingSpec
from finetune_api.spec.vision import VisionSpec

IMMUTABLE = (
    "model",
    "datasets",
    "method",
    "adapter",
    "training",
    "deepspeed",
    "checkpoint",
    "output",
    "cache",
    "managedBy",
    "freeze",
    "quantization",
    "tracking",
    "evaluation",
    "vision",
)
"""What may not change once the job exists: another value would be another run."""


MAX_SECONDS = 2**31 - 1
"""Of a duration, as in Kubernetes' own Jobs where they are 32 bits; added to a time it is still a date."""


def _immutable(name: str) -> tuple[str, str]:
    return (
        f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})",
        f"`{name}` cannot be changed once the job exists; delete the job and create it again"
        " (`suspend`, `recovery`, `activeDeadlineSeconds` and `ttlSecondsAfterFinished` can be changed, `trainer` while"
        " `suspend` is true)",
    )


def _outside_output(*block: str) -> tuple[str, str]:
    parts = [".".join(block[: end + 1]) for end in range(len(block))]
    absent = " || ".join(f"!has(self.{part})" for part in parts)
    uri = f"{parts[-1]}.uri"
    return (
        f"{absent} || !(self.{uri} + '/')"
        ".startsWith(self.output.uri.endsWith('/') ? self.output.uri : self.output.uri + '/')",
        f"`{uri}` must not be inside `output.uri`, which is replaced as a whole at the end",
    )


class FineTuneJobSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            *map(_immutable, IMMUTABLE),
            (
                "oldSelf.suspend || self.trainer == oldSelf.trainer",
                "`trainer` can be changed only while the job is suspended: set `suspend: true` first, then change `trainer`"
                " and set `suspend: false`",
            ),
            (
                "!(self.training.optimizer in ['AdamW8bit', 'PagedAdamW8bit']) || self.trainer.numNodes"
                " * self.trainer.numProcPerNode == oldSelf.trainer.numNodes * oldSelf.trainer.numProcPerNode",
                "with `training.optimizer: AdamW8bit/PagedAdamW8bit` the number of ranks (`trainer.numNodes` x"
                " `trainer.numProcPerNode`) cannot be changed: their state is quantised in blocks that cannot be cut elsewhere",
            ),
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
            _outside_output("tracking", "tensorBoard"),
            _outside_output("tracking", "profiler"),
            _outside_output("cache"),
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
    """LoRA trains small adapter matrices; QLoRA the same on a base in 4 or 8 bits; Full trains every weight; Freeze trains
    the weights of some layers."""
    adapter: AdapterSpec | None = None
    """The adapter of `method: LoRA` and `method: QLoRA`; absent: the defaults of its fields."""
    training: TrainingSpec = TrainingSpec()
    """Hyperparameters."""
    deepspeed: DeepSpeedSpec = DeepSpeedSpec()
    """How DeepSpeed spreads the training state."""
    trainer: TrainerSpec = TrainerSpec()
    """The pods. It may be changed while `suspend` is true: the job goes on with the new ones from its newest checkpoint."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """When and where state is saved."""
    recovery: RecoverySpec = RecoverySpec()
    """What to do about failures."""
    output: OutputSpec
    """Where the result goes."""
    cache: CacheSpec | None = None
    """Where downloads, tokenised data and compiled code are kept. Absent: the folder that the operator was given
    (`trainer.cacheUri` of the chart), else a scratch folder in each pod; `finetune run`: `~/.cache/finetune`."""
    suspend: bool = False
    """True stops the job after a checkpoint and frees its pods; false goes on from there."""
    managed_by: Annotated[str, Field(min_length=1, max_length=63)] = "finetune.dev/finetune-operator"
    """The controller that reconciles this job; any other value than the default makes this operator leave it alone."""
    active_deadline_seconds: Annotated[int, Field(ge=1, le=MAX_SECONDS)] | None = None
    """The job is Failed when it has been active so long; counted from its start, and anew when it goes on after `suspend`, as for
    a batch Job."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=MAX_SECONDS)] | None = None
    """The job and its pods are deleted so long after it finished; checkpoints and output stay."""
    freeze: FreezeSpec | None = None
    """What `method: Freeze` trains; absent: the defaults of its fields."""
    quantization: QuantizationSpec | None = None
    """How `method: QLoRA` quantises the base model; absent: the defaults of its fields."""
    tracking: TrackingSpec | None = None
    """Where the course of training is shown, besides Prometheus. A tracker that fails never stops or slows training."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """How benchmarks are evaluated."""
    vision: VisionSpec | None = None
    """What is trained of a model that sees (LLaVA-1.5's kind) beside its language model, which `method`, `adapter` and `freeze`
    are about. Absent: nothing; for a model without a vision tower it has to be absent."""
