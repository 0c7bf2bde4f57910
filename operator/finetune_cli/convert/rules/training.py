"""Batches, epochs, lengths, the learning rate's course and the optimizer."""

from finetune_cli.convert.config import is_number, show
from finetune_cli.convert.conversion import Conversion, decimal

_SCHEDULERS = {
    "linear": "Linear",
    "cosine": "Cosine",
    "cosine_with_restarts": "CosineWithRestarts",
    "cosine_with_min_lr": "CosineWithMinLR",
    "polynomial": "Polynomial",
    "constant": "Constant",
    "constant_with_warmup": "Constant",
    "inverse_sqrt": "InverseSqrt",
    "warmup_stable_decay": "WarmupStableDecay",
}
_OPTIMIZERS = {
    "adamw_torch": "AdamW",
    "adamw_torch_fused": "AdamW",
    "adamw_hf": "AdamW",
    "adamw_bnb_8bit": "AdamW8bit",
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_32bit": "PagedAdamW",
    "paged_adamw": "PagedAdamW",
    "paged_adamw_8bit": "PagedAdamW8bit",
}
_PARAMETERS = {
    "cosine_with_restarts": {"num_cycles": "numCycles"},
    "cosine_with_min_lr": {"min_lr_rate": "minLrRate", "min_lr": "minLrRate"},
    "polynomial": {"lr_end": "lrEnd", "power": "power"},
    "inverse_sqrt": {"timescale": "timescale"},
    "warmup_stable_decay": {"min_lr_ratio": "minLrRate", "num_decay_steps": "numDecaySteps"},
}
"""Arguments of transformers' schedulers that have a field."""
_WHOLE = ("numCycles", "timescale", "numDecaySteps")


def batch(c: Conversion) -> None:
    """Micro-batch and global batch, the number of ranks and their devices."""
    per_device, accumulation = c.config["per_device_train_batch_size"], c.config["gradient_accumulation_steps"]
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    c.put("training.microBatchSize", per_device, keys[0])
    c.put("training.globalBatchSize", per_device * accumulation * c.options.world_size, *keys)
    c.put("trainer.numNodes", c.options.num_nodes)
    c.put("trainer.numProcPerNode", c.options.num_proc_per_node)
    if on_cpu(c):
        c.settle("trainer.resourcesPerNode", "use_cpu", "no_cuda")
    else:
        c.put("trainer.resourcesPerNode.limits", {"nvidia.com/gpu": c.options.num_proc_per_node}, "use_cpu", "no_cuda")


def on_cpu(c: Conversion) -> bool:
    """Whether the job is to train on CPUs."""
    return bool(c.config["use_cpu"] or c.config["no_cuda"])


def duration(c: Conversion) -> None:
    """Epochs or steps; and that there is a training at all."""
    if c.config["do_train"]:
        c.settle("the job", "do_train")
    elif "do_train" in c.config:
        c.refuse("do_train", "a job trains", "`do_train: true`")
    else:
        c.note("do_train", "LLaMA-Factory would not train; the job does")
    epochs, steps = c.config["num_train_epochs"], c.config["max_steps"]
    if steps > 0:
        c.put("training.maxSteps", steps, "max_steps")
        if "num_train_epochs" in c.config:
            c.note("num_train_epochs", f"no effect: `max_steps: {steps}` decides, in LLaMA-Factory too")
        return
    if "max_steps" in c.config:
        c.note("max_steps", "not above 0: `num_train_epochs` decides, in LLaMA-Factory too")
    if epochs.is_integer() and epochs >= 1:
        c.put("training.epochs", int(epochs), "num_train_epochs")
    else:
        c.refuse("num_train_epochs", "a part of an epoch is not supported", "`max_steps` with so many optimizer steps")


def data_order(c: Conversion) -> None:
    """Seed, grouping by length and the loader's processes."""
    c.put("training.seed", c.config["seed"], "seed")
    if c.config["data_seed"] not in (None, c.config["seed"]):
        c.refuse("data_seed", "one seed decides order, dropout and new weights", "`seed` alone")
    c.settle("training.seed", "data_seed")
    strategy = c.config["train_sampling_strategy"]
    if strategy == "sequential":
        c.refuse("train_sampling_strategy", "the order of records is a random one that `seed` decides", "random")
    grouped = c.config["group_by_length"] or strategy == "group_by_length"
    if grouped and packs(c):
        c.refuse(
            "group_by_length" if c.config["group_by_length"] else "train_sampling_strategy",
            "packed rows have one length anyway",
            "`packing` or grouping, not both",
        )
    c.put("training.groupByLength", grouped, "group_by_length", "train_sampling_strategy")
    if c.config["dataloader_num_workers"]:
        c.put("training.loaderWorkers", c.config["dataloader_num_workers"], "dataloader_num_workers")
    elif "dataloader_num_workers" in c.config:
        c.note("dataloader_num_workers", "0: as if it were not there")


def packs(c: Conversion) -> bool:
    """Whether samples are packed: LLaMA-Factory does it unasked in continued pre-training."""
    packing = c.config["packing"]
    return bool(c.config["neat_packing"] or (c.config["stage"] == "pt" if packing is None else packing))


def lengths(c: Conversion) -> None:
    """Length of a row, packing, what becomes of longer samples, and what is learnt of a conversation."""
    pretraining = c.config["stage"] == "pt"
    c.put("training.maxLength", c.config["cutoff_len"], "cutoff_len")
    c.put("training.packing", packs(c), "packing", "neat_packing", "stage")
    cut = "Truncate" if pretraining else "TruncateShare"
    c.put("training.overlong", "Split" if pretraining and packs(c) else cut, "cutoff_len", "stage")
    if packs(c) and not c.config["neat_packing"]:
        key = "packing" if "packing" in c.config else "stage"
        c.note(key, "samples in one row never see each other here (LLaMA-Factory: only with `neat_packing: true`)")
    if c.config["neat_packing"] and pretraining:
        c.refuse(
            "neat_packing", "LLaMA-Factory has it for `stage: sft` only", "`packing: true`, which isolates samples here"
        )
    if c.config["neat_packing"] and c.config["packing"] is False:
        c.note("packing", "no effect: `neat_packing: true` packs, in LLaMA-Factory too")
    for key in ("train_on_prompt", "mask_history"):
        if pretraining and c.config[key]:
            c.refuse(key, "LLaMA-Factory has it for `stage: sft` only; a text is learnt as a whole", "remove the line")
    if c.config["train_on_prompt"] and c.config["mask_history"]:
        c.refuse("mask_history", "it contradicts `train_on_prompt`", "one of the two", "train_on_prompt")
    c.put("training.trainOnPrompt", c.config["train_on_prompt"], "train_on_prompt")
    c.put("training.maskHistory", c.config["mask_history"], "mask_history")


def learning_rate(c: Conversion) -> None:
    """Peak, course and warm-up of the learning rate."""
    c.put("training.learningRate", decimal(c.config["learning_rate"]), "learning_rate")
    name = c.config["lr_scheduler_type"]
    if name not in _SCHEDULERS:
        known = ", ".join(f"`{s}`" for s in _SCHEDULERS)
        c.refuse("lr_scheduler_type", f"not supported; there are {known}", "one of them", "lr_scheduler_kwargs")
    else:
        c.put("training.scheduler", _SCHEDULERS[name], "lr_scheduler_type")
        _parameters(c, name)
    _warmup(c, name)


def _warmup(c: Conversion, scheduler: str) -> None:
    steps, ratio = c.config["warmup_steps"], c.config["warmup_ratio"]
    if scheduler == "constant":
        c.put("training.warmupRatio", "0")
        for key in ("warmup_steps", "warmup_ratio"):
            if key in c.config:
                c.note(key, "no effect: transformers' `constant` has no warm-up; `constant_with_warmup` has")
    elif steps >= 1:
        c.put("training.warmupSteps", int(steps), "warmup_steps")
        if "warmup_ratio" in c.config:
            c.note("warmup_ratio", "no effect: `warmup_steps` decides, in transformers too")
    elif (share := steps or ratio) < 1:
        c.put("training.warmupRatio", decimal(share), "warmup_steps", "warmup_ratio")
        if steps and "warmup_ratio" in c.config:
            c.note("warmup_ratio", "no effect: `warmup_steps` decides, in transformers too")
    else:
        c.refuse("warmup_ratio", "warm-up cannot take all steps", "a share below 1")


def _parameters(c: Conversion, scheduler: str) -> None:
    fields = _PARAMETERS.get(scheduler, {})
    for name, value in (c.config["lr_scheduler_kwargs"] or {}).items():
        if name not in fields or not is_number(value):
            known = ", ".join(f"`{f}`" for f in fields) or "none"
            c.refuse(
                "lr_scheduler_kwargs", f"`{name}: {show(value)}` has no field; `{scheduler}` has {known}", "one of them"
            )
            continue
        number = value / c.config["learning_rate"] if name == "min_lr" else value
        target = fields[name]
        c.put(
            f"training.schedulerParameters.{target}",
            int(number) if target in _WHOLE else decimal(number),
            "lr_scheduler_kwargs",
        )
    if c.config["lr_scheduler_kwargs"] == {}:
        c.note("lr_scheduler_kwargs", "empty: as if it were not there")
    if scheduler == "cosine_with_min_lr" and not c.config["lr_scheduler_kwargs"]:
        c.refuse("lr_scheduler_type", "transformers wants its lowest rate", "`lr_scheduler_kwargs: {min_lr_rate: 0.1}`")


def optimizer(c: Conversion) -> None:
    """Optimizer, its constants, and clipping."""
    name = c.config["optim"]
    if name not in _OPTIMIZERS:
        known = ", ".join(f"`{o}`" for o in _OPTIMIZERS)
        c.refuse("optim", f"not supported; there are {known}", "`adamw_torch`, or `adamw_bnb_8bit` for less memory")
    else:
        c.put("training.optimizer", _OPTIMIZERS[name], "optim")
    for key, path in (
        ("weight_decay", "weightDecay"),
        ("adam_beta1", "adamBeta1"),
        ("adam_beta2", "adamBeta2"),
        ("adam_epsilon", "adamEpsilon"),
        ("max_grad_norm", "maxGradNorm"),
    ):
        c.put(f"training.{path}", decimal(c.config[key]), key)
