"""One good manifest, the ways in which people get it wrong, and what may be changed of it later."""

import copy
from typing import Any, NamedTuple

GOOD: dict[str, Any] = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "good"},
    "spec": {
        "model": {"uri": "pvc://finetune/models/smollm2"},
        "datasets": {
            "train": [{"uri": "pvc://finetune/data/train.jsonl", "format": "Messages"}],
            "evaluation": [{"uri": "pvc://finetune/data/heldout.jsonl"}],
        },
        "method": "LoRA",
        "adapter": {"rank": 8},
        "training": {"maxSteps": 10, "globalBatchSize": 8, "microBatchSize": 2, "learningRate": "2e-4"},
        "trainer": {"numNodes": 2, "resourcesPerNode": {"limits": {"cpu": 2, "memory": "4Gi"}}},
        "output": {"uri": "pvc://finetune/out"},
    },
}
REMOVE = object()


class Bad(NamedTuple):
    """One mistake: where, what stands there, and what the refusal must name."""

    path: str
    value: Any
    says: tuple[str, ...]


def broken(path: str, value: Any) -> dict[str, Any]:
    """GOOD with `value` at the dotted path (REMOVE takes the field away; digits are list indices)."""
    manifest = copy.deepcopy(GOOD)
    node: Any = manifest
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        node = node.setdefault(part, {}) if isinstance(node, dict) else node[part]
    if value is REMOVE:
        del node[last]
    elif isinstance(node, list) and last == len(node):
        node.append(value)
    else:
        node[last] = value
    return manifest


BAD: dict[str, Bad] = {
    "no model": Bad("spec.model", REMOVE, ("spec.model", "Required value")),
    "no model uri": Bad("spec.model.uri", REMOVE, ("spec.model.uri", "Required value")),
    "unknown scheme": Bad(
        "spec.model.uri", "s3://bucket/model", ("spec.model.uri", "hf://org/name", "pvc://claim/path")
    ),
    "hub name without org": Bad("spec.model.uri", "hf://smollm2", ("spec.model.uri", "hf://org/name")),
    "claim in capitals": Bad("spec.model.uri", "pvc://Claim/x", ("spec.model.uri", "pvc://claim/path")),
    "parent folder in the path": Bad("spec.model.uri", "pvc://c/../secret", ("spec.model.uri", "without `..`")),
    "revision of a volume": Bad("spec.model.revision", "main", ("spec.model", "`revision` is only for `hf://`")),
    "credentials of a volume": Bad(
        "spec.model.credentialsRef", {"name": "token"}, ("spec.model", "`credentialsRef` is only for `hf://`")
    ),
    "credentials in capitals": Bad(
        "spec.model", {"uri": "hf://a/b", "credentialsRef": {"name": "My_Token"}}, ("credentialsRef.name", "lower-case")
    ),
    "no data sets": Bad("spec.datasets", REMOVE, ("spec.datasets", "Required value")),
    "empty training data": Bad("spec.datasets.train", [], ("spec.datasets.train", "at least 1")),
    "data set without uri": Bad(
        "spec.datasets.train.0", {"format": "Text"}, ("spec.datasets.train[0].uri", "Required value")
    ),
    "unknown format": Bad(
        "spec.datasets.train.0.format",
        "CSV",
        ("spec.datasets.train[0].format", "Alpaca", "ShareGPT", "Messages", "Text"),
    ),
    "no samples": Bad(
        "spec.datasets.train.0.maxSamples", 0, ("spec.datasets.train[0].maxSamples", "greater than or equal to 1")
    ),
    "hub data set without datasets/": Bad(
        "spec.datasets.train.0.uri", "hf://org/name", ("spec.datasets.train[0].uri", "hf://datasets/org/name")
    ),
    "unknown method": Bad("spec.method", "Prefix", ("spec.method", "Full", "LoRA")),
    "adapter for a full run": Bad("spec.method", "Full", ("`adapter` is only for `method: LoRA`",)),
    "rank 0": Bad("spec.adapter.rank", 0, ("spec.adapter.rank", "greater than or equal to 1")),
    "dropout 1": Bad("spec.adapter.dropout", "1.0", ("spec.adapter.dropout", "from 0 up to, but not including, 1")),
    "no target modules": Bad("spec.adapter.targetModules", [], ("spec.adapter.targetModules", "at least 1")),
    "all target modules and one more": Bad(
        "spec.adapter.targetModules", ["All", "lm_head"], ("spec.adapter", "`All` of `targetModules` stands alone")
    ),
    "learning rate in words": Bad(
        "spec.training.learningRate", "fast", ("spec.training.learningRate", "decimal number", "0.0002")
    ),
    "learning rate without quotes": Bad(
        "spec.training.learningRate", 0.0002, ("spec.training.learningRate", "type string")
    ),
    "learning rate 0": Bad("spec.training.learningRate", "0", ("spec.training.learningRate", "above 0 and at most 1")),
    "negative learning rate": Bad("spec.training.learningRate", "-1e-4", ("spec.training.learningRate", "above 0")),
    "negative norm": Bad("spec.training.maxGradNorm", "-1", ("spec.training.maxGradNorm", "0 or more")),
    "warm-up longer than the run": Bad(
        "spec.training.warmupRatio", "1.5", ("spec.training.warmupRatio", "not including, 1")
    ),
    "epochs and steps": Bad("spec.training.epochs", 3, ("spec.training", "`epochs` or `maxSteps`, not both")),
    "0 steps": Bad("spec.training.maxSteps", 0, ("spec.training.maxSteps", "greater than or equal to 1")),
    "too short": Bad("spec.training.maxLength", 4, ("spec.training.maxLength", "greater than or equal to 8")),
    "unknown precision": Bad("spec.training.precision", "FP16", ("spec.training.precision", "BF16", "FP32")),
    "unknown scheduler": Bad(
        "spec.training.scheduler", "Step", ("spec.training.scheduler", "Constant", "Linear", "Cosine")
    ),
    "micro-batch does not divide": Bad("spec.training.microBatchSize", 3, ("`globalBatchSize` must be a multiple of",)),
    "ranks do not divide": Bad(
        "spec.trainer.numNodes", 3, ("`training.globalBatchSize` must be a multiple of", "numNodes")
    ),
    "evaluation without data": Bad(
        "spec.datasets.evaluation", REMOVE, ("`training.evalEverySteps` needs a data set in `datasets.evaluation`",)
    ),
    "unknown attention": Bad(
        "spec.training.attention", "Flash", ("spec.training.attention", "FlashAttention2", "Varlen", "SDPA")
    ),
    "benchmark with a format": Bad(
        "spec.datasets.evaluation.0",
        {"uri": "pvc://finetune/data/HumanEval.jsonl.gz", "benchmark": "HumanEval", "format": "Text"},
        ("spec.datasets.evaluation[0]", "are for held-out data"),
    ),
    "unknown benchmark": Bad(
        "spec.datasets.evaluation.0.benchmark", "GSM8K", ("spec.datasets.evaluation[0].benchmark", "HumanEval", "MBPP")
    ),
    "benchmark twice": Bad(
        "spec.datasets.evaluation",
        [
            {"uri": "pvc://finetune/a.jsonl", "benchmark": "MBPP"},
            {"uri": "pvc://finetune/b.jsonl", "benchmark": "MBPP"},
        ],
        ("spec.datasets", "may stand in `evaluation` once"),
    ),
    "benchmark to train on": Bad(
        "spec.datasets.train.0.benchmark", "MBPP", ("unknown field", "spec.datasets.train[0].benchmark")
    ),
    "the same sample many times": Bad(
        "spec.evaluation.generation.samples", 10, ("spec.evaluation.generation", "need a `temperature` above 0")
    ),
    "pass@10 of one sample": Bad(
        "spec.evaluation.generation.k", [1, 10], ("spec.evaluation.generation", "each of `k` must be at most `samples`")
    ),
    "best without a metric": Bad("spec.evaluation.exportBest", True, ("spec.evaluation", "need a `metric`")),
    "metric of a missing benchmark": Bad(
        "spec.evaluation.metric", "MBPPPassAt1", ("`evaluation.metric` needs its data in `datasets.evaluation`",)
    ),
    "metric of another k": Bad(
        "spec.evaluation",
        {"metric": "HumanEvalPassAt1", "generation": {"samples": 10, "temperature": "0.8", "k": [10]}},
        ("spec.evaluation", "this `metric` needs 1 in `generation.k`"),
    ),
    "early stopping without evaluations": Bad(
        "spec.evaluation",
        {"metric": "EvalLoss", "earlyStoppingPatience": 3},
        ("`evaluation.earlyStoppingPatience` needs `training.evalEverySteps`",),
    ),
    "least improvement without patience": Bad(
        "spec.evaluation",
        {"metric": "EvalLoss", "earlyStoppingMinDelta": "0.01"},
        ("spec.evaluation", "`earlyStoppingMinDelta` needs `earlyStoppingPatience`"),
    ),
    "negative seed": Bad("spec.training.seed", -1, ("spec.training.seed", "greater than or equal to 0")),
    "ZeRO 4": Bad("spec.deepspeed.zeroStage", 4, ("spec.deepspeed.zeroStage", "0", "1", "2", "3")),
    "offload without ZeRO": Bad(
        "spec.deepspeed.offloadOptimizer", "CPU", ("spec.deepspeed", "needs `zeroStage` 1, 2 or 3")
    ),
    "parameters offloaded without ZeRO-3": Bad(
        "spec.deepspeed", {"zeroStage": 2, "offloadParameters": "CPU"}, ("spec.deepspeed", "needs `zeroStage: 3`")
    ),
    "unknown offload": Bad(
        "spec.deepspeed.offloadOptimizer", "Disk", ("spec.deepspeed.offloadOptimizer", "None", "CPU")
    ),
    "0 nodes": Bad("spec.trainer.numNodes", 0, ("spec.trainer.numNodes", "greater than or equal to 1")),
    "17 processes": Bad("spec.trainer.numProcPerNode", 17, ("spec.trainer.numProcPerNode", "less than or equal to 16")),
    "GPUs and processes differ": Bad(
        "spec.trainer.resourcesPerNode.limits", {"nvidia.com/gpu": 8}, ("spec.trainer", "must equal `numProcPerNode`")
    ),
    "no quantity": Bad(
        "spec.trainer.resourcesPerNode.limits.memory", "lots", ("limits", "positive Kubernetes quantity")
    ),
    "negative quantity": Bad(
        "spec.trainer.resourcesPerNode.limits.memory", "-1Gi", ("limits", "positive Kubernetes quantity")
    ),
    "requests above limits": Bad(
        "spec.trainer.resourcesPerNode.requests",
        {"memory": "8Gi"},
        ("spec.trainer.resourcesPerNode", "at most the same resource's"),
    ),
    "variable with a blank": Bad(
        "spec.trainer.env", [{"name": "A B", "value": "1"}], ("spec.trainer.env[0].name", "letters, digits")
    ),
    "variable without value": Bad(
        "spec.trainer.env", [{"name": "A"}], ("spec.trainer.env[0]", "`value` or `secretKeyRef`")
    ),
    "variable twice": Bad(
        "spec.trainer.env",
        [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}],
        ("spec.trainer.env[1]", "Duplicate value"),
    ),
    "unknown taint effect": Bad(
        "spec.trainer.tolerations",
        [{"key": "gpu", "effect": "Never"}],
        ("spec.trainer.tolerations[0].effect", "NoSchedule"),
    ),
    "checkpoint to a hub": Bad(
        "spec.checkpoint.uri", "hf://org/name", ("spec.checkpoint.uri", "where the trainer can write")
    ),
    "checkpoint every 0 steps": Bad(
        "spec.checkpoint.everySteps", 0, ("spec.checkpoint.everySteps", "greater than or equal to 1")
    ),
    "keep none": Bad("spec.checkpoint.keep", 0, ("spec.checkpoint.keep", "greater than or equal to 1")),
    "negative backoff limit": Bad(
        "spec.recovery.backoffLimit", -1, ("spec.recovery.backoffLimit", "greater than or equal to 0")
    ),
    "no output": Bad("spec.output", REMOVE, ("spec.output", "Required value")),
    "output to a hub": Bad("spec.output.uri", "hf://org/name", ("spec.output.uri", "where the trainer can write")),
    "merged adapter of a full run": Bad(
        "spec",
        {**{k: v for k, v in GOOD["spec"].items() if k != "adapter"}, "method": "Full"}
        | {"output": {"uri": "pvc://finetune/out", "mergeAdapter": True}},
        ("`output.mergeAdapter` is only for `method: LoRA`",),
    ),
    "shards without a unit": Bad("spec.output.maxShardSize", "5000", ("spec.output.maxShardSize", "such as `5GB`")),
    "background in words": Bad("spec.checkpoint.background", "maybe", ("spec.checkpoint.background", "type boolean")),
    "tracking without a project": Bad(
        "spec.tracking", {"wandb": {}}, ("spec.tracking.wandb.project", "Required value")
    ),
    "event files to a hub": Bad(
        "spec.tracking.tensorBoard.uri",
        "hf://org/name",
        ("spec.tracking.tensorBoard.uri", "where the trainer can write"),
    ),
    "event files inside the output": Bad(
        "spec.tracking.tensorBoard.uri", "pvc://finetune/out/runs", ("`tracking.tensorBoard.uri` must not be inside",)
    ),
    "traces inside the output": Bad(
        "spec.tracking.profiler.uri", "pvc://finetune/out/traces", ("`tracking.profiler.uri` must not be inside",)
    ),
    "cache inside the output": Bad("spec.cache.uri", "pvc://finetune/out/cache", ("`cache.uri` must not be inside",)),
    "a profile of no step": Bad(
        "spec.tracking.profiler", {"uri": "pvc://traces", "active": 0}, ("spec.tracking.profiler.active", "equal to 1")
    ),
    "deadline 0": Bad("spec.activeDeadlineSeconds", 0, ("spec.activeDeadlineSeconds", "greater than or equal to 1")),
    "deadline of a thousand years": Bad(
        "spec.activeDeadlineSeconds", 31536000000, ("spec.activeDeadlineSeconds", "less than or equal to 2147483647")
    ),
    "negative TTL": Bad(
        "spec.ttlSecondsAfterFinished", -1, ("spec.ttlSecondsAfterFinished", "greater than or equal to 0")
    ),
    "suspend in words": Bad("spec.suspend", "yes please", ("spec.suspend", "type boolean")),
    "unknown field": Bad("spec.training.batchSize", 4, ("unknown field", "spec.training.batchSize")),
    "misspelt block": Bad("spec.trainning", {}, ("unknown field", "spec.trainning")),
    "unknown chat template": Bad(
        "spec.model.chatTemplate", "vicuna", ("spec.model", "`chatTemplate` must be one of llama2,", "Jinja")
    ),
    "tags without turns": Bad(
        "spec.datasets.train.0",
        {"uri": "pvc://c/x", "format": "Alpaca", "tags": {"roleTag": "who"}},
        ("spec.datasets.train[0]", "`tags` needs `format: ShareGPT`"),
    ),
    "tags with Auto": Bad(
        "spec.datasets.train.0",
        {"uri": "pvc://c/x", "tags": {"roleTag": "who"}},
        ("spec.datasets.train[0]", "`tags` needs `format: ShareGPT`"),
    ),
    "columns of another format": Bad(
        "spec.datasets.train.0.columns",
        {"prompt": "question"},
        ("spec.datasets.train[0]", "which `format: ShareGPT` and `format: Messages` do not have"),
    ),
    "Alpaca has no messages": Bad(
        "spec.datasets.train.0",
        {"uri": "pvc://c/x", "format": "Alpaca", "columns": {"messages": "chat"}},
        ("spec.datasets.train[0]", "which `format: Alpaca` does not have"),
    ),
    "Text has one column": Bad(
        "spec.datasets.train.0",
        {"uri": "pvc://c/x", "format": "Text", "columns": {"text": "body", "system": "sys"}},
        ("spec.datasets.train[0]", "which `format: Text` does not have"),
    ),
    "unknown column": Bad(
        "spec.datasets.train.0.columns", {"answer": "x"}, ("unknown field", "spec.datasets.train[0].columns.answer")
    ),
    "weight on one of two": Bad(
        "spec.datasets.train",
        [{"uri": "pvc://c/x", "weight": "0.5"}, {"uri": "pvc://c/y"}],
        ("spec.datasets", "set `weight` on every data set in `train`, or on none"),
    ),
    "weight in evaluation": Bad(
        "spec.datasets.evaluation.0.weight", "0.5", ("spec.datasets", "`weight` is only for data sets in `train`")
    ),
    "weight 0": Bad(
        "spec.datasets.train.0.weight", "0", ("spec.datasets.train[0].weight", "must be a decimal number above 0")
    ),
    "unknown overlong": Bad(
        "spec.training.overlong", "Cut", ("spec.training.overlong", "Truncate", "TruncateShare", "Drop", "Split")
    ),
    "prompts and history": Bad(
        "spec.training",
        {"globalBatchSize": 8, "trainOnPrompt": True, "maskHistory": True},
        ("spec.training", "set `trainOnPrompt` or `maskHistory`, not both"),
    ),
    "packed and grouped": Bad(
        "spec.training",
        {"globalBatchSize": 8, "packing": True, "groupByLength": True},
        ("spec.training", "`groupByLength` is only for `packing: false`"),
    ),
    "images in texts": Bad(
        "spec.datasets.train.0",
        {"uri": "pvc://c/x", "format": "Text", "columns": {"text": "body", "images": "pictures"}},
        ("spec.datasets.train[0]", "which `format: Text` does not have"),
    ),
    "tower in words": Bad("spec.vision", {"freezeTower": "no"}, ("spec.vision.freezeTower", "type boolean")),
    "projector that does not learn": Bad(
        "spec.vision",
        {"projectorLearningRate": "0"},
        ("spec.vision.projectorLearningRate", "above 0 and at most 1"),
    ),
    "tower of a misspelt name": Bad(
        "spec.vision", {"freezeVisionTower": False}, ("unknown field", "spec.vision.freezeVisionTower")
    ),
    "no loader": Bad("spec.training.loaderWorkers", 0, ("spec.training.loaderWorkers", "greater than or equal to 1")),
    "name too long": Bad("metadata.name", "a" * 51, ("metadata.name", "at most 50")),
    "name begins with a digit": Bad("metadata.name", "7b-lora", ("metadata.name", "begin with a letter")),
    "freeze block for LoRA": Bad("spec.freeze", {}, ("`freeze` is only for `method: Freeze`",)),
    "nothing is unfrozen": Bad("spec.freeze", {"trainableLayers": 0}, ("spec.freeze", "needs `extraModules`")),
    "quantization for LoRA": Bad("spec.quantization", {"bits": 4}, ("`quantization` is only for `method: QLoRA`",)),
    "3 bits": Bad("spec.quantization", {"bits": 3}, ("spec.quantization.bits", "4", "8")),
    "unknown variant": Bad("spec.adapter.variant", "VeRA", ("spec.adapter.variant", "DoRA", "RSLoRA")),
    "LoRA+ below 1": Bad("spec.adapter.loraPlusRatio", "0.5", ("spec.adapter.loraPlusRatio", "from 1 to 1000")),
    "unknown optimizer": Bad("spec.training.optimizer", "Adafactor", ("spec.training.optimizer", "AdamW8bit")),
    "beta of 1": Bad("spec.training.adamBeta2", "1", ("spec.training.adamBeta2", "not including, 1")),
    "epsilon of 0": Bad("spec.training.adamEpsilon", "0", ("spec.training.adamEpsilon", "above 0")),
    "warm-up by share and by steps": Bad(
        "spec.training",
        {"warmupSteps": 5, "warmupRatio": "0.1", "globalBatchSize": 4},
        ("spec.training", "`warmupRatio` or `warmupSteps`, not both"),
    ),
    "everything that does not go together": Bad(
        "spec",
        {
            **GOOD["spec"],
            "method": "QLoRA",
            "adapter": {"variant": "DoRA"},
            "training": {"optimizer": "AdamW8bit", "activationCheckpointing": "SelectiveOp"},
            "deepspeed": {"zeroStage": 3, "offloadOptimizer": "CPU"},
        },
        (
            "`method: QLoRA` with `deepspeed.zeroStage: 3` is refused",
            "`adapter.variant: DoRA` with `deepspeed.zeroStage: 3` is refused",
            "`training.activationCheckpointing: SelectiveOp` with `deepspeed.zeroStage: 3` is refused",
            "`deepspeed.offloadOptimizer: CPU` with `training.optimizer: AdamW8bit",
        ),
    ),
    "parameters of other schedulers": Bad(
        "spec.training.schedulerParameters",
        {"numCycles": 2, "minLrRate": "0.1", "lrEnd": "1e-7", "power": "2", "timescale": 5, "numDecaySteps": 5},
        tuple(
            f"`schedulerParameters.{name}` is only for `scheduler:"
            for name in ("numCycles", "minLrRate", "lrEnd", "power", "timescale", "numDecaySteps")
        ),
    ),
    "DeepSpeed keys of fields": Bad(
        "spec.deepspeed.config",
        {
            **{
                key: {}
                for key in (
                    "activation_checkpointing",
                    "amp",
                    "bf16",
                    "bfloat16",
                    "data_types",
                    "fp16",
                    "optimizer",
                    "scheduler",
                )
            },
            **dict.fromkeys(["gradient_accumulation_steps", "train_batch_size", "train_micro_batch_size_per_gpu"], 8),
            "gradient_clipping": "1",
            "torch_autocast": {},
            "zero_optimization": {
                "compute_grad_norm": False,
                "cpu_offload": True,
                "cpu_offload_param": True,
                "legacy_stage1": True,
                "zenflow": {},
                "offload_optimizer": {"device": "cpu", "ratio": 0.5, "super_offload": True},
                "offload_param": {"device": "cpu", "nvme_path": "/nvme"},
            },
        },
        ("spec.deepspeed.config", "`train_batch_size` is decided by `training.globalBatchSize`"),
    ),
    "DeepSpeed stage in the raw block": Bad(
        "spec.deepspeed.config",
        {"zero_optimization": {"stage": 2}},
        ("spec.deepspeed.config", "`zero_optimization.stage` is decided by `deepspeed.zeroStage`"),
    ),
    "NVMe": Bad(
        "spec.deepspeed.config",
        {"zero_optimization": {"offload_optimizer": {"nvme_path": "/nvme"}}},
        ("spec.deepspeed.config", "`zero_optimization.offload_optimizer.nvme_path` is not supported"),
    ),
}
"""`evaluation without data` needs `evalEverySteps` as well: see `manifest`."""


def manifest(case: str) -> dict[str, Any]:
    """The broken manifest of one case."""
    bad = BAD[case]
    made = broken(bad.path, bad.value)
    if case == "evaluation without data":
        made["spec"]["training"]["evalEverySteps"] = 5
    return made


class Change(NamedTuple):
    """A change of a job that exists: blocks of the new spec, and what the refusal must name; nothing: it is taken."""

    new: dict[str, Any]
    says: tuple[str, ...] = ()
    suspended: bool = False
    """Whether the job was suspended before."""
    old: dict[str, Any] = {}
    """Laid over the old spec."""


def _another(name: str, value: Any) -> Change:
    return Change({name: value}, (f"`{name}` cannot be changed once the job exists", "`suspend`, `recovery`"))


_NOT_SUSPENDED = ("`trainer` can be changed only while the job is suspended", "`suspend: true` first")

CHANGES: dict[str, Change] = {
    **{
        f"another {name}": _another(name, value)
        for name, value in {
            "model": {"uri": "pvc://other/model"},
            "datasets": {"train": [{"uri": "pvc://other/data"}]},
            "method": "QLoRA",
            "adapter": {"rank": 16},
            "training": {"seed": 7},
            "deepspeed": {"zeroStage": 3},
            "checkpoint": {"everySteps": 7},
            "output": {"uri": "pvc://other/out"},
            "cache": {"uri": "pvc://other/cache"},
            "managedBy": "example.com/other",
            "freeze": {},
            "quantization": {"bits": 8},
            "tracking": {"wandb": {"project": "other"}},
            "evaluation": {"metric": "EvalLoss"},
            "vision": {"freezeTower": False},
        }.items()
    },
    "another model while suspended": _another("model", {"uri": "pvc://other/model"})._replace(suspended=True),
    "what may always change": Change(
        {"recovery": {"backoffLimit": 9}, "ttlSecondsAfterFinished": 60, "activeDeadlineSeconds": 600, "suspend": True}
    ),
    "trainer of a job that runs": Change({"trainer": {"numNodes": 1}}, _NOT_SUSPENDED),
    "trainer and suspend at once": Change({"trainer": {"numNodes": 1}, "suspend": True}, _NOT_SUSPENDED),
    "trainer while suspended": Change({"trainer": {"numNodes": 1, "numProcPerNode": 4}}, suspended=True),
    "trainer and resumed at once": Change({"trainer": {"numNodes": 1}, "suspend": False}, suspended=True),
    "trainer with its defaults written out": Change({"trainer": {"numNodes": 2, "numProcPerNode": 1}}),
    "other ranks with an 8-bit optimizer": Change(
        {"trainer": {"numNodes": 1}},
        ("`training.optimizer: AdamW8bit/PagedAdamW8bit`", "quantised in blocks"),
        suspended=True,
        old={"training": {"optimizer": "AdamW8bit"}},
    ),
    "other nodes with an 8-bit optimizer": Change(
        {"trainer": {"numNodes": 1, "numProcPerNode": 2, "nodeSelector": {"gpu": "h100"}}},
        suspended=True,
        old={"training": {"optimizer": "AdamW8bit"}},
    ),
    "ranks that do not divide": Change(
        {"trainer": {"numNodes": 3}}, ("`training.globalBatchSize` must be a multiple of",), suspended=True
    ),
    "GPUs and processes differ": Change(
        {"trainer": {"resourcesPerNode": {"limits": {"nvidia.com/gpu": 2}}}},
        ("spec.trainer", "must equal `numProcPerNode`"),
        suspended=True,
    ),
}


def before(change: Change) -> dict[str, Any]:
    """The job before a change, as it was written. No operator touches it."""
    spec = _merged({**GOOD["spec"], "suspend": change.suspended, "managedBy": "example.com/nobody"}, change.old)
    return {**GOOD, "metadata": {"name": "changed"}, "spec": spec}


def after(change: Change) -> dict[str, Any]:
    """And with the change, as a merge patch makes it."""
    old = before(change)
    return {**old, "spec": _merged(old["spec"], change.new)}


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(old[key], value) if isinstance(value, dict) and isinstance(old.get(key), dict) else value
        for key, value in new.items()
    }
    return {**old, **both}
