"""Precision, recomputation and kernels."""

from finetune_cli.convert.conversion import Conversion
from finetune_cli.convert.rules.training import on_cpu

_ATTENTION = {
    "auto": "Auto",
    "disabled": "Eager",
    "sdpa": "SDPA",
    "fa2": "FlashAttention2",
    "fa3": "FlashAttention3",
}


def precision(c: Conversion) -> None:
    """`training.precision`."""
    if c.config["pure_bf16"]:
        c.put("training.precision", "PureBF16", "pure_bf16", "bf16")
        return
    if c.config["bf16"]:
        c.put("training.precision", "BF16", "bf16", "pure_bf16")
        return
    if on_cpu(c):
        c.put("training.precision", "FP32", "use_cpu", "no_cuda", "bf16", "pure_bf16")
        return
    c.put("training.precision", "BF16", "bf16", "pure_bf16")
    if not c.config["fp16"]:
        c.note(
            "bf16",
            "without bf16 and fp16 LLaMA-Factory takes the model's own type, which is bfloat16 for current models; the job has"
            " `precision: BF16`. Write `precision: FP32` for float32",
        )


def checkpointing(c: Conversion) -> None:
    """`training.activationCheckpointing`: LLaMA-Factory recomputes unless told otherwise."""
    own = ("gradient_checkpointing", "activation_checkpointing")
    asked = any(c.config[key] for key in own)
    on = not c.config["disable_gradient_checkpointing"] or asked
    mode = "None" if not on else "FullOffload" if c.config["use_unsloth_gc"] else "Full"
    c.put("training.activationCheckpointing", mode, "disable_gradient_checkpointing", "use_unsloth_gc", *own)
    for key in own:
        if key in c.config and not c.config[key] and on:
            c.note(key, "does not switch it off, in LLaMA-Factory neither: `disable_gradient_checkpointing: true` does")
    if c.config["use_unsloth_gc"] and not on:
        c.note("use_unsloth_gc", "no effect with `disable_gradient_checkpointing: true`")
    if c.config["disable_gradient_checkpointing"] and asked:
        c.note(
            "disable_gradient_checkpointing", "transformers' own key switches it on all the same, in LLaMA-Factory too"
        )


def kernels(c: Conversion) -> None:
    """Attention, Liger and compilation."""
    c.put("training.attention", _ATTENTION[c.config["flash_attn"]], "flash_attn")
    liger = c.config["enable_liger_kernel"] or c.config["use_liger_kernel"]
    c.put("training.ligerKernel", liger, "enable_liger_kernel", "use_liger_kernel")
    c.put("training.compile", c.config["torch_compile"], "torch_compile")
