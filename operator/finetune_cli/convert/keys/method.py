"""Keys of LLaMA-Factory's fine-tuning arguments: stage, method, adapters, and the methods that are not there."""

from finetune_cli.convert.table import Key, Kind, no_effect, parts, refused, translated

_ADAMW = "`optim: adamw_torch`, or `optim: adamw_bnb_8bit` for less memory"
_SFT = "`stage: sft` on the preferred answers"
_LOSS = "the loss is the mean cross-entropy over target tokens"

METHOD: tuple[Key, ...] = (
    translated(
        "stage",
        Kind.TEXT,
        "sft",
        "datasets.*[].format",
        "sft; pt: format Text; rm, ppo, dpo and kto are refused",
        choices=("pt", "sft", "rm", "ppo", "dpo", "kto"),
    ),
    translated(
        "finetuning_type",
        Kind.TEXT,
        "lora",
        "method",
        "lora: LoRA (QLoRA with `quantization_bit`), freeze: Freeze, full: Full; oft is refused",
        choices=("lora", "oft", "freeze", "full"),
    ),
    translated("pure_bf16", Kind.BOOL, False, "training.precision", "true: PureBF16"),
    translated(
        "freeze_vision_tower",
        Kind.BOOL,
        True,
        "vision.freezeTower",
        "for models that see images; false is refused with `finetuning_type: lora`, unless `mm_projector_lr` is there",
    ),
    translated(
        "freeze_multi_modal_projector",
        Kind.BOOL,
        True,
        "vision.projectorLearningRate",
        "true: absent, the projector is frozen; false: `mm_projector_lr`, else `learning_rate`, and with lora no effect",
    ),
    translated(
        "early_stopping_steps",
        Kind.INT,
        None,
        "evaluation.earlyStoppingPatience",
        "evaluations without improvement, as LLaMA-Factory counts them",
        least=1,
        most=1000,
    ),
    refused(
        "freeze_language_model",
        Kind.BOOL,
        False,
        "training the vision tower or the projector alone is not supported",
        "`finetuning_type: lora`, which leaves the language model's weights as they are",
    ),
    no_effect("compute_accuracy", Kind.BOOL, False, "token accuracy is always measured at evaluation"),
    no_effect(
        "plot_loss",
        Kind.BOOL,
        False,
        "the loss is in status, in Prometheus and, with `tracking`, in TensorBoard or W&B",
    ),
    no_effect("include_effective_tokens_per_second", Kind.BOOL, False, "tokens per second are always reported"),
    refused(
        "disable_shuffling",
        Kind.BOOL,
        False,
        "the order of records is a random one that `seed` decides",
        "remove the line",
    ),
    refused(
        "use_llama_pro", Kind.BOOL, False, "expanded blocks (LLaMA Pro) are not supported", "`finetuning_type: freeze`"
    ),
    refused("use_adam_mini", Kind.BOOL, False, "Adam-mini is not supported", _ADAMW),
    refused("use_muon", Kind.BOOL, False, "Muon is not supported", _ADAMW),
    refused("use_dft_loss", Kind.BOOL, False, f"{_LOSS}; DFT is not supported", "remove the line"),
    refused("use_asft_loss", Kind.BOOL, False, f"{_LOSS}; ASFT is not supported", "remove the line"),
    *parts("use_asft_loss", "it is for ASFT", ("asft_alpha", Kind.FLOAT, 0.1)),
    refused("use_eaft_loss", Kind.BOOL, False, f"{_LOSS}; EAFT is not supported", "remove the line"),
    *parts("use_eaft_loss", "it is for EAFT", ("eaft_alpha", Kind.FLOAT, 1.0)),
    refused("use_mca", Kind.BOOL, False, "Megatron is not supported", "`deepspeed` with stage 3"),
    refused("use_megatron_bridge", Kind.BOOL, False, "Megatron is not supported", "`deepspeed` with stage 3"),
    refused("use_hyper_parallel", Kind.BOOL, False, "HyperParallel is not supported", "`deepspeed` with stage 3"),
    *parts(
        "use_hyper_parallel",
        "it is for HyperParallel",
        ("hyper_parallel_args", Kind.TEXT, None),
        ("hyper_parallel_cp_size", Kind.INT, 1),
    ),
)

FREEZE: tuple[Key, ...] = (
    translated(
        "freeze_trainable_layers",
        Kind.INT,
        2,
        "freeze.trainableLayers",
        "the last n layers, the first n if it is negative",
    ),
    translated("freeze_trainable_modules", Kind.NAMES, "all", "freeze.trainableModules", "all: All"),
    translated("freeze_extra_modules", Kind.NAMES, None, "freeze.extraModules"),
)

LORA: tuple[Key, ...] = (
    translated("lora_rank", Kind.INT, 8, "adapter.rank", least=1, most=1024),
    translated("lora_alpha", Kind.INT, None, "adapter.alpha", "absent: 2 x rank", least=1, most=4096),
    translated("lora_dropout", Kind.FLOAT, 0.0, "adapter.dropout", least=0, most=0.999),
    translated("lora_target", Kind.NAMES, "all", "adapter.targetModules", "all: All, every linear layer but the head"),
    translated("use_rslora", Kind.BOOL, False, "adapter.variant", "true: RSLoRA"),
    translated("use_dora", Kind.BOOL, False, "adapter.variant", "true: DoRA"),
    translated("loraplus_lr_ratio", Kind.FLOAT, None, "adapter.loraPlusRatio", least=1, most=1000),
    no_effect("loraplus_lr_embedding", Kind.FLOAT, 1e-6, "embeddings get no adapter, so nothing learns at this rate"),
    refused(
        "additional_target",
        Kind.NAMES,
        None,
        "whole modules beside the adapter are not trained",
        "`finetuning_type: freeze` with `freeze_extra_modules`, or an adapter on those layers by `lora_target`",
    ),
    refused("pissa_init", Kind.BOOL, False, "PiSSA is not supported", "`use_dora: true` or `use_rslora: true`"),
    *parts("pissa_init", "it is for PiSSA", ("pissa_iter", Kind.INT, 16), ("pissa_convert", Kind.BOOL, False)),
    no_effect("create_new_adapter", Kind.BOOL, False, "a job always starts with a new adapter"),
    *(
        no_effect(name, kind, default, "it is for `finetuning_type: oft`, which is refused")
        for name, kind, default in (
            ("module_dropout", Kind.FLOAT, 0.0),
            ("oft_rank", Kind.INT, 0),
            ("oft_block_size", Kind.INT, 32),
            ("oft_target", Kind.NAMES, "all"),
        )
    ),
)

_PREFERENCE = "it is for preference training (`stage` dpo, kto, rm or ppo), which is refused"
PREFERENCE: tuple[Key, ...] = tuple(
    no_effect(name, kind, default, _PREFERENCE)
    for name, kind, default in (
        ("pref_beta", Kind.FLOAT, 0.1),
        ("pref_ftx", Kind.FLOAT, 0.0),
        ("pref_bco_weight", Kind.FLOAT, 0.0),
        ("pref_loss", Kind.TEXT, "sigmoid"),
        ("dpo_label_smoothing", Kind.FLOAT, 0.0),
        ("kto_chosen_weight", Kind.FLOAT, 1.0),
        ("kto_rejected_weight", Kind.FLOAT, 1.0),
        ("simpo_gamma", Kind.FLOAT, 0.5),
        ("ppo_buffer_size", Kind.INT, 1),
        ("ppo_epochs", Kind.INT, 4),
        ("ppo_score_norm", Kind.BOOL, False),
        ("ppo_target", Kind.FLOAT, 6.0),
        ("ppo_whiten_rewards", Kind.BOOL, False),
        ("ref_model", Kind.TEXT, None),
        ("ref_model_adapters", Kind.TEXT, None),
        ("ref_model_quantization_bit", Kind.INT, None),
        ("reward_model", Kind.TEXT, None),
        ("reward_model_adapters", Kind.TEXT, None),
        ("reward_model_quantization_bit", Kind.INT, None),
        ("reward_model_type", Kind.TEXT, "lora"),
        ("ld_alpha", Kind.FLOAT, None),
    )
)

OPTIMIZERS: tuple[Key, ...] = (
    refused(
        "use_galore", Kind.BOOL, False, "GaLore is not supported", f"`finetuning_type: lora`, or full with {_ADAMW}"
    ),
    *parts(
        "use_galore",
        "it is for GaLore",
        ("galore_target", Kind.NAMES, "all"),
        ("galore_rank", Kind.INT, 16),
        ("galore_update_interval", Kind.INT, 200),
        ("galore_scale", Kind.FLOAT, 2.0),
        ("galore_proj_type", Kind.TEXT, "std"),
        ("galore_layerwise", Kind.BOOL, False),
    ),
    refused(
        "use_apollo", Kind.BOOL, False, "APOLLO is not supported", f"`finetuning_type: lora`, or full with {_ADAMW}"
    ),
    *parts(
        "use_apollo",
        "it is for APOLLO",
        ("apollo_target", Kind.NAMES, "all"),
        ("apollo_rank", Kind.INT, 16),
        ("apollo_update_interval", Kind.INT, 200),
        ("apollo_scale", Kind.FLOAT, 32.0),
        ("apollo_proj", Kind.TEXT, "random"),
        ("apollo_proj_type", Kind.TEXT, "std"),
        ("apollo_scale_type", Kind.TEXT, "channel"),
        ("apollo_layerwise", Kind.BOOL, False),
        ("apollo_scale_front", Kind.BOOL, False),
    ),
    refused(
        "use_badam", Kind.BOOL, False, "BAdam is not supported", f"`finetuning_type: freeze`, or full with {_ADAMW}"
    ),
    *parts(
        "use_badam",
        "it is for BAdam",
        ("badam_mode", Kind.TEXT, "layer"),
        ("badam_start_block", Kind.INT, None),
        ("badam_switch_mode", Kind.TEXT, "ascending"),
        ("badam_switch_interval", Kind.INT, 50),
        ("badam_update_ratio", Kind.FLOAT, 0.05),
        ("badam_mask_mode", Kind.TEXT, "adjacent"),
        ("badam_verbose", Kind.INT, 0),
    ),
)

SWANLAB: tuple[Key, ...] = (
    refused(
        "use_swanlab", Kind.BOOL, False, "SwanLab is not supported", "`report_to: wandb` or `report_to: tensorboard`"
    ),
    *parts(
        "use_swanlab",
        "it is for SwanLab",
        ("swanlab_project", Kind.TEXT, "llamafactory"),
        ("swanlab_workspace", Kind.TEXT, None),
        ("swanlab_run_name", Kind.TEXT, None),
        ("swanlab_mode", Kind.TEXT, "cloud"),
        ("swanlab_api_key", Kind.TEXT, None),
        ("swanlab_logdir", Kind.TEXT, None),
        ("swanlab_lark_webhook_url", Kind.TEXT, None),
        ("swanlab_lark_secret", Kind.TEXT, None),
    ),
)
