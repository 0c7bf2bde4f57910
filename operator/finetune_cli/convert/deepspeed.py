"""DeepSpeed: a file or a mapping of its settings becomes the fields that we have, the rest a raw block."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_api.deepspeed_keys import TOP_LEVEL
from finetune_cli.convert.config import Problem, is_number, show
from finetune_cli.convert.conversion import Conversion
from finetune_cli.convert.files import find
from finetune_cli.convert.source import Source, SourceError, read_source

_EXAMPLE = re.compile(r"^ds_z([0-3])_(offload_)?config\.json$")
"""Names of the files that LLaMA-Factory itself publishes."""
_PRECISIONS = {"bf16": "BF16", "bfloat16": "BF16", "fp16": "", "amp": ""}
_SHORT = ("stage", "partition_weights", "cpu_offload", "memory_efficient_linear")
"""What people write straight into `deepspeed_config`, without `zero_optimization`."""
_NO_CHECKPOINT = "state that it moves would be missing in checkpoints, and a resumed run would be another"
_MOVING = ("zenflow", "legacy_stage1", "super_offload", "ratio", "nvme_path")
"""Settings that would keep training state where checkpoints do not look."""
_OWNED = {
    "optimizer": "`optim`, `learning_rate` and their like",
    "scheduler": "`lr_scheduler_type` and warm-up",
    "activation_checkpointing": "`disable_gradient_checkpointing`",
    "torch_autocast": "`bf16`",
    "data_types": "`bf16`",
}
"""Blocks that the configuration's own keys decide."""
_SAVING = "stage3_gather_16bit_weights_on_model_save"
_SAME = {
    "gradient_clipping": "training.maxGradNorm",
    "train_micro_batch_size_per_gpu": "training.microBatchSize",
    "train_batch_size": "training.globalBatchSize",
}
"""Top-level keys that repeat what a field says."""


def translate(c: Conversion) -> None:
    """`deepspeed`, from `deepspeed` or the `deepspeed_config` that people write."""
    given = [key for key in ("deepspeed", "deepspeed_config") if key in c.config]
    if len(given) == 2:
        c.refuse(given[1], "stands beside `deepspeed`", "one of the two", given[0])
        return
    if not given:
        c.put("deepspeed.zeroStage", 0)
        return
    key = given[0]
    if key == "deepspeed_config":
        c.note(key, "LLaMA-Factory has no such key (`deepspeed: FILE` is its own); taken as that")
    source = _source(c, key)
    if source is not None:
        _Block(c, key, source).translate()
    c.settle("deepspeed", key)


def _source(c: Conversion, key: str) -> Source | None:
    """The settings and where they stand; None if they were refused, or known by the file's name."""
    value, own = c.config[key], c.config.source
    if isinstance(value, dict):
        lines = {place[1:]: line for place, line in own.lines.items() if place[0] == key}
        return Source(own.name, own.folder, value, {(): own.lines[(key,)], **lines})
    if not isinstance(value, str):
        c.refuse(key, "must be a file's path or a mapping", "`deepspeed: ds_z3_config.json`")
        return None
    if value.startswith("{"):
        try:
            return Source(own.at(key), own.folder, json.loads(value), {})
        except ValueError as error:
            c.refuse(key, f"is not JSON: {error}", "a file's path or a mapping")
            return None
    path, looked = find(c, value)
    if path is not None:
        return _read(c, key, path, value)
    if (example := _EXAMPLE.match(Path(value).name)) is None:
        c.refuse(key, f"the file is not there; looked for {looked}", "a copy of the file there")
        return None
    c.put("deepspeed.zeroStage", int(example[1]))
    if example[2]:
        c.put("deepspeed.offloadOptimizer", "CPU")
        if example[1] == "3":
            c.put("deepspeed.offloadParameters", "CPU")
    c.note(key, "the file is not there; by its name it is LLaMA-Factory's own example, which was taken")
    return None


def _read(c: Conversion, key: str, path: Path, shown: str) -> Source | None:
    try:
        source = read_source(path, shown)
    except SourceError as error:
        c.problems.append(Problem(c.config.source.at(key), str(error)))
        return None
    if isinstance(source.data, dict):
        return source
    c.problems.append(Problem(shown, "must be a mapping of DeepSpeed's settings"))
    return None


class _Block:
    """Translates one block of DeepSpeed's settings."""

    def __init__(self, c: Conversion, key: str, source: Source) -> None:
        self.c, self.key, self.source = c, key, source
        self.raw: dict[str, Any] = {}
        """What has no field."""
        self.stage = 0

    def translate(self) -> None:
        """Sets `deepspeed` from all settings."""
        rules: dict[str, Callable[[str, Any], None]] = {
            "zero_optimization": self._zero,
            "fp16": self._precision,
            "bf16": self._precision,
            "bfloat16": self._precision,
            "amp": self._precision,
            **dict.fromkeys(_OWNED, self._owned),
            "gradient_accumulation_steps": self._accumulation,
            **dict.fromkeys(_SAME, self._same),
            **dict.fromkeys(("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"), self._ours),
            **dict.fromkeys(("steps_per_print", "wall_clock_breakdown"), self._ours),
        }
        if not isinstance(self.source.data.get("zero_optimization", {}), dict):
            self._refuse("zero_optimization", "must be a mapping", "")
            return
        nested = {key: value for key, value in self.source.data.items() if key not in _SHORT}
        self._stage()
        for key, value in nested.items():
            rules.get(key, self._rest)(key, value)
        for key in _SHORT[1:]:
            if key in self.source.data:
                self._zero_key(key, self.source.data[key], (key,))
        if self.raw:
            self.c.put("deepspeed.config", self.raw)

    def _stage(self) -> None:
        zero = self.source.data.get("zero_optimization", {})
        stage = zero.get("stage", self.source.data.get("stage", 0))
        if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
            place = ("zero_optimization", "stage") if "stage" in zero else ("stage",)
            self._refuse(place, f"must be 0, 1, 2 or 3, got `{show(stage)}`", "`stage: 3`")
            return
        self.stage = stage
        self.c.put("deepspeed.zeroStage", stage)

    def _zero(self, key: str, value: dict[str, Any]) -> None:
        for name, inner in value.items():
            if name != "stage":
                self._zero_key(name, inner, (key, name))

    def _zero_key(self, name: str, value: Any, place: tuple[str, ...]) -> None:
        if name in ("offload_optimizer", "offload_param"):
            self._offload(name, value, place)
        elif name in _MOVING:
            self._moving(name, value, place)
        elif name == "cpu_offload_param":
            if value:
                self.c.put("deepspeed.offloadParameters", "CPU")
            self._note(place, f"an old key: as `offload_param` with `device: {'cpu' if value else 'none'}`")
        elif name == "cpu_offload":
            if value:
                self.c.put("deepspeed.offloadOptimizer", "CPU")
                self._note(
                    place, "offloads the optimizer, as DeepSpeed does; `offload_param` would offload the parameters too"
                )
            else:
                self._note(place, "false: nothing is offloaded")
        elif name == "partition_weights":
            if bool(value) != (self.stage == 3):
                self._refuse(
                    place, f"contradicts stage {self.stage}; weights are partitioned in stage 3", "`stage: 3` alone"
                )
            else:
                self._note(place, "no key of DeepSpeed; it is what stage 3 does" if value else "no key of DeepSpeed")
        elif name == _SAVING:
            self._note(place, "no effect: the trainer gathers the weights itself when it exports")
        elif value == "auto":
            self._note(place, "auto: left to DeepSpeed's default")
        else:
            self.raw.setdefault("zero_optimization", {})[name] = _plain(value)

    def _offload(self, name: str, value: Any, place: tuple[str, ...]) -> None:
        field = "deepspeed.offloadOptimizer" if name == "offload_optimizer" else "deepspeed.offloadParameters"
        if not isinstance(value, dict):
            self._refuse(place, f"`{name}` must be a mapping with `device`", "`device: cpu`")
            return
        device = value.get("device", "none")
        rest = {k: v for k, v in value.items() if k != "device" and v != "auto"}
        if device == "cpu":
            self.c.put(field, "CPU")
        elif device == "none":
            self._note(place, "none: nothing is offloaded")
            return
        else:
            why = _NO_CHECKPOINT if device == "nvme" else "must be cpu or none"
            self._refuse((*place, "device"), f"`{show(device)}`: {why}", "`device: cpu`")
        kept = {}
        for key, inner in rest.items():
            if key in _MOVING:
                self._moving(key, inner, (*place, key))
            else:
                kept[key] = _plain(inner)
        if kept:
            self.raw.setdefault("zero_optimization", {})[name] = kept

    def _moving(self, name: str, value: Any, place: tuple[str, ...]) -> None:
        if value in (None, False, "auto") or (name == "ratio" and value == 1):
            self._note(place, "off, as it is here")
        else:
            self._refuse(place, _NO_CHECKPOINT, "`device: cpu`, without this line")

    def _precision(self, key: str, value: Any) -> None:
        enabled = value.get("enabled", False) if isinstance(value, dict) else value
        has = self.c.spec.get("training", {}).get("precision")
        if enabled == "auto":
            self._note((key,), f"auto: `training.precision` is {has}")
        elif not enabled:
            self._note((key,), "off: `training.precision` decides")
        elif not _PRECISIONS[key]:
            self._refuse(
                (key,),
                "float16 with loss scaling is not supported",
                "`bf16` here and `bf16: true` in the configuration",
            )
        elif has not in ("BF16", "PureBF16"):
            self._refuse((key,), f"contradicts `training.precision: {has}`", "`bf16: true` in the configuration")
        else:
            self._note((key,), f"as `training.precision: {has}` has it")

    def _owned(self, key: str, _: Any) -> None:
        self._refuse((key,), "is decided by the configuration's own keys", f"{_OWNED[key]} there")

    def _same(self, key: str, value: Any) -> None:
        field = _SAME[key]
        has = self.c.spec.get("training", {}).get(field.removeprefix("training."))
        if value == "auto":
            self._note((key,), f"auto: `{field}` is {has}")
        elif not is_number(value):
            self._refuse((key,), f"must be a number or `auto`, got `{show(value)}`", "`auto`")
        elif has is None or float(value) != float(has):
            self._refuse((key,), f"`{show(value)}` contradicts `{field}`, which is {has}", "`auto`")
        else:
            self._note((key,), f"as `{field}` has it")

    def _accumulation(self, key: str, value: Any) -> None:
        has = self.c.config["gradient_accumulation_steps"]
        if value in ("auto", has):
            self._note((key,), f"`training.globalBatchSize` has it ({has})")
        else:
            self._refuse((key,), f"`{show(value)}` contradicts `gradient_accumulation_steps`, which is {has}", "`auto`")

    def _ours(self, key: str, _: Any) -> None:
        self._note((key,), "no effect: the trainer sets what it needs")

    def _rest(self, key: str, value: Any) -> None:
        if key.startswith("_"):
            self._note((key,), "left out: a comment")
        elif value == "auto":
            self._note((key,), "auto: left to DeepSpeed's default")
        elif key not in TOP_LEVEL:
            known = ", ".join(f"`{name}`" for name in TOP_LEVEL)
            self._refuse((key,), f"the trainer does not take it; there are {known}", "remove it")
        else:
            self.raw[key] = _plain(value)

    def _note(self, place: tuple[str, ...], text: str) -> None:
        self.c.say(self.source.at(*place), f"`{'.'.join(place)}`: {text}")

    def _refuse(self, place: tuple[str, ...] | str, what: str, instead: str) -> None:
        where = (place,) if isinstance(place, str) else place
        shown = f"`{'.'.join(where)}`: " if where else ""
        self.c.problems.append(Problem(self.source.at(*where), f"{shown}{what}", instead))


def _plain(value: Any) -> Any:
    """Whole numbers such as 1e9 without a fraction, as DeepSpeed wants its sizes."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
