"""The converted job's effective values, as the trainer gets them, equal LLaMA-Factory's."""

from functools import cache
from itertools import product
from typing import Any

import pytest
import yaml

from finetune_api import combinations
from finetune_api.job import FineTuneJob
from finetune_api.launch import LaunchSpec
from finetune_operator.core.resolve import resolve
from finetune_operator.core.settings import PlanConfig
from finetune_operator.local import admission
from tests.convert.golden import CASES, NAMES
from tests.convert.test_keys import BASE, convert_values

CONVERTED = [name for name in NAMES if (CASES / f"{name}.expected.yaml").exists()]


@cache
def job(name: str) -> FineTuneJob:
    return FineTuneJob.from_object(yaml.safe_load((CASES / f"{name}.expected.yaml").read_text()))


def launch(name: str) -> LaunchSpec:
    return resolve(job(name), 1, PlanConfig(trainer_image="trainer:1")).launch


def value(name: str, path: str) -> Any:
    """A value of a case's LaunchSpec, in the words of its JSON."""
    found: Any = launch(name).to_wire()
    for part in path.split("."):
        found = found[int(part)] if part.isdigit() else found.get(part)
        if found is None:
            return None
    return found


@pytest.mark.parametrize("name", CONVERTED)
def test_every_manifest_is_admitted(name: str) -> None:
    _, violations = admission.admit(yaml.safe_load((CASES / f"{name}.expected.yaml").read_text()))
    assert [str(violation) for violation in violations] == []
    assert launch(name).job.name == job(name).metadata.name


COMBINATIONS = {
    "finetuning_type": ("lora", "full", "freeze"),
    "quantization_bit": (None, 4),
    "use_dora": (False, True),
    "deepspeed": tuple(
        {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": device}}}
        for stage in (0, 2, 3)
        for device in ("none", "cpu")
    ),
    "optim": ("adamw_torch", "paged_adamw_8bit"),
    "use_cpu": (False, True),
    "use_unsloth_gc": (False, True),
}


def test_no_combination_is_converted_that_a_job_refuses() -> None:
    converted = 0
    for values in product(*COMBINATIONS.values()):
        given = BASE | {k: v for k, v in zip(COMBINATIONS, values, strict=True) if v is not None}
        body = convert_values(given).body
        if body is None:
            continue
        converted += 1
        spec = FineTuneJob.from_object(body).spec
        chosen = combinations.Combination(
            method=spec.method,
            variant=spec.adapter.variant if spec.adapter else "LoRA",
            zero_stage=spec.deepspeed.zero_stage,
            offload_optimizer=spec.deepspeed.offload_optimizer,
            offload_parameters=spec.deepspeed.offload_parameters,
            precision=spec.training.precision,
            optimizer=spec.training.optimizer,
            activation_checkpointing=spec.training.activation_checkpointing,
        )
        assert combinations.check(chosen) is None, values
    assert converted > 100


DEFAULTS = [
    ("finetuning_type", "lora", "method", "LoRA"),
    ("stage", "sft", "train.0.format", "Alpaca"),
    ("lora_rank", 8, "adapter.rank", 8),
    ("lora_alpha", "2 x lora_rank", "adapter.alpha", 16),
    ("lora_dropout", 0.0, "adapter.dropout", 0.0),
    ("lora_target", "all", "adapter.targetModules", ["All"]),
    ("use_dora, use_rslora", False, "adapter.variant", "LoRA"),
    ("loraplus_lr_ratio", None, "adapter.loraPlusRatio", None),
    ("quantization_bit", None, "quantization", None),
    ("template", None, "model.chatTemplate", None),
    ("cutoff_len", 2048, "training.maxLength", 2048),
    ("cutoff_len", "by share", "training.overlong", "TruncateShare"),
    ("packing", None, "training.packing", False),
    ("train_on_prompt", False, "training.trainOnPrompt", False),
    ("mask_history", False, "training.maskHistory", False),
    ("group_by_length", False, "training.groupByLength", False),
    ("mix_strategy", "concat", "train.0.weight", None),
    ("max_samples", None, "train.0.maxSamples", None),
    ("eval_dataset", None, "evaluation", []),
    ("per_device_train_batch_size", 8, "training.microBatchSize", 8),
    ("gradient_accumulation_steps", 1, "training.gradientAccumulationSteps", 1),
    ("per_device_train_batch_size x world size", 8, "training.globalBatchSize", 8),
    ("num_train_epochs", 3.0, "training.epochs", 3),
    ("max_steps", -1, "training.maxSteps", None),
    ("learning_rate", 5e-5, "training.learningRate", 5e-5),
    ("lr_scheduler_type", "linear", "training.scheduler", "Linear"),
    ("warmup_ratio", 0.0, "training.warmupRatio", 0.0),
    ("warmup_steps", 0, "training.warmupSteps", None),
    ("optim", "adamw_torch", "training.optimizer", "AdamW"),
    ("weight_decay", 0.0, "training.weightDecay", 0.0),
    ("adam_beta1", 0.9, "training.adamBeta1", 0.9),
    ("adam_beta2", 0.999, "training.adamBeta2", 0.999),
    ("adam_epsilon", 1e-8, "training.adamEpsilon", 1e-8),
    ("max_grad_norm", 1.0, "training.maxGradNorm", 1.0),
    ("seed", 42, "training.seed", 42),
    ("bf16, fp16", "the model's type", "training.precision", "BF16"),
    ("disable_gradient_checkpointing", False, "training.activationCheckpointing", "Full"),
    ("flash_attn", "auto", "training.attention", "Auto"),
    ("enable_liger_kernel", False, "training.ligerKernel", False),
    ("torch_compile", False, "training.compile", False),
    ("eval_strategy", "no", "training.evalEverySteps", None),
    ("deepspeed", None, "deepspeed.zeroStage", 0),
    ("deepspeed", None, "deepspeed.offloadOptimizer", "None"),
    ("deepspeed", None, "deepspeed.offloadParameters", "None"),
    ("deepspeed", None, "deepspeed.config", None),
    ("save_steps", 500, "checkpoint.everySteps", 500),
    ("save_total_limit", "all", "checkpoint.keep", 100),
    ("report_to", "none", "tracking", None),
]
"""LLaMA-Factory's key, its documented default, the trainer's value for a file that sets nothing, and what that has to be."""


@pytest.mark.parametrize(("key", "default", "path", "expected"), DEFAULTS, ids=[f"{d[0]}-{d[2]}" for d in DEFAULTS])
def test_defaults(key: str, default: Any, path: str, expected: Any) -> None:
    assert value("minimal", path) in (expected, {} if expected is None else expected)


EFFECTS = [
    ("llama2-70b-full", "finetuning_type", "method", "Full"),
    ("llama2-70b-full", "finetuning_type", "adapter", None),
    ("llama2-70b-full", "learning_rate", "training.learningRate", 1e-5),
    ("llama2-70b-full", "num_train_epochs", "training.epochs", 1),
    ("llama2-70b-full", "wandb_run_name", "tracking.wandb.runName", "full"),
    ("llama2-70b-lora-r8", "lora_rank", "adapter.rank", 8),
    ("llama2-70b-lora-r8", "lora_alpha", "adapter.alpha", 16),
    ("llama2-70b-lora-r8", "lora_target", "adapter.targetModules", ["q_proj", "v_proj"]),
    ("llama2-70b-lora-r8", "deepspeed", "deepspeed.zeroStage", 0),
    ("llama2-70b-lora-zero3", "model_name_or_path", "model.source.repoId", "meta-llama/Llama-2-70b-hf"),
    ("llama2-70b-lora-zero3", "template", "model.chatTemplate", "llama2"),
    ("llama2-70b-lora-zero3", "dataset", "train.0.source.path", "/mnt/pvc/data/sets/alpaca_en_demo.json"),
    ("llama2-70b-lora-zero3", "cutoff_len", "training.maxLength", 2048),
    ("llama2-70b-lora-zero3", "output_dir", "outputDir", "/mnt/pvc/data/runs/saves/llama2-70b/lora/sft"),
    ("llama2-70b-lora-zero3", "lora_rank", "adapter.rank", 64),
    ("llama2-70b-lora-zero3", "lora_alpha", "adapter.alpha", 128),
    ("llama2-70b-lora-zero3", "lora_dropout", "adapter.dropout", 0.05),
    ("llama2-70b-lora-zero3", "lora_target", "adapter.targetModules", ["All"]),
    ("llama2-70b-lora-zero3", "per_device_train_batch_size", "training.microBatchSize", 2),
    ("llama2-70b-lora-zero3", "gradient_accumulation_steps", "training.gradientAccumulationSteps", 8),
    ("llama2-70b-lora-zero3", "gradient_accumulation_steps", "training.globalBatchSize", 2 * 8 * 8),
    ("llama2-70b-lora-zero3", "learning_rate", "training.learningRate", 1e-4),
    ("llama2-70b-lora-zero3", "num_train_epochs", "training.epochs", 3),
    ("llama2-70b-lora-zero3", "lr_scheduler_type", "training.scheduler", "Cosine"),
    ("llama2-70b-lora-zero3", "warmup_ratio", "training.warmupRatio", 0.1),
    ("llama2-70b-lora-zero3", "bf16", "training.precision", "BF16"),
    ("llama2-70b-lora-zero3", "flash_attn", "training.attention", "FlashAttention2"),
    ("llama2-70b-lora-zero3", "enable_liger_kernel", "training.ligerKernel", True),
    ("llama2-70b-lora-zero3", "deepspeed_config.stage", "deepspeed.zeroStage", 3),
    ("llama2-70b-lora-zero3", "deepspeed_config.cpu_offload", "deepspeed.offloadOptimizer", "CPU"),
    (
        "llama2-70b-lora-zero3",
        "deepspeed_config.memory_efficient_linear",
        "deepspeed.config.zero_optimization.memory_efficient_linear",
        True,
    ),
    ("llama2-70b-lora-zero3", "use_wandb", "tracking.wandb.tokenFile", "/etc/finetune-secrets/1/token"),
    ("llama2-70b-lora-zero3", "wandb_project", "tracking.wandb.project", "llama2-70b"),
    ("llama2-70b-lora-zero3", "wandb_run_name", "tracking.wandb.runName", "lora-r64-zero3"),
    ("codellama-34b", "model_name_or_path", "model.source.repoId", "codellama/CodeLlama-34b-Python-hf"),
    ("codellama-34b", "template", "model.chatTemplate", "codellama"),
    ("codellama-34b", "cutoff_len", "training.maxLength", 4096),
    ("codellama-34b", "lora_rank", "adapter.rank", 128),
    ("codellama-34b", "lora_alpha", "adapter.alpha", 256),
    ("codellama-34b", "learning_rate", "training.learningRate", 1e-4),
    ("codellama-34b", "flash_attn", "training.attention", "FlashAttention2"),
    ("codellama-34b", "enable_liger_kernel", "training.ligerKernel", True),
    ("codellama-34b", "pure_bf16", "training.precision", "PureBF16"),
    ("codellama-34b", "eval_dataset", "benchmarks.0.benchmark", "HumanEval"),
    ("codellama-34b", "eval_dataset", "benchmarks.1.benchmark", "MBPP"),
    ("codellama-34b", "eval_steps", "training.evalEverySteps", 200),
    ("codellama-34b", "save_steps", "checkpoint.everySteps", 200),
    ("codellama-34b", "save_total_limit", "checkpoint.keep", 3),
    ("codellama-34b", "dataset", "train.0.columns.prompt", "question"),
    ("llava-13b", "freeze_vision_tower", "vision.freezeTower", False),
    ("llava-13b", "mm_projector_lr", "vision.projectorLearningRate", 2e-5),
    ("llava-13b", "freeze_multi_modal_projector", "vision.projectorLearningRate", 2e-5),
    ("llava-13b", "dataset", "train.0.columns.images", "images"),
    ("llava-13b", "template", "model.chatTemplate", "llava"),
    ("llava-13b", "lora_rank", "adapter.rank", 64),
    ("llava-13b", "lora_alpha", "adapter.alpha", 128),
    (
        "llava-13b",
        "lora_target",
        "adapter.targetModules",
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
    ("llava-13b", "cutoff_len", "training.maxLength", 2048),
    ("llava-13b", "max_samples", "train.0.maxSamples", 100000),
    ("llava-13b", "flash_attn", "training.attention", "FlashAttention2"),
    ("llava-13b", "gradient_checkpointing", "training.activationCheckpointing", "Full"),
    ("llava-13b", "bf16", "training.precision", "BF16"),
    ("llava-13b", "dataloader_num_workers", "training.loaderWorkers", 8),
    ("qlora-4bit", "quantization_bit", "quantization.bits", 4),
    ("qlora-4bit", "double_quantization", "quantization.doubleQuantization", False),
    ("qlora-4bit", "optim", "training.optimizer", "PagedAdamW8bit"),
    ("dora-loraplus", "use_dora", "adapter.variant", "DoRA"),
    ("dora-loraplus", "loraplus_lr_ratio", "adapter.loraPlusRatio", 16.0),
    ("freeze", "freeze_trainable_layers", "freeze.trainableLayers", -4),
    ("mixing", "interleave_probs", "train.2.weight", 0.2),
    ("data-formats", "tags", "train.3.tags.userTag", "user"),
    ("pretrain", "stage", "train.0.format", "Text"),
    ("pretrain", "stage", "training.overlong", "Split"),
    ("float32-on-cpu", "use_cpu", "training.precision", "FP32"),
    ("deepspeed-zero3", "deepspeed", "deepspeed.config.zero_optimization.sub_group_size", 1000000000),
    ("deepspeed-offload", "deepspeed", "deepspeed.offloadParameters", "CPU"),
    ("deepspeed-offload", "deepspeed", "deepspeed.config.zero_optimization.zero_hpz_partition_size", 8),
    ("scheduler-restarts", "lr_scheduler_kwargs", "training.schedulerParameters.numCycles", 4),
    ("scheduler-restarts", "warmup_steps", "training.warmupSteps", 100),
    ("scheduler-min-lr", "lr_scheduler_kwargs", "training.schedulerParameters.minLrRate", 0.1),
    ("scheduler-constant", "lr_scheduler_type", "training.warmupRatio", 0.0),
    ("scheduler-constant", "save_steps", "checkpoint.everySteps", 50),
    ("benchmarks", "temperature", "generation.temperature", 0.2),
    ("recomputation-offloaded", "use_unsloth_gc", "training.activationCheckpointing", "FullOffload"),
]
"""Case, key of LLaMA-Factory, the trainer's value, and what it has to be."""


@pytest.mark.parametrize(("name", "key", "path", "expected"), EFFECTS, ids=["-".join(effect[:3]) for effect in EFFECTS])
def test_effects(name: str, key: str, path: str, expected: Any) -> None:
    assert value(name, path) == expected
