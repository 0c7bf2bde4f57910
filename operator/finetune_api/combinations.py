"""Which choices go together: every refused combination, once, with its reason.

The rule of the API server, the check of a local run and the table in docs/combinations.md all come from `REFUSALS`.
"""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Combination:
    """The choices that depend on each other, as their values in the job."""

    method: str = "LoRA"
    variant: str = "LoRA"
    zero_stage: int = 0
    offload_optimizer: str = "None"
    offload_parameters: str = "None"
    precision: str = "BF16"
    optimizer: str = "AdamW"
    activation_checkpointing: str = "None"


FIELDS = {
    "method": "method",
    "variant": "adapter.variant",
    "zero_stage": "deepspeed.zeroStage",
    "offload_optimizer": "deepspeed.offloadOptimizer",
    "offload_parameters": "deepspeed.offloadParameters",
    "precision": "training.precision",
    "optimizer": "training.optimizer",
    "activation_checkpointing": "training.activationCheckpointing",
}
"""Each choice's field under `spec`."""
assert set(FIELDS) == {field.name for field in fields(Combination)}


@dataclass(frozen=True)
class Refusal:
    """Refused where every named choice has one of the given values."""

    when: dict[str, tuple[str | int, ...]]
    reason: str
    instead: str
    """What works, to follow "use"."""

    def matches(self, combination: Combination) -> bool:
        return all(getattr(combination, name) in values for name, values in self.when.items())

    @property
    def explanation(self) -> str:
        """The reason, and what to do."""
        return f"{self.reason}; use {self.instead}"

    @property
    def message(self) -> str:
        """What was chosen, and why it does not work."""
        said = " with ".join(f"`{FIELDS[n]}: {'/'.join(map(str, values))}`" for n, values in self.when.items())
        return f"{said} is refused: {self.explanation}"

    @property
    def cel(self) -> str:
        """The same condition on a job's spec; true where the job is accepted."""
        return f"!({' && '.join(_cel(name, values) for name, values in self.when.items())})"


def _cel(name: str, values: tuple[str | int, ...]) -> str:
    path = "self." + FIELDS[name]
    test = f"{path} in {list(values)!r}"
    return f"has(self.adapter) && {test}" if name == "variant" else test


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        {"offload_optimizer": ("CPU",), "optimizer": ("AdamW8bit", "PagedAdamW", "PagedAdamW8bit")},
        "DeepSpeed computes an offloaded optimizer's step on the CPU, with its own AdamW only",
        "`AdamW`, or no offloading",
    ),
    Refusal(
        {"method": ("QLoRA",), "zero_stage": (3,)},
        "bitsandbytes' quantised weights cannot be partitioned as they are loaded",
        "`deepspeed.zeroStage` 0, 1 or 2",
    ),
    Refusal(
        {"variant": ("DoRA",), "zero_stage": (3,)},
        "DoRA needs the norm of every whole weight, which ZeRO-3 keeps in parts",
        "`deepspeed.zeroStage` 0, 1 or 2",
    ),
    Refusal(
        {"activation_checkpointing": ("SelectiveOp",), "zero_stage": (3,)},
        "ZeRO-3 needs PyTorch's reentrant checkpointing, which cannot choose operators",
        "`SelectiveLayer` or `Full`",
    ),
)


def check(combination: Combination) -> str | None:
    """Why a combination is refused; None if it works."""
    return next((refusal.message for refusal in REFUSALS if refusal.matches(combination)), None)


def cel_rules() -> tuple[tuple[str, str], ...]:
    """The refusals as rules of a FineTuneJob's spec: pairs of (rule, message)."""
    return tuple((refusal.cel, refusal.message) for refusal in REFUSALS)
