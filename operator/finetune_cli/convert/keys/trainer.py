"""Keys of transformers' training arguments that cannot have an effect here, or ask for what is not there."""

from finetune_cli.convert.table import Key, Kind, no_effect, parts, refused

_LOGGING = "how often a line is logged is the trainer's own matter; status and metrics have the newest step"
_DDP = "ranks are DeepSpeed's, not DistributedDataParallel's"
_LOADER = "the loaders are the trainer's own; order and result do not depend on it"
_EVAL_LOSS = "it changes how evaluation computes, not the loss that it measures"
_RESUME = "a job resumes exactly from its own newest checkpoint"
_OLD = "transformers itself no longer has it"
_FSDP = "`deepspeed` with stage 3, which partitions the same"
_UPLOAD = "`output.uri`, and `hf upload` from there"

NO_EFFECT: tuple[Key, ...] = tuple(
    no_effect(name, kind, default, why)
    for why, rows in (
        (
            _LOGGING,
            (
                ("logging_strategy", Kind.TEXT, "steps"),
                ("logging_first_step", Kind.BOOL, False),
                ("log_on_each_node", Kind.BOOL, True),
                ("log_level", Kind.TEXT, "passive"),
                ("log_level_replica", Kind.TEXT, "warning"),
                ("disable_tqdm", Kind.BOOL, None),
            ),
        ),
        (
            "a loss that is not finite ends the attempt, so none can be filtered from the log",
            (("logging_nan_inf_filter", Kind.BOOL, True),),
        ),
        (
            "tokens and tokens per second are always counted",
            (
                ("include_num_input_tokens_seen", Kind.ANY, "no"),
                ("include_tokens_per_second", Kind.BOOL, False),
                ("skip_memory_metrics", Kind.BOOL, True),
            ),
        ),
        (
            _DDP,
            (
                ("ddp_find_unused_parameters", Kind.BOOL, None),
                ("ddp_bucket_cap_mb", Kind.INT, None),
                ("ddp_broadcast_buffers", Kind.BOOL, None),
                ("ddp_static_graph", Kind.BOOL, None),
                ("ddp_backend", Kind.TEXT, None),
            ),
        ),
        (
            "a rank that hangs is found by its heartbeat, and the communication timeout is the operator's setting",
            (("ddp_timeout", Kind.INT, 1800),),
        ),
        (
            _LOADER,
            (
                ("dataloader_pin_memory", Kind.BOOL, True),
                ("dataloader_persistent_workers", Kind.BOOL, False),
                ("dataloader_prefetch_factor", Kind.INT, None),
                ("dataloader_multiprocessing_context", Kind.TEXT, None),
                ("dataloader_in_order", Kind.BOOL, True),
                ("remove_unused_columns", Kind.BOOL, True),
                ("length_column_name", Kind.TEXT, "length"),
                ("label_names", Kind.NAMES, None),
            ),
        ),
        (
            _EVAL_LOSS,
            (
                ("per_device_eval_batch_size", Kind.INT, 8),
                ("per_gpu_eval_batch_size", Kind.INT, None),
                ("eval_accumulation_steps", Kind.INT, None),
                ("eval_do_concat_batches", Kind.BOOL, True),
                ("eval_use_gather_object", Kind.BOOL, False),
                ("batch_eval_metrics", Kind.BOOL, False),
                ("prediction_loss_only", Kind.BOOL, False),
                ("include_for_metrics", Kind.NAMES, None),
                ("include_inputs_for_metrics", Kind.BOOL, False),
                ("use_legacy_prediction_loop", Kind.BOOL, False),
                ("bf16_full_eval", Kind.BOOL, False),
            ),
        ),
        (
            "evaluation always runs before the first step as well",
            (("eval_on_start", Kind.BOOL, False),),
        ),
        (
            _RESUME,
            (
                ("restore_callback_states_from_checkpoint", Kind.BOOL, False),
                ("save_on_each_node", Kind.BOOL, False),
            ),
        ),
        (
            "a checkpoint always holds all that an exact resume needs; the result in `output.uri` holds the model only",
            (("save_only_model", Kind.BOOL, False),),
        ),
        (
            "a checkpoint on SIGTERM is the default (`checkpoint.onTermination`)",
            (("enable_jit_checkpoint", Kind.BOOL, False),),
        ),
        ("weights are always written as safetensors", (("save_safetensors", Kind.BOOL, True),)),
        (
            "launching is the operator's matter: it gives every rank its place",
            (("local_rank", Kind.INT, -1), ("_n_gpu", Kind.INT, -1)),
        ),
        (
            "there is no cache of keys and values in training",
            (("use_cache", Kind.BOOL, False), ("past_index", Kind.INT, -1)),
        ),
        (
            "it changes how recomputation is done, not its result",
            (
                ("gradient_checkpointing_kwargs", Kind.MAP, None),
                ("activation_checkpointing_kwargs", Kind.MAP, None),
            ),
        ),
        (
            "order of data, dropout and resuming are exact in any case; the rest is the kernels' own",
            (("full_determinism", Kind.BOOL, False),),
        ),
        ("the allocator keeps its cache, which is faster", (("torch_empty_cache_steps", Kind.INT, None),)),
        (
            "matrix products of bfloat16 do not use it, and those of float32 stay exact",
            (("tf32", Kind.BOOL, None),),
        ),
        (
            "`torch_compile` compiles each decoder layer by torch's defaults",
            (("torch_compile_backend", Kind.TEXT, None), ("torch_compile_mode", Kind.TEXT, None)),
        ),
        (
            "it is for Trackio, which is refused in `report_to`",
            (
                ("trackio_space_id", Kind.TEXT, None),
                ("trackio_bucket_id", Kind.TEXT, None),
                ("trackio_static_space_id", Kind.ANY, None),
            ),
        ),
        (
            _OLD,
            (
                ("fp16_opt_level", Kind.TEXT, "O1"),
                ("half_precision_backend", Kind.TEXT, "auto"),
                ("fp16_backend", Kind.TEXT, "auto"),
                ("tpu_num_cores", Kind.INT, None),
                ("tpu_metrics_debug", Kind.BOOL, False),
                ("jit_mode_eval", Kind.BOOL, False),
                ("use_mps_device", Kind.BOOL, False),
                ("mp_parameters", Kind.TEXT, ""),
                ("ray_scope", Kind.TEXT, "last"),
            ),
        ),
    )
    for name, kind, default in rows
)

REFUSED: tuple[Key, ...] = (
    refused(
        "fp16", Kind.BOOL, False, "float16 with loss scaling is not supported", "`bf16: true`, which needs no scaling"
    ),
    refused("fp16_full_eval", Kind.BOOL, False, "evaluation computes as training does", "remove the line"),
    refused("fp8", Kind.BOOL, False, "float8 is not supported", "`bf16: true`"),
    *parts(
        "fp8",
        "it is for float8",
        ("fp8_backend", Kind.TEXT, "auto"),
        ("fp8_enable_fsdp_float8_all_gather", Kind.BOOL, False),
    ),
    refused(
        "optim_args",
        Kind.TEXT,
        None,
        "the optimizers have no other arguments",
        "`adam_beta1`, `adam_beta2`, `adam_epsilon`",
    ),
    refused(
        "optim_target_modules", Kind.NAMES, None, "it is for GaLore and APOLLO", "`finetuning_type: lora` or freeze"
    ),
    refused("adafactor", Kind.BOOL, False, "Adafactor is not supported", "`optim: adamw_bnb_8bit` for less memory"),
    refused("label_smoothing_factor", Kind.FLOAT, 0.0, "the loss has no label smoothing", "remove the line"),
    refused(
        "neftune_noise_alpha", Kind.FLOAT, None, "noise on embeddings (NEFTune) is not supported", "`lora_dropout`"
    ),
    refused(
        "average_tokens_across_devices",
        Kind.BOOL,
        True,
        "the loss is always the mean over all target tokens of a step, whatever rank they are on",
        "remove the line",
        off=(True, None),
    ),
    refused(
        "liger_kernel_config",
        Kind.MAP,
        None,
        "Liger's kernels are not chosen one by one",
        "`enable_liger_kernel: true`",
    ),
    refused("torchdynamo", Kind.TEXT, None, "only torch's inductor compiles", "`torch_compile: true`"),
    refused(
        "auto_find_batch_size",
        Kind.BOOL,
        False,
        "a batch size is never changed on its own",
        "a smaller `per_device_train_batch_size` with more `gradient_accumulation_steps`: the same result",
    ),
    refused("per_gpu_train_batch_size", Kind.INT, None, "an old name", "`per_device_train_batch_size`"),
    refused(
        "dataloader_drop_last",
        Kind.BOOL,
        False,
        "every record counts; none is dropped at the end of an epoch",
        "remove the line",
    ),
    refused("eval_delay", Kind.FLOAT, 0, "evaluation begins at the first step", "remove the line"),
    refused(
        "do_predict",
        Kind.BOOL,
        False,
        "a job writes no predictions",
        "`eval_dataset` for the loss, or humaneval and mbpp for generated code",
    ),
    refused(
        "predict_with_generate",
        Kind.BOOL,
        False,
        "BLEU and ROUGE on generated text are not measured",
        "`eval_dataset` for the loss, or humaneval and mbpp for generated code",
    ),
    refused("sortish_sampler", Kind.BOOL, False, "an old way to group by length", "`group_by_length: true`"),
    refused(
        "resume_from_checkpoint",
        Kind.ANY,
        None,
        f"another run's checkpoint cannot be resumed; {_RESUME}",
        "its exported model as `model_name_or_path`",
        off=(None, False, True),
    ),
    refused("ignore_data_skip", Kind.BOOL, False, f"data are never trained twice; {_RESUME}", "remove the line"),
    refused("fsdp", Kind.ANY, None, "FSDP is not supported", _FSDP, off=(None, "", False, [])),
    *parts(
        "fsdp",
        "it is for FSDP",
        ("fsdp_config", Kind.ANY, None),
        ("fsdp_min_num_params", Kind.INT, 0),
        ("fsdp_transformer_layer_cls_to_wrap", Kind.TEXT, None),
    ),
    refused("accelerator_config", Kind.ANY, None, "Accelerate is not used", "`deepspeed` and the keys of training"),
    refused("parallelism_config", Kind.ANY, None, "tensor, context and pipeline parallelism are not supported", _FSDP),
    refused(
        "debug",
        Kind.ANY,
        "",
        "transformers' debugging is not there",
        "remove the line; the log names the first error",
        off=("", None, []),
    ),
    refused("push_to_hub", Kind.BOOL, False, "nothing is uploaded to a hub", _UPLOAD),
    *parts(
        "push_to_hub",
        "it is for uploading",
        ("hub_model_id", Kind.TEXT, None),
        ("hub_strategy", Kind.TEXT, "every_save"),
        ("hub_private_repo", Kind.BOOL, None),
        ("hub_always_push", Kind.BOOL, False),
        ("hub_revision", Kind.TEXT, None),
        ("push_to_hub_model_id", Kind.TEXT, None),
        ("push_to_hub_organization", Kind.TEXT, None),
    ),
    refused(
        "hub_token",
        Kind.TEXT,
        None,
        "a token does not belong in a file",
        "a Secret, with `--hub-secret NAME` (or NAME/KEY)",
    ),
    refused(
        "push_to_hub_token",
        Kind.TEXT,
        None,
        "a token does not belong in a file",
        "a Secret, with `--hub-secret NAME` (or NAME/KEY)",
    ),
    refused(
        "enable_torch_profiler",
        Kind.BOOL,
        False,
        "a profile goes to a volume, which the file does not name",
        "`tracking.profiler` in the job",
    ),
    *parts(
        "enable_torch_profiler",
        "it is for the profiler",
        ("profiler_output_dir", Kind.TEXT, None),
        ("profiler_wait_steps", Kind.INT, 1),
        ("profiler_warmup_steps", Kind.INT, 1),
        ("profiler_active_steps", Kind.INT, 1),
        ("profiler_repeat", Kind.INT, 1),
        ("profiler_record_shapes", Kind.BOOL, True),
        ("profiler_profile_memory", Kind.BOOL, True),
        ("profiler_with_stack", Kind.BOOL, True),
        ("profile_modules", Kind.TEXT, None),
    ),
)
