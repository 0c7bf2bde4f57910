"""What the API server says about a manifest, said without one: unknown fields, defaults, schema, CEL rules, in its own words.

Evaluates the generated CRD itself, so that a job that is run on one's own machine is refused for the same reasons and with
the same messages as in `kubectl apply`. Needs the package `common-expression-language`; nothing in a cluster imports this.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cel

from finetune_api.base import VALIDATIONS
from finetune_api.crd import custom_resource_definition

Path = tuple[str | int, ...]
Schema = dict[str, Any]
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:([numkMGTPE]|[KMGTPE]i)|[eE]([+-]?\d+))?")
_POWERS = {"n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = ("Ki", "Mi", "Gi", "Ti", "Pi", "Ei")


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong with a manifest."""

    path: Path
    message: str

    @property
    def field(self) -> str:
        """The path as the API server writes it, such as `spec.datasets.train[0].uri`."""
        text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path)
        return text.removeprefix(".")

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.path else self.message


def admit(manifest: dict[str, Any], old: dict[str, Any] | None = None) -> tuple[dict[str, Any], list[Violation]]:
    """Does what the API server does with a FineTuneJob before it stores it.

    Args:
        manifest: the object as it was written; `status` is left out, as on creation.
        old: the object that it replaces, as this function returned it; None: it is new. Rules about what may not change
            are checked against it.

    Returns:
        The object with defaults filled in, and what is wrong with it; empty if it is taken.
    """
    schema = _schema()
    taken = {key: value for key, value in manifest.items() if key != "status"}
    violations = list(_unknown(taken, schema, ()))
    defaulted = _with_defaults(taken, schema)
    assert isinstance(defaulted, dict)
    violations += _check(defaulted, schema, ())
    if not violations:
        before = None if old is None else _with_defaults(old, schema)
        violations += _rules(defaulted, before, schema, ())
    return defaulted, violations


@functools.cache
def _schema() -> Schema:
    schema: Schema = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    # `metadata` has no properties in the CRD since the API server knows it by itself.
    names = {"name": {"type": "string"}, "namespace": {"type": "string"}}
    metadata = {
        "type": "object",
        "required": ["name"],
        "properties": names,
        "x-kubernetes-preserve-unknown-fields": True,
    }
    properties = {key: value for key, value in schema["properties"].items() if key != "status"}
    return {**schema, "required": ["metadata", "spec"], "properties": {**properties, "metadata": metadata}}


def _unknown(value: Any, schema: Schema, path: Path) -> Iterator[Violation]:
    """Fields that no schema names; kubectl's default is to refuse them."""
    known = schema.get("properties")
    if isinstance(value, dict):
        for key, child in value.items():
            if key not in (known or {}) and schema.get("x-kubernetes-preserve-unknown-fields"):
                continue
            if known is not None and key not in known:
                yield Violation((*path, key), _unknown_message((*path, key), list(known)))
            elif (inner := known[key] if known is not None else schema.get("additionalProperties")) is not None:
                yield from _unknown(child, inner, (*path, key))
    elif isinstance(value, list) and "items" in schema:
        for index, child in enumerate(value):
            yield from _unknown(child, schema["items"], (*path, index))


def _unknown_message(path: Path, siblings: list[str]) -> str:
    name = str(path[-1])
    lower = {sibling.lower(): sibling for sibling in siblings}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    elsewhere = [] if near else _paths_of(name)
    hint = f"; did you mean `{lower[near[0]]}`?" if near else ""
    hint = f"; did you mean `{elsewhere[0]}`?" if elsewhere else hint
    return f'unknown field "{Violation(path, "").field}"{hint}'


def _paths_of(name: str) -> list[str]:
    """Where in a job a field of this name stands."""

    def walk(schema: Schema, path: Path) -> Iterator[str]:
        for key, child in schema.get("properties", {}).items():
            if key == name:
                yield Violation((*path, key), "").field
            yield from walk(child, (*path, key))
        if "items" in schema:
            yield from walk(schema["items"], (*path, 0))

    return list(walk(_schema(), ()))


def _with_defaults(value: Any, schema: Schema) -> Any:
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties") or {}
        filled = {
            key: child["default"] for key, child in known.items() if "default" in child and value.get(key) is None
        }
        present = {key: child for key, child in value.items() if child is not None}  # null is absence
        return {key: _with_defaults(child, known.get(key, others)) for key, child in (present | filled).items()}
    if isinstance(value, list):
        return [_with_defaults(child, schema.get("items", {})) for child in value]
    return value


def _check(value: Any, schema: Schema, path: Path) -> Iterator[Violation]:
    """The schema, in the words of the API server."""
    if schema.get("x-kubernetes-int-or-string"):
        if not isinstance(value, str | int) or isinstance(value, bool):
            yield _invalid(path, value, "must be of type integer or string")
        elif len(str(value)) > schema["maxLength"]:
            yield _invalid(path, value, f"should be at most {schema['maxLength']} chars long")
        return
    kind = schema.get("type")
    if kind is None:
        return
    if not isinstance(value, _TYPES[kind]) or (kind != "boolean" and isinstance(value, bool)):
        yield _invalid(path, value, f"must be of type {kind}")
        return
    if "enum" in schema and value not in schema["enum"]:
        allowed = ", ".join(f'"{choice}"' for choice in schema["enum"])
        yield Violation(path, f'Unsupported value: "{value}": supported values: {allowed}')
    for key, measured, too_small, text in _bounds(value, kind):
        limit = schema.get(key)
        if limit is not None and (measured < limit if too_small else measured > limit):
            yield _invalid(path, value, text.format(limit))
    yield from _children(value, schema, path)


def _children(value: Any, schema: Schema, path: Path) -> Iterator[Violation]:
    if isinstance(value, dict):
        for name in schema.get("required", []):
            if name not in value:
                yield Violation((*path, name), "Required value")
        known, others = schema.get("properties", {}), schema.get("additionalProperties") or {}
        for key, child in value.items():
            yield from _check(child, known.get(key, others), (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _check(child, schema["items"], (*path, index))
        yield from _duplicates(value, schema, path)


def _duplicates(value: list[Any], schema: Schema, path: Path) -> Iterator[Violation]:
    """Items of a list that is a map: each key once."""
    if schema.get("x-kubernetes-list-type") != "map":
        return
    seen = []
    for index, item in enumerate(value):
        keys = {key: item.get(key) for key in schema["x-kubernetes-list-map-keys"]} if isinstance(item, dict) else item
        if keys in seen:
            named = ", ".join(f"{key} `{text}`" for key, text in keys.items())
            yield Violation((*path, index), f"Duplicate value: {named}")
        seen.append(keys)


def _bounds(value: Any, kind: str) -> list[tuple[str, int, bool, str]]:
    """What a value of a kind is measured by: keyword, measure, whether the keyword is a lower bound, and the words."""
    if kind == "integer":
        return [
            ("minimum", value, True, "should be greater than or equal to {}"),
            ("maximum", value, False, "should be less than or equal to {}"),
        ]
    if kind == "string":
        return [
            ("minLength", len(value), True, "should be at least {} chars long"),
            ("maxLength", len(value), False, "should be at most {} chars long"),
        ]
    if kind == "array":
        return [
            ("minItems", len(value), True, "should have at least {} items"),
            ("maxItems", len(value), False, "should have at most {} items"),
        ]
    if kind == "object":
        return [
            ("minProperties", len(value), True, "should have at least {} properties"),
            ("maxProperties", len(value), False, "should have at most {} properties"),
        ]
    return []


def _invalid(path: Path, value: Any, text: str) -> Violation:
    shown = f"{value!r}" if isinstance(value, str | int | float) else type(value).__name__
    return Violation(path, f"{text}, got `{shown[:80]}`")


def _rules(value: Any, old: Any, schema: Schema, path: Path) -> Iterator[Violation]:
    """CEL rules, from the root down. Those that name `oldSelf` hold for changes only."""
    for entry in schema.get(VALIDATIONS, []):
        if "oldSelf" in entry["rule"] and old is None:
            continue
        if not _holds(entry["rule"], value, old):
            scalar = isinstance(value, str | int)
            yield Violation(path, f"{entry['message']}, got `{value}`" if scalar else entry["message"])
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties") or {}
        for key, child in value.items():
            before = old.get(key) if isinstance(old, dict) else None
            yield from _rules(child, before, known.get(key, others), (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            # Items of an atomic list have no older selves.
            yield from _rules(child, None, schema.get("items", {}), (*path, index))


def _holds(rule: str, value: Any, old: Any) -> bool:
    context = cel.Context()
    for name, function in _FUNCTIONS.items():
        context.add_function(name, function)
    context.add_variable("self", value)
    if old is not None:
        context.add_variable("oldSelf", old)
    result = _program(rule).execute(context)
    assert isinstance(result, bool), f"{rule} gives {result!r}"
    return result


@functools.cache
def _program(rule: str) -> Any:
    return cel.compile(rule)


def _is_quantity(text: str) -> bool:
    return _QUANTITY.fullmatch(text) is not None


def _quantity(text: str) -> float:
    """Kubernetes' CEL function of this name; a float is fine enough to compare sizes of memory."""
    found = _QUANTITY.fullmatch(text)
    if found is None:
        raise ValueError(f"`{text}` is no quantity")
    number, suffix, exponent = found[1], found[2], found[3]
    if suffix in _BINARY:
        return float(float(number) * 1024 ** (_BINARY.index(suffix) + 1))
    return float(f"{number}e{_POWERS[suffix] if suffix else exponent or 0}")


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "isQuantity": _is_quantity,
    "quantity": _quantity,
    "isGreaterThan": lambda this, other: this > other,
    "isLessThan": lambda this, other: this < other,
    "compareTo": lambda this, other: (this > other) - (this < other),
}
"""Of Kubernetes' CEL libraries, what the rules use; `x.f(y)` calls `f(x, y)`."""
