"""A configuration checked against the table: typed values, defaults behind them, and what is wrong with the rest."""

import difflib
import json
import math
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from finetune_cli.convert.keys import KEYS
from finetune_cli.convert.source import Source
from finetune_cli.convert.table import Fate, Key, Kind

SECRETS = ("_token", "_api_key", "_secret", "_webhook_url")
"""Endings of keys whose values are never repeated."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a configuration is refused."""

    place: str
    """`file:line`"""
    what: str
    instead: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.what}" + (f"\n  instead: {self.instead}" if self.instead else "")


@dataclass(frozen=True, slots=True)
class Note:
    """What a reader has to know about a conversion."""

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass(frozen=True, slots=True)
class Config:
    """What stands in the file, by key; `config[name]` is LLaMA-Factory's default where nothing does."""

    source: Source
    given: dict[str, Any]
    problems: list[Problem] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        return self.given.get(name, _names(KEYS[name].default) if KEYS[name].kind is Kind.NAMES else KEYS[name].default)

    def __contains__(self, name: str) -> bool:
        return name in self.given

    def shown(self, name: str) -> str:
        """The key as it is written: `name: value`; of secrets and of blocks the name only."""
        if name not in self.source.data or name.endswith(SECRETS) or isinstance(self.source.data[name], dict):
            return f"`{name}`"
        return f"`{name}: {show(self.source.data[name])}`"


def show(value: Any) -> str:
    """A value on one short line, as in YAML."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text.replace("\n", "\\n")
    return text if len(text) <= 60 else text[:57] + "..."


def read_config(source: Source) -> Config:
    """Checks names and types of all keys; what is wrong is collected, not raised."""
    config = Config(source, {})
    if not isinstance(source.data, dict):
        config.problems.append(Problem(source.name, "a LLaMA-Factory configuration is a mapping of keys to values"))
        return Config(Source(source.name, source.folder, {}, {}), {}, config.problems)
    for name, value in source.data.items():
        key = KEYS.get(name)
        if key is None:
            config.problems.append(_unknown(source, name))
        elif value is None:
            _null(config, key)
        elif (wrong := _wrong(key, value)) is not None:
            config.problems.append(Problem(source.at(name), f"`{name}` {wrong}"))
        else:
            config.given[name] = _typed(key, value)
    return config


def _unknown(source: Source, name: str) -> Problem:
    near = [f"`{key}`" for key in difflib.get_close_matches(name, KEYS, n=2, cutoff=0.7)]
    what = f"`{name}` is no key of LLaMA-Factory's training"
    return Problem(source.at(name), what, f"{' or '.join(near)}, or remove the line" if near else "remove the line")


def _null(config: Config, key: Key) -> None:
    if key.default is None or key.fate is not Fate.TRANSLATED:
        config.notes.append(Note(config.source.at(key.name), f"`{key.name}` is null: as if it were not there"))
        return
    what = f"`{key.name}` has no value; LLaMA-Factory's default is `{show(key.default)}`"
    config.problems.append(Problem(config.source.at(key.name), what, "a value, or remove the line"))


def _wrong(key: Key, value: Any) -> str | None:
    """What is wrong with a value; None if nothing is."""
    if isinstance(value, str) and "${" in value:
        return f"has an interpolation (`{show(value)}`), which is not resolved here; write the value itself"
    plain = _plain(key, value)
    if not _fits(key.kind, plain):
        return f"must be {key.kind}, got `{show(value)}`"
    if key.choices and plain not in key.choices:
        return f"must be one of {', '.join(f'`{c}`' for c in key.choices)}, got `{show(value)}`"
    if key.least is not None and plain < key.least:
        return f"must be at least {key.least:g}, got `{show(value)}`"
    if key.most is not None and plain > key.most:
        return f"must be at most {key.most:g}, got `{show(value)}`"
    return None


def _plain(key: Key, value: Any) -> Any:
    """YAML reads an unquoted `no` as false; where the choices have a `no`, that is meant."""
    return "no" if value is False and "no" in key.choices else value


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a number, of a size that a float has."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _fits(kind: Kind, value: Any) -> bool:
    number = is_number(value)
    match kind:
        case Kind.BOOL:
            return isinstance(value, bool)
        case Kind.INT:
            return number and float(value).is_integer()
        case Kind.FLOAT:
            return number
        case Kind.TEXT:
            return isinstance(value, str) or number
        case Kind.NAMES:
            return isinstance(value, str) or (
                isinstance(value, list) and all(isinstance(v, str | int | float) for v in value)
            )
        case Kind.MAP:
            return isinstance(value, dict) or _json_mapping(value) is not None
        case Kind.ANY:
            return True


def _typed(key: Key, value: Any) -> Any:
    value = _plain(key, value)
    match key.kind:
        case Kind.INT:
            return int(value)
        case Kind.FLOAT:
            return float(value)
        case Kind.TEXT:
            return str(value)
        case Kind.NAMES:
            return _names(value)
        case Kind.MAP:
            return value if isinstance(value, dict) else _json_mapping(value)
        case _:
            return value


def _names(value: Any) -> list[str] | None:
    if value is None:
        return None
    items = value.split(",") if isinstance(value, str) else value
    return [str(item).strip() for item in items if str(item).strip()]


def _json_mapping(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, str) or not value.startswith("{"):
        return None
    try:
        parsed = json.loads(value)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None
