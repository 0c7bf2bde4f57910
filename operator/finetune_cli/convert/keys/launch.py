"""Keys of other ways to start and to spread a training: Ray, Megatron."""

from finetune_cli.convert.table import Key, Kind, no_effect, refused

_RANKS = "`--num-nodes` and `--num-proc-per-node`"
LAUNCH: tuple[Key, ...] = (
    refused("ray_num_workers", Kind.INT, 1, "Ray is not used: the operator starts the ranks", _RANKS),
    refused("ray_init_kwargs", Kind.ANY, None, "Ray is not used: the operator starts the ranks", _RANKS),
    no_effect("ray_run_name", Kind.TEXT, None, "Ray is not used: the operator starts the ranks"),
    no_effect("ray_storage_path", Kind.TEXT, "./saves", "Ray is not used: the operator starts the ranks"),
    no_effect("resources_per_worker", Kind.ANY, {"GPU": 1}, "Ray is not used: every rank gets one GPU"),
    no_effect("placement_strategy", Kind.TEXT, "PACK", "Ray is not used: pods are spread over nodes"),
    no_effect("master_addr", Kind.TEXT, None, "the operator gives the ranks their meeting point"),
    no_effect("master_port", Kind.TEXT, None, "the operator gives the ranks their meeting point"),
)

MEGATRON: tuple[Key, ...] = tuple(
    refused(name, kind, default, "Megatron Bridge is not supported", "`deepspeed` with stage 3", off=(default,))
    for name, kind, default in (
        ("tensor_model_parallel_size", Kind.INT, 1),
        ("pipeline_model_parallel_size", Kind.INT, 1),
        ("expert_model_parallel_size", Kind.INT, 1),
        ("context_parallel_size", Kind.INT, 1),
        ("virtual_pipeline_model_parallel_size", Kind.INT, None),
        ("sequence_parallel", Kind.BOOL, False),
        ("recompute_granularity", Kind.TEXT, None),
        ("recompute_method", Kind.TEXT, None),
        ("recompute_num_layers", Kind.INT, None),
        ("account_for_embedding_in_pipeline_split", Kind.BOOL, None),
        ("account_for_loss_in_pipeline_split", Kind.BOOL, None),
        ("bias_activation_fusion", Kind.BOOL, None),
        ("apply_rope_fusion", Kind.BOOL, None),
        ("masked_softmax_fusion", Kind.BOOL, None),
        ("cross_entropy_loss_fusion", Kind.BOOL, None),
        ("moe_grouped_gemm", Kind.BOOL, None),
        ("moe_token_dispatcher_type", Kind.TEXT, None),
        ("calculate_per_token_loss", Kind.BOOL, None),
        ("use_distributed_optimizer", Kind.BOOL, True),
        ("overlap_param_gather", Kind.BOOL, True),
        ("overlap_grad_reduce", Kind.BOOL, True),
        ("use_packed_sequences", Kind.BOOL, False),
        ("mixed_precision", Kind.TEXT, "bf16_mixed"),
        ("megatron_pretrained_checkpoint", Kind.TEXT, None),
        ("export_hf_on_finish", Kind.BOOL, False),
        ("extra_config", Kind.TEXT, None),
    )
)
