"""Stage and method: what is trained, and with which adapter."""

from finetune_cli.convert.conversion import Conversion, decimal

_STAGES = {
    "rm": "a reward model has another head and loss",
    "ppo": "reinforcement learning generates while it trains",
    "dpo": "training on pairs of answers is not supported",
    "kto": "training on liked and disliked answers is not supported",
}
_METHODS = {"lora": "LoRA", "full": "Full", "freeze": "Freeze"}
_ADAPTER = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "use_rslora", "use_dora", "loraplus_lr_ratio")
_FREEZE = ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")
_QUANTIZATION = ("quantization_bit", "double_quantization", "quantization_method", "quantization_type")


def stage(c: Conversion) -> None:
    """`method`; stages other than supervised and continued training are refused."""
    name, kind = c.config["stage"], c.config["finetuning_type"]
    if name in _STAGES:
        c.refuse("stage", _STAGES[name], "`stage: sft` on the answers that are wanted")
    elif "stage" in c.config:
        c.settle("datasets", "stage")
    if kind == "oft":
        c.refuse(
            "finetuning_type",
            "orthogonal fine-tuning is not supported",
            "`finetuning_type: lora`, also with `use_dora: true`",
        )
        return
    method = "QLoRA" if kind == "lora" and c.config["quantization_bit"] is not None else _METHODS[kind]
    c.put("method", method, "finetuning_type")


def adapter(c: Conversion) -> None:
    """`adapter`, with LLaMA-Factory's defaults: rank 8, alpha twice the rank, every linear layer."""
    if c.config["finetuning_type"] != "lora":
        _unused(c, _ADAPTER, "it is for `finetuning_type: lora`")
        return
    rank = c.config["lora_rank"]
    c.put("adapter.rank", rank, "lora_rank")
    c.put("adapter.alpha", c.config["lora_alpha"] or 2 * rank, "lora_alpha", "lora_rank")
    c.put("adapter.dropout", decimal(c.config["lora_dropout"]), "lora_dropout")
    targets = c.config["lora_target"]
    if "all" in targets and len(targets) > 1:
        c.refuse(
            "lora_target",
            "LLaMA-Factory reads `all` beside other names as a layer's name, and trains only the others",
            "`lora_target: all`, or the names of all layers that are meant",
        )
    c.put("adapter.targetModules", ["All"] if targets == ["all"] else targets, "lora_target")
    if c.config["use_dora"] and c.config["use_rslora"]:
        c.refuse(
            "use_dora",
            "DoRA together with rsLoRA's scale is not supported",
            "one of `use_dora` and `use_rslora`",
            "use_rslora",
        )
    else:
        variant = "DoRA" if c.config["use_dora"] else "RSLoRA" if c.config["use_rslora"] else "LoRA"
        c.put("adapter.variant", variant, "use_dora", "use_rslora")
    if c.config["loraplus_lr_ratio"] is not None:
        c.put("adapter.loraPlusRatio", decimal(c.config["loraplus_lr_ratio"]), "loraplus_lr_ratio")


def freeze(c: Conversion) -> None:
    """`freeze`: which layers are trained."""
    if c.config["finetuning_type"] != "freeze":
        _unused(c, _FREEZE, "it is for `finetuning_type: freeze`")
        return
    modules = c.config["freeze_trainable_modules"]
    c.put("freeze.trainableLayers", c.config["freeze_trainable_layers"], "freeze_trainable_layers")
    c.put("freeze.trainableModules", ["All"] if modules == ["all"] else modules, "freeze_trainable_modules")
    if c.config["freeze_extra_modules"]:
        c.put("freeze.extraModules", c.config["freeze_extra_modules"], "freeze_extra_modules")


def quantization(c: Conversion) -> None:
    """`quantization`: the base model in 4 or 8 bits, under an adapter only."""
    bits = c.config["quantization_bit"]
    if bits is None:
        _unused(c, _QUANTIZATION[1:], "without `quantization_bit` nothing is quantised")
        return
    if c.config["finetuning_type"] != "lora":
        c.refuse(
            "quantization_bit",
            "only the base of an adapter can be quantised",
            "`finetuning_type: lora`",
            *_QUANTIZATION,
        )
        return
    if bits not in (4, 8):
        c.refuse("quantization_bit", "weights are quantised to 4 or 8 bits", "`quantization_bit: 4`")
    c.put("quantization.bits", bits, "quantization_bit")
    c.put("quantization.doubleQuantization", c.config["double_quantization"], "double_quantization")
    if c.config["quantization_method"] not in ("bnb", "bitsandbytes"):
        c.refuse("quantization_method", "only bitsandbytes quantises here", "`quantization_method: bnb`")
    c.settle("quantization", "quantization_method")
    if bits != 8 and c.config["quantization_type"] != "nf4":
        c.refuse("quantization_type", "4 bits are NF4 here, which loses less than FP4", "`quantization_type: nf4`")
    c.settle("quantization", "quantization_type")
    if bits == 8:
        _unused(c, ("double_quantization", "quantization_type"), "it is for 4 bits")


def vision(c: Conversion) -> None:
    """`vision`, for models that see: what is trained beside the language model."""
    keys = ("freeze_vision_tower", "freeze_multi_modal_projector", "mm_projector_lr")
    if not sees(c):
        _unused(c, keys, "there are no images: neither `template: llava` nor a data set with an `images` column")
        return
    rate, frozen = c.config["mm_projector_lr"], c.config["freeze_multi_modal_projector"]
    c.put("vision.freezeTower", c.config["freeze_vision_tower"], "freeze_vision_tower")
    if rate is not None and frozen and "freeze_multi_modal_projector" in c.config:
        c.refuse(
            "mm_projector_lr",
            "the projector is frozen by `freeze_multi_modal_projector: true`",
            "one of the two",
            keys[1],
        )
    elif c.config["finetuning_type"] == "lora":
        _beside_adapter(c)
    elif rate is not None or not frozen:
        chosen = c.config["learning_rate"] if rate is None else rate
        c.put("vision.projectorLearningRate", decimal(chosen), "mm_projector_lr", "freeze_multi_modal_projector")
    else:
        c.settle("vision", "freeze_multi_modal_projector")


def _beside_adapter(c: Conversion) -> None:
    """Tower and projector beside an adapter: LLaMA-Factory trains neither whole, a rate of the projector's own asks for it."""
    rate, tower = c.config["mm_projector_lr"], not c.config["freeze_vision_tower"]
    if rate is not None:
        c.put("vision.projectorLearningRate", decimal(rate), "mm_projector_lr", "freeze_multi_modal_projector")
        parts = "tower and projector are" if tower else "the projector is"
        c.note("mm_projector_lr", f"LLaMA-Factory has no such key; here {parts} trained whole, beside the adapter")
        return
    if tower:
        c.refuse(
            "freeze_vision_tower",
            "LLaMA-Factory puts adapters into the tower, here it would be trained whole",
            "`freeze_vision_tower: true`, or `mm_projector_lr` beside it to train tower and projector whole",
        )
    if not c.config["freeze_multi_modal_projector"]:
        c.note("freeze_multi_modal_projector", "no effect with `finetuning_type: lora`, in LLaMA-Factory neither")


def sees(c: Conversion) -> bool:
    """Whether the model sees images."""
    sets = [*c.spec.get("datasets", {}).get("train", []), *c.spec.get("datasets", {}).get("evaluation", [])]
    return c.config["template"] == "llava" or any("images" in entry.get("columns", {}) for entry in sets)


def _unused(c: Conversion, keys: tuple[str, ...], why: str) -> None:
    for key in keys:
        if key in c.config:
            c.note(key, f"no effect: {why}")
