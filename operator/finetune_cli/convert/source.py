"""Reads a YAML or JSON file and remembers on which line every value stands."""

import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Place = tuple[str | int, ...]
"""Where a value stands in its file: keys and indices from the top."""

_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_FLOAT = re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?[eE][-+]?\d+$")


class SourceError(Exception):
    """The file cannot be read; the message has its name and the line."""


class _Loader(yaml.SafeLoader):
    """YAML as LLaMA-Factory reads it: `1e-4` is a number, although YAML 1.1 calls it a string."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


@dataclass(frozen=True, slots=True)
class Source:
    """A file's content and its lines."""

    name: str
    """As it is shown in messages."""
    folder: Path
    """Where relative paths of the file start."""
    data: Any
    lines: dict[Place, int]

    def at(self, *place: str | int) -> str:
        """`file:line` of a value, or of the nearest thing around it that has a line."""
        while place and place not in self.lines:
            place = place[:-1]
        return f"{self.name}:{self.lines[place]}" if place else self.name


def read_source(path: Path, name: str | None = None) -> Source:
    """Reads a file.

    Args:
        path: the file; JSON is read as the part of YAML that it is.
        name: how messages call it; absent: its path.

    Raises:
        SourceError: it is not there, is not YAML, has a key twice, or holds what YAML's plain types cannot.
    """
    shown = name or str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{shown}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if path.suffix == ".json":
        text = text.replace("\t", " ")  # YAML refuses tabs between tokens; JSON has none inside a string
    lines: dict[Place, int] = {}
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        data = _value(loader, node, (), lines, shown) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{shown}:{mark.line + 1}" if mark else shown
        raise SourceError(f"{where}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise SourceError(f"{shown}: not valid YAML: {error}") from error
    finally:
        loader.dispose()
    return Source(shown, path.resolve().parent, data, lines)


def _value(loader: _Loader, node: yaml.Node, place: Place, lines: dict[Place, int], shown: str) -> Any:
    if isinstance(node, yaml.CollectionNode) and node.tag not in _COLLECTIONS:
        raise SourceError(f"{shown}:{node.start_mark.line + 1}: not valid YAML here: the tag `{node.tag}`")
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, child, (*place, i), lines, shown) for i, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        text: Any = node.value if node.tag == _TIMESTAMP else loader.construct_object(node, deep=True)
        return text
    _refuse_duplicates(loader, node, shown)
    loader.flatten_mapping(node)
    result: dict[Any, Any] = {}
    for key_node, child in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise SourceError(f"{shown}:{key_node.start_mark.line + 1}: a key must be a plain word")
        lines[(*place, str(key))] = key_node.start_mark.line + 1
        result[str(key)] = _value(loader, child, (*place, str(key)), lines, shown)
    return result


def _refuse_duplicates(loader: _Loader, node: yaml.MappingNode, shown: str) -> None:
    first: dict[str, int] = {}
    for key_node, _ in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in first and key != "<<":
            raise SourceError(f"{shown}:{line}: `{key}` stands here and on line {first[key]}; remove one of them")
        first[key] = line
