"""What works alone and not together, in the words of LLaMA-Factory's keys; the reasons are those of the API."""

from finetune_cli.convert.conversion import Conversion


def check(c: Conversion) -> None:
    """Refuses combinations that a job cannot have. Runs last, over the whole spec."""
    training, deepspeed = c.spec.get("training", {}), c.spec.get("deepspeed", {})
    partitioned = deepspeed.get("zeroStage") == 3
    if partitioned and c.spec.get("method") == "QLoRA":
        c.refuse(
            "quantization_bit", "quantised weights cannot be partitioned by DeepSpeed's stage 3", "stage 0, 1 or 2"
        )
    if partitioned and c.spec.get("adapter", {}).get("variant") == "DoRA":
        c.refuse(
            "use_dora", "DoRA needs the norm of every whole weight, which stage 3 keeps in parts", "stage 0, 1 or 2"
        )
    if deepspeed.get("offloadOptimizer") == "CPU" and training.get("optimizer", "AdamW") != "AdamW":
        c.refuse("optim", "DeepSpeed's offloaded optimizer is its own AdamW", "`optim: adamw_torch`, or no offloading")
    stage = deepspeed.get("zeroStage", 0)
    key = "deepspeed" if "deepspeed" in c.config else "deepspeed_config"
    if deepspeed.get("offloadOptimizer") == "CPU" and stage == 0:
        c.refuse(key, "stage 0 offloads nothing", "`stage: 1`, 2 or 3")
    if deepspeed.get("offloadParameters") == "CPU" and stage != 3:
        c.refuse(key, "only stage 3 offloads parameters", "`stage: 3`")
