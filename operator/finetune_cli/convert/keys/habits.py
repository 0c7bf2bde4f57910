"""Keys that people write although LLaMA-Factory refuses them: what they mean is plain, so they are translated."""

from finetune_cli.convert.table import Key, Kind, translated

HABITS: tuple[Key, ...] = (
    translated("use_wandb", Kind.BOOL, False, "tracking.wandb", "as `report_to: wandb`", known=False),
    translated("wandb_project", Kind.TEXT, None, "tracking.wandb.project", known=False),
    translated("wandb_run_name", Kind.TEXT, None, "tracking.wandb.runName", known=False),
    translated("wandb_entity", Kind.TEXT, None, "tracking.wandb.entity", known=False),
    translated(
        "deepspeed_config",
        Kind.ANY,
        None,
        "deepspeed",
        "a mapping with stage, partition_weights, cpu_offload, memory_efficient_linear, or DeepSpeed's own names",
        known=False,
    ),
    translated(
        "mm_projector_lr",
        Kind.FLOAT,
        None,
        "vision.projectorLearningRate",
        "trains the projector at its own rate",
        known=False,
        least=1e-12,
        most=1,
    ),
)
