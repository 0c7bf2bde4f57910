"""What one row of the table of keys is, and the few ways to write one."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Fate(StrEnum):
    """What becomes of a key."""

    TRANSLATED = "translated"
    NO_EFFECT = "no effect"
    REFUSED = "refused"
    PART = "part of another key"


class Kind(StrEnum):
    """What a key's value may be."""

    BOOL = "true or false"
    INT = "a whole number"
    FLOAT = "a number"
    TEXT = "text"
    NAMES = "names, separated by commas or as a list"
    MAP = "a mapping"
    ANY = "anything"


@dataclass(frozen=True, slots=True)
class Key:
    """One key of LLaMA-Factory's training, or one that people write although it has none of that name."""

    name: str
    kind: Kind
    default: Any
    """LLaMA-Factory's own."""
    fate: Fate
    text: str
    """Translated: how. No effect: why. Refused: what the key asks for. Part: of what."""
    to: str = ""
    """Translated: the fields of `spec`."""
    instead: str = ""
    """Refused: what to use."""
    off: tuple[Any, ...] = ()
    """Refused: the values that ask for nothing, which are accepted."""
    part_of: str = ""
    """Part: the key without which this one does nothing."""
    choices: tuple[str, ...] = ()
    """All allowed values, where there are few."""
    least: float | None = None
    """The smallest allowed number."""
    most: float | None = None
    """The largest allowed number."""
    known: bool = True
    """False: LLaMA-Factory refuses the key, people write it all the same."""


def translated(name: str, kind: Kind, default: Any, to: str, text: str = "", **more: Any) -> Key:
    """A key with a counterpart; a rule reads it."""
    return Key(name, kind, default, Fate.TRANSLATED, text, to=to, **more)


def no_effect(name: str, kind: Kind, default: Any, why: str, **more: Any) -> Key:
    """A key that is accepted and cannot have an effect here."""
    return Key(name, kind, default, Fate.NO_EFFECT, why, **more)


def refused(name: str, kind: Kind, default: Any, what: str, instead: str, **more: Any) -> Key:
    """A key that asks for what is not there. Its default, false and null ask for nothing."""
    off = more.pop("off", (default, False, None))
    return Key(name, kind, default, Fate.REFUSED, what, instead=instead, off=off, **more)


def parts(parent: str, text: str, *members: tuple[str, Kind, Any]) -> tuple[Key, ...]:
    """Keys that only say more about another one, which is refused when it is on."""
    return tuple(Key(n, kind, default, Fate.PART, text, part_of=parent) for n, kind, default in members)
