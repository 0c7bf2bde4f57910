"""DeepSpeed's top-level keys that a raw block may have. Apart from the schema, so that a conversion needs no pydantic."""

TOP_LEVEL = (
    "comms_logger",
    "communication_data_type",
    "dump_state",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "timers",
    "wall_clock_breakdown",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)
"""DeepSpeed ignores what it does not know, so only these are taken."""
