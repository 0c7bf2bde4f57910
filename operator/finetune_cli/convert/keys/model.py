"""Keys of LLaMA-Factory's model arguments: what is loaded, how it computes, inference and export."""

from finetune_cli.convert.table import Key, Kind, no_effect, parts, refused, translated

_TOKENS = "new tokens change the vocabulary, which is kept as the model has it"
_ADD_TOKENS = "a model whose tokenizer and embeddings were extended and saved before"
_INFERENCE = "it is for inference; nothing of it is used in training"
_NO_UNSLOTH = "`training.compile: true` and `training.ligerKernel: true`, which need no patched model"

MODEL: tuple[Key, ...] = (
    translated(
        "model_name_or_path",
        Kind.TEXT,
        None,
        "model.uri",
        "`org/name` becomes `hf://org/name`; a path needs `--model-uri`",
    ),
    translated("model_revision", Kind.TEXT, "main", "model.revision", "for `hf://` models"),
    translated(
        "flash_attn",
        Kind.TEXT,
        "auto",
        "training.attention",
        "auto: Auto, disabled: Eager, sdpa: SDPA, fa2: FlashAttention2, fa3: FlashAttention3",
        choices=("auto", "disabled", "sdpa", "fa2", "fa3"),
    ),
    translated("enable_liger_kernel", Kind.BOOL, False, "training.ligerKernel"),
    translated(
        "disable_gradient_checkpointing",
        Kind.BOOL,
        False,
        "training.activationCheckpointing",
        "false: Full (LLaMA-Factory checkpoints unless told otherwise), true: None",
    ),
    translated("use_unsloth_gc", Kind.BOOL, False, "training.activationCheckpointing", "true: FullOffload"),
    translated("cache_dir", Kind.TEXT, None, "cache.uri", "only if `--cache-uri` says which volume it is"),
    no_effect("use_fast_tokenizer", Kind.BOOL, True, "the fast tokenizer is always used"),
    no_effect("low_cpu_mem_usage", Kind.BOOL, True, "it changes how weights are loaded, not the result"),
    no_effect("use_reentrant_gc", Kind.BOOL, True, "it changes how recomputation is done, not its result"),
    no_effect(
        "trust_remote_code",
        Kind.BOOL,
        False,
        "code from a model's repository is never run here; the architecture must be one that transformers has",
    ),
    no_effect("use_kv_cache", Kind.BOOL, True, _INFERENCE),
    no_effect("infer_backend", Kind.TEXT, "huggingface", _INFERENCE),
    no_effect("infer_dtype", Kind.TEXT, "auto", _INFERENCE),
    no_effect("offload_folder", Kind.TEXT, "offload", _INFERENCE),
    no_effect("print_param_status", Kind.BOOL, False, "it only prints; the log has the number of trained weights"),
    no_effect("use_v1_kernels", Kind.BOOL, False, "it is for LLaMA-Factory's other engine; see `training.ligerKernel`"),
    refused(
        "adapter_name_or_path",
        Kind.NAMES,
        None,
        "training on from an adapter is not supported",
        "merge the adapter into the model first and give the merged model as `model_name_or_path`",
    ),
    *parts("adapter_name_or_path", "it says where the adapter is", ("adapter_folder", Kind.TEXT, None)),
    refused("resize_vocab", Kind.BOOL, False, _TOKENS, _ADD_TOKENS),
    refused(
        "split_special_tokens",
        Kind.BOOL,
        False,
        "special tokens in the data are always read as special tokens",
        "data without the text of special tokens",
    ),
    refused("add_tokens", Kind.NAMES, None, _TOKENS, _ADD_TOKENS),
    refused("add_special_tokens", Kind.NAMES, None, _TOKENS, _ADD_TOKENS),
    refused("new_special_tokens", Kind.NAMES, None, _TOKENS, _ADD_TOKENS),
    refused("new_special_tokens_config", Kind.TEXT, None, _TOKENS, _ADD_TOKENS),
    *parts("add_special_tokens", "it says how new tokens begin", ("init_special_tokens", Kind.TEXT, "noise_init")),
    refused(
        "rope_scaling",
        Kind.TEXT,
        None,
        "the model's position embedding is not changed for training",
        "`rope_parameters` in the model's own config.json",
    ),
    refused(
        "shift_attn",
        Kind.BOOL,
        False,
        "shifted sparse attention (LongLoRA) is not exact attention",
        "`flash_attn: auto`",
    ),
    refused("mixture_of_depths", Kind.TEXT, None, "mixture-of-depths models are not supported", "the model as it is"),
    refused("use_unsloth", Kind.BOOL, False, "unsloth's patched models are not supported", _NO_UNSLOTH),
    refused(
        "moe_aux_loss_coef",
        Kind.FLOAT,
        None,
        "the router's auxiliary loss is not added; the loss is the mean over target tokens",
        "a dense model, or the loss without it",
    ),
    refused(
        "upcast_layernorm",
        Kind.BOOL,
        False,
        "norms in float32 weights are not supported apart from the rest",
        "`bf16: true`; norms compute in float32 inside in any case",
    ),
    refused(
        "upcast_lmhead_output",
        Kind.BOOL,
        False,
        "an own precision for the head's output is not supported",
        "remove the line: the loss is computed in float32 in any case",
    ),
    refused(
        "train_from_scratch",
        Kind.BOOL,
        False,
        "training starts from a model's weights",
        "a model saved with new weights",
    ),
    refused(
        "hf_hub_token",
        Kind.TEXT,
        None,
        "a token does not belong in a file",
        "a Secret in the job's namespace, with `--hub-secret NAME` (or NAME/KEY)",
    ),
    refused(
        "ms_hub_token",
        Kind.TEXT,
        None,
        "ModelScope is not supported",
        "the model or data set on Hugging Face, or on a volume",
    ),
    refused(
        "om_hub_token",
        Kind.TEXT,
        None,
        "Modelers is not supported",
        "the model or data set on Hugging Face, or on a volume",
    ),
)

QUANTIZATION: tuple[Key, ...] = (
    translated(
        "quantization_bit", Kind.INT, None, "method, quantization.bits", "4 or 8 with `finetuning_type: lora`: QLoRA"
    ),
    translated("double_quantization", Kind.BOOL, True, "quantization.doubleQuantization"),
    translated("quantization_method", Kind.TEXT, "bnb", "quantization", "only `bnb`, which is bitsandbytes"),
    translated("quantization_type", Kind.TEXT, "nf4", "quantization", "only `nf4`", choices=("fp4", "nf4")),
    refused(
        "quantization_device_map",
        Kind.TEXT,
        None,
        "a model is not spread over devices by a device map",
        "`deepspeed` with stage 3",
    ),
)

_IMAGES = "the model's own image processor decides, as its preprocessor_config.json says"
PROCESSOR: tuple[Key, ...] = (
    no_effect("image_max_pixels", Kind.INT, 589824, _IMAGES),
    no_effect("image_min_pixels", Kind.INT, 1024, _IMAGES),
    no_effect("image_do_pan_and_scan", Kind.BOOL, False, _IMAGES),
    no_effect("crop_to_patches", Kind.BOOL, False, _IMAGES),
    *(
        no_effect(name, kind, default, "data sets with videos or audio are refused, so it has nothing to act on")
        for name, kind, default in (
            ("video_max_pixels", Kind.INT, 65536),
            ("video_min_pixels", Kind.INT, 256),
            ("video_fps", Kind.FLOAT, 2.0),
            ("video_maxlen", Kind.INT, 128),
            ("use_audio_in_video", Kind.BOOL, False),
            ("audio_sampling_rate", Kind.INT, 16000),
        )
    ),
)

EXPORT: tuple[Key, ...] = (
    refused(
        "export_dir",
        Kind.TEXT,
        None,
        "exporting is no job of its own",
        "`output.mergeAdapter: true` in the job that trains: the merged model lies beside the adapter",
    ),
    refused(
        "export_hub_model_id",
        Kind.TEXT,
        None,
        "nothing is uploaded to a hub",
        "`output.uri`, and `hf upload` from there",
    ),
    refused(
        "export_quantization_bit",
        Kind.INT,
        None,
        "exported weights are not quantised",
        "a quantising tool on the exported model",
    ),
    *parts(
        "export_dir",
        "it is for `llamafactory-cli export`",
        ("export_size", Kind.INT, 5),
        ("export_device", Kind.TEXT, "cpu"),
        ("export_quantization_dataset", Kind.TEXT, None),
        ("export_quantization_nsamples", Kind.INT, 128),
        ("export_quantization_maxlen", Kind.INT, 1024),
        ("export_legacy_format", Kind.BOOL, False),
    ),
)

ENGINES: tuple[Key, ...] = (
    *(
        no_effect(name, kind, default, _INFERENCE)
        for name, kind, default in (
            ("vllm_maxlen", Kind.INT, 4096),
            ("vllm_gpu_util", Kind.FLOAT, 0.7),
            ("vllm_enforce_eager", Kind.BOOL, False),
            ("vllm_max_lora_rank", Kind.INT, 32),
            ("vllm_config", Kind.MAP, None),
            ("sglang_maxlen", Kind.INT, 4096),
            ("sglang_mem_fraction", Kind.FLOAT, 0.7),
            ("sglang_tp_size", Kind.INT, -1),
            ("sglang_config", Kind.MAP, None),
            ("sglang_lora_backend", Kind.TEXT, "triton"),
        )
    ),
    refused(
        "use_kt",
        Kind.BOOL,
        False,
        "KTransformers (experts on the CPU) is not supported",
        "`deepspeed` with stage 3 and offloading",
    ),
    *parts(
        "use_kt",
        "it is for KTransformers",
        ("kt_cpu_activation", Kind.TEXT, None),
        ("kt_weight_path", Kind.TEXT, None),
        ("kt_non_expert_weight_path", Kind.TEXT, None),
        ("kt_expert_checkpoint_path", Kind.TEXT, None),
        ("kt_use_lora_experts", Kind.BOOL, None),
        ("kt_lora_expert_num", Kind.INT, None),
        ("kt_lora_expert_intermediate_size", Kind.INT, None),
        ("kt_config", Kind.MAP, None),
    ),
)
