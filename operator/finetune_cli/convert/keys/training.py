"""Keys of transformers' training arguments (its releases 4 and 5) that have a counterpart."""

from finetune_cli.convert.table import Key, Kind, translated

STRATEGIES = ("no", "steps", "epoch")
_BATCH = "per device x accumulation x `--num-nodes` x `--num-proc-per-node`"

BATCH: tuple[Key, ...] = (
    translated(
        "output_dir",
        Kind.TEXT,
        None,
        "output.uri, checkpoint.uri",
        "below `--output-uri`; the file's name, or this one, names the job",
    ),
    translated(
        "overwrite_output_dir", Kind.BOOL, False, "output.uri", "a job replaces its own earlier result, no other's"
    ),
    translated("do_train", Kind.BOOL, False, "the job", "false is refused: a job trains"),
    translated(
        "per_device_train_batch_size", Kind.INT, 8, "training.microBatchSize, training.globalBatchSize", _BATCH, least=1
    ),
    translated("gradient_accumulation_steps", Kind.INT, 1, "training.globalBatchSize", _BATCH, least=1),
    translated("num_train_epochs", Kind.FLOAT, 3.0, "training.epochs", "whole numbers", least=0),
    translated("max_steps", Kind.INT, -1, "training.maxSteps", "above 0; it then counts instead of epochs"),
    translated("seed", Kind.INT, 42, "training.seed", least=0, most=4294967295),
    translated("data_seed", Kind.INT, None, "training.seed", "only if it equals `seed`"),
    translated(
        "use_cpu", Kind.BOOL, False, "trainer.resourcesPerNode, training.precision", "true: no GPUs, FP32 unless `bf16`"
    ),
    translated(
        "no_cuda", Kind.BOOL, False, "trainer.resourcesPerNode, training.precision", "the old name of `use_cpu`"
    ),
    translated("dataloader_num_workers", Kind.INT, 0, "training.loaderWorkers", least=0),
    translated("group_by_length", Kind.BOOL, False, "training.groupByLength"),
    translated(
        "train_sampling_strategy",
        Kind.TEXT,
        "random",
        "training.groupByLength",
        "random, or group_by_length; sequential is refused",
        choices=("random", "sequential", "group_by_length"),
    ),
)

OPTIMIZATION: tuple[Key, ...] = (
    translated("learning_rate", Kind.FLOAT, 5e-5, "training.learningRate", least=1e-12, most=1),
    translated(
        "lr_scheduler_type",
        Kind.TEXT,
        "linear",
        "training.scheduler",
        "constant has no warm-up in transformers: it becomes Constant with warm-up 0",
    ),
    translated("lr_scheduler_kwargs", Kind.MAP, None, "training.schedulerParameters"),
    translated(
        "warmup_steps", Kind.FLOAT, 0, "training.warmupSteps", "below 1 it is a share: training.warmupRatio", least=0
    ),
    translated(
        "warmup_ratio", Kind.FLOAT, 0.0, "training.warmupRatio", "transformers 4; `warmup_steps` wins", least=0, most=1
    ),
    translated(
        "optim",
        Kind.TEXT,
        "adamw_torch",
        "training.optimizer",
        "adamw_torch, adamw_torch_fused, adamw_hf: AdamW; adamw_bnb_8bit, adamw_8bit: AdamW8bit; paged_adamw_32bit: PagedAdamW;"
        " paged_adamw_8bit: PagedAdamW8bit; others are refused",
    ),
    translated("weight_decay", Kind.FLOAT, 0.0, "training.weightDecay", least=0, most=0.999),
    translated("adam_beta1", Kind.FLOAT, 0.9, "training.adamBeta1", least=0, most=0.999999),
    translated("adam_beta2", Kind.FLOAT, 0.999, "training.adamBeta2", least=0, most=0.999999),
    translated("adam_epsilon", Kind.FLOAT, 1e-8, "training.adamEpsilon", least=0, most=1),
    translated("max_grad_norm", Kind.FLOAT, 1.0, "training.maxGradNorm", least=0),
)

COMPUTE: tuple[Key, ...] = (
    translated(
        "bf16",
        Kind.BOOL,
        False,
        "training.precision",
        "true: BF16. Neither bf16 nor fp16: BF16 too, with a note, since LLaMA-Factory takes the model's bfloat16",
    ),
    translated("gradient_checkpointing", Kind.BOOL, None, "training.activationCheckpointing", "true: Full"),
    translated("activation_checkpointing", Kind.BOOL, None, "training.activationCheckpointing", "true: Full"),
    translated("use_liger_kernel", Kind.BOOL, False, "training.ligerKernel"),
    translated("torch_compile", Kind.BOOL, False, "training.compile", "decoder layer by decoder layer"),
    translated(
        "deepspeed", Kind.ANY, None, "deepspeed", "the file is read; a mapping is taken as it is; absent: stage 0"
    ),
)

EVALUATION: tuple[Key, ...] = (
    translated("do_eval", Kind.BOOL, False, "datasets.evaluation", "evaluation sets are always evaluated at the end"),
    translated(
        "eval_strategy", Kind.TEXT, "no", "training.evalEverySteps", "steps; no; epoch is refused", choices=STRATEGIES
    ),
    translated(
        "evaluation_strategy",
        Kind.TEXT,
        "no",
        "training.evalEverySteps",
        "the old name of `eval_strategy`",
        choices=STRATEGIES,
        known=False,
    ),
    translated("eval_steps", Kind.FLOAT, None, "training.evalEverySteps", "absent: `logging_steps`", least=0),
    translated(
        "logging_steps",
        Kind.FLOAT,
        500,
        "training.evalEverySteps",
        "only where `eval_steps` is absent",
        least=0,
    ),
    translated("load_best_model_at_end", Kind.BOOL, False, "evaluation.exportBest, evaluation.metric"),
    translated("metric_for_best_model", Kind.TEXT, None, "evaluation.metric", "absent: the loss"),
    translated("greater_is_better", Kind.BOOL, None, "evaluation.metric", "only as the metric has it"),
)

SAVING: tuple[Key, ...] = (
    translated("save_steps", Kind.FLOAT, 500, "checkpoint.everySteps", least=0),
    translated(
        "save_strategy",
        Kind.TEXT,
        "steps",
        "checkpoint.everySteps",
        "checkpoints serve recovery and are always written: no, epoch and best keep `save_steps`, with a note",
        choices=("no", "steps", "epoch", "best"),
    ),
    translated("save_total_limit", Kind.INT, None, "checkpoint.keep", "absent: 100, the most that there is", least=0),
)

TRACKING: tuple[Key, ...] = (
    translated(
        "report_to",
        Kind.NAMES,
        "none",
        "tracking",
        "wandb and tensorboard; others are refused (`all` too)",
    ),
    translated("run_name", Kind.TEXT, None, "tracking.wandb.runName"),
    translated("project", Kind.TEXT, "huggingface", "tracking.wandb.project"),
    translated("logging_dir", Kind.TEXT, None, "tracking.tensorBoard.uri", "below `--output-uri`"),
)
