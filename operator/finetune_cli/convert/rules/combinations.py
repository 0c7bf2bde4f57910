"""What works alone and not together: the API's refusals, at LLaMA-Factory's keys."""

from finetune_api.combinations import REFUSALS, Combination
from finetune_cli.convert.conversion import Conversion

_STAGES = "`stage: 0`, 1 or 2"
_KEYS = {
    "method": ("quantization_bit", _STAGES),
    "variant": ("use_dora", _STAGES),
    "optimizer": ("optim", "`optim: adamw_torch`, or no offloading"),
}
"""The key behind a choice and what to write instead; every refusal that a file of LLaMA-Factory can meet names one of these."""


def check(c: Conversion) -> None:
    """Refuses combinations that a job cannot have. Runs last, over the whole spec."""
    deepspeed = c.spec.get("deepspeed", {})
    stage, optimizer = deepspeed.get("zeroStage", 0), deepspeed.get("offloadOptimizer", "None")
    parameters = deepspeed.get("offloadParameters", "None")
    chosen = Combination(
        method=c.spec.get("method", "LoRA"),
        variant=c.spec.get("adapter", {}).get("variant", "LoRA"),
        zero_stage=stage,
        offload_optimizer=optimizer,
        offload_parameters=parameters,
        optimizer=c.spec.get("training", {}).get("optimizer", "AdamW"),
    )
    for refusal in REFUSALS:
        if refusal.matches(chosen):
            key, instead = next(_KEYS[choice] for choice in refusal.when if choice in _KEYS)
            c.refuse(key, refusal.reason, instead)
    key = "deepspeed" if "deepspeed" in c.config else "deepspeed_config"
    if optimizer == "CPU" and stage == 0:
        c.refuse(key, "stage 0 offloads nothing", "`stage: 1`, 2 or 3")
    if parameters == "CPU" and stage != 3:
        c.refuse(key, "only stage 3 offloads parameters", "`stage: 3`")
