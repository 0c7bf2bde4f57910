"""The state of one conversion: the manifest so far, what was said about which key, what is wrong."""

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from finetune_cli.convert.config import Config, Note, Problem
from finetune_cli.convert.keys import KEYS
from finetune_cli.convert.table import Fate


@dataclass(frozen=True, slots=True)
class Options:
    """What a LLaMA-Factory file does not say and a job has to know."""

    name: str | None = None
    namespace: str | None = None
    num_nodes: int = 1
    num_proc_per_node: int = 1
    model_uri: str | None = None
    data_uri: str | None = None
    output_uri: str | None = None
    cache_uri: str | None = None
    benchmark_uri: str | None = None
    chat_template: str | None = None
    hub_secret: str | None = None
    wandb_secret: str | None = None

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.num_proc_per_node


@dataclass(slots=True)
class Conversion:
    """Collects a job's spec. Rules read `config` and call `put`, `note` and `refuse`; each key has to get one of them."""

    config: Config
    options: Options
    spec: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    accounted: dict[str, list[str]] = field(default_factory=dict)
    """For each key that was read: the fields that it decided, none where it was noted or refused."""

    def put(self, path: str, value: Any, *keys: str) -> None:
        """Sets a field of `spec`, decided by these keys."""
        block = self.spec
        *parents, last = path.split(".")
        for parent in parents:
            block = block.setdefault(parent, {})
        block[last] = value
        self.settle(path, *keys)

    def settle(self, path: str, *keys: str) -> None:
        """Says that these keys decided a field."""
        for key in keys:
            if key in self.config:
                self.accounted.setdefault(key, []).append(path)

    def note(self, key: str, text: str, *more: str) -> None:
        """Tells the reader something about a key, be it in the file or not."""
        written = self.config.shown(key) if key in self.config.source.data else f"`{key}` is not set"
        self.notes.append(Note(self.config.source.at(key), f"{written}: {text}"))
        self._mention(key, *more)

    def say(self, place: str, text: str) -> None:
        """Tells the reader something about a file that the configuration names; once."""
        if (note := Note(place, text)) not in self.notes:
            self.notes.append(note)

    def refuse(self, key: str, what: str, instead: str, *more: str) -> None:
        """Refuses the configuration because of a key."""
        self.problems.append(Problem(self.config.source.at(key), f"{self.config.shown(key)}: {what}", instead))
        self._mention(key, *more)

    def _mention(self, *keys: str) -> None:
        for key in keys:
            self.accounted.setdefault(key, [])


def apply_static(conversion: Conversion) -> None:
    """Notes and refusals that need no rule: the keys without effect, the refused ones, and their parts."""
    for name, value in conversion.config.given.items():
        key = KEYS[name]
        match key.fate:
            case Fate.NO_EFFECT:
                conversion.note(name, f"no effect here: {key.text}")
            case Fate.PART:
                conversion.note(name, f"no effect here: {key.text} (`{key.part_of}`), which is refused when it is on")
            case Fate.REFUSED if any(
                value == off and isinstance(value, bool) is isinstance(off, bool) for off in key.off
            ):
                conversion.note(name, "asks for nothing that is not so here anyway")
            case Fate.REFUSED if name == "hf_hub_token" and conversion.options.hub_secret:
                conversion.note(name, "not copied; the job reads the token from the Secret")
            case Fate.REFUSED:
                conversion.refuse(name, key.text, key.instead)
            case Fate.TRANSLATED:
                pass


def decimal(value: float) -> str:
    """A number as the decimal string that `spec` has: short, and without an exponent where that reads better."""
    exact = Decimal(repr(float(value))).normalize()
    plain = format(exact, "f")
    return plain if len(plain) <= 8 else f"{float(value):.12g}".replace("e-0", "e-").replace("e+0", "e")
