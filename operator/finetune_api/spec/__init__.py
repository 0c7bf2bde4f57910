"""`spec` of a FineTuneJob: what a person writes, one module for each block.

Defaults stand here and nowhere else: the API server fills them in from the generated CRD. Numbers with a fraction are
decimal strings, since floats do not survive every Kubernetes client unchanged.
"""

from finetune_api.spec.common import HUB_ONLY, QUANTITY, Quantity, SecretKeyRef, Short
from finetune_api.spec.datasets import (
    BenchmarkName,
    ColumnsSpec,
    DatasetFormat,
    DatasetSpec,
    DatasetsSpec,
    EvaluationDatasetSpec,
    TagsSpec,
)
from finetune_api.spec.deepspeed import DeepSpeedSpec, Offload, ZeroStage
from finetune_api.spec.evaluation import EvaluationMetric, EvaluationSpec, GenerationSpec
from finetune_api.spec.job import IMMUTABLE, FineTuneJobSpec
from finetune_api.spec.method import AdapterSpec, AdapterVariant, FreezeSpec, Method, QuantizationBits, QuantizationSpec
from finetune_api.spec.model import CHAT_TEMPLATE_RULE, CHAT_TEMPLATES, ModelSpec
from finetune_api.spec.results import (
    CacheSpec,
    CheckpointSpec,
    OutputSpec,
    ProfilerSpec,
    RecoverySpec,
    TensorBoardSpec,
    TrackingSpec,
    WandbSpec,
)
from finetune_api.spec.trainer import (
    EnvVarSpec,
    ResourcesSpec,
    TaintEffect,
    TolerationOperator,
    TolerationSpec,
    TrainerSpec,
)
from finetune_api.spec.training import (
    ActivationCheckpointing,
    Attention,
    Optimizer,
    Overlong,
    Precision,
    Scheduler,
    SchedulerParametersSpec,
    TrainingSpec,
)
from finetune_api.spec.vision import VisionSpec

__all__ = [
    "CHAT_TEMPLATES",
    "CHAT_TEMPLATE_RULE",
    "HUB_ONLY",
    "IMMUTABLE",
    "QUANTITY",
    "ActivationCheckpointing",
    "AdapterSpec",
    "AdapterVariant",
    "Attention",
    "BenchmarkName",
    "CacheSpec",
    "CheckpointSpec",
    "ColumnsSpec",
    "DatasetFormat",
    "DatasetSpec",
    "DatasetsSpec",
    "DeepSpeedSpec",
    "EnvVarSpec",
    "EvaluationDatasetSpec",
    "EvaluationMetric",
    "EvaluationSpec",
    "FineTuneJobSpec",
    "FreezeSpec",
    "GenerationSpec",
    "Method",
    "ModelSpec",
    "Offload",
    "Optimizer",
    "OutputSpec",
    "Overlong",
    "Precision",
    "ProfilerSpec",
    "Quantity",
    "QuantizationBits",
    "QuantizationSpec",
    "RecoverySpec",
    "ResourcesSpec",
    "Scheduler",
    "SchedulerParametersSpec",
    "SecretKeyRef",
    "Short",
    "TagsSpec",
    "TaintEffect",
    "TensorBoardSpec",
    "TolerationOperator",
    "TolerationSpec",
    "TrackingSpec",
    "TrainerSpec",
    "TrainingSpec",
    "VisionSpec",
    "WandbSpec",
    "ZeroStage",
]
