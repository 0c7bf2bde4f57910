"""Reads a FineTuneJob from a YAML file as kubectl would, and tells file and line of everything that is wrong with it."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune_api.job import API_VERSION, KIND
from finetune_operator.local import admission


class ManifestError(Exception):
    """The file cannot be run; the message has one line for each reason."""


@dataclass(frozen=True)
class Manifest:
    """One document of a file."""

    source: str
    """The file's name, for messages."""
    body: dict[str, Any]
    lines: dict[admission.Path, int]
    """The line on which each field's name stands."""
    skipped: tuple[str, ...] = ()
    """Kinds of the file's other documents."""

    def admit(self, old: dict[str, Any] | None = None) -> dict[str, Any]:
        """The object with defaults, checked as the API server would.

        Raises:
            ManifestError: it is refused.
        """
        taken, violations = admission.admit(self.body, old)
        if violations:
            raise ManifestError("\n".join(f"{self.place(violation.path)}: {violation}" for violation in violations))
        return taken

    def place(self, path: admission.Path) -> str:
        """`file:line` of a field, or of the nearest one around it that is written."""
        while path not in self.lines:
            path = path[:-1]
        return f"{self.source}:{self.lines[path]}"


def read(source: str) -> Manifest:
    """Reads the one FineTuneJob of a file; `-` is standard input.

    Raises:
        ManifestError: the file cannot be read, is no YAML, or does not hold exactly one FineTuneJob.
    """
    name = "stdin" if source == "-" else source
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise ManifestError(f"{name}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{name}: is not UTF-8 text: {error.reason} at byte {error.start}") from error
    return parse(text, name)


def parse(text: str, source: str) -> Manifest:
    """Reads the one FineTuneJob of a text; see `read`."""
    documents = []
    loader = _Loader(text)
    try:
        while loader.check_node():
            reader = _Reader(source, loader)
            node = loader.get_node()
            body = reader.read(node, ()) if node is not None else None
            if body is not None:
                documents.append((body, reader.lines))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ManifestError(f"{source}:{mark.line + 1 if mark else 1}: not YAML: {error.problem or error}") from error
    except yaml.YAMLError as error:
        raise ManifestError(f"{source}: not YAML: {error}") from error
    finally:
        loader.dispose()
    return _only_job(documents, source)


def _only_job(documents: list[tuple[Any, dict[admission.Path, int]]], source: str) -> Manifest:
    jobs = [(body, lines) for body, lines in documents if isinstance(body, dict) and body.get("kind") == KIND]
    if len(jobs) != 1:
        found = f"{len(jobs)} of them" if jobs else "none (`kind: FineTuneJob` is missing)"
        line = documents[0][1][()] if documents else 1
        raise ManifestError(f"{source}:{line}: one FineTuneJob is needed, the file has {found}")
    body, lines = jobs[0]
    if body.get("apiVersion") != API_VERSION:
        line = lines.get(("apiVersion",), lines[()])
        raise ManifestError(f"{source}:{line}: apiVersion: must be `{API_VERSION}`, got `{body.get('apiVersion')}`")
    skipped = [
        str(other.get("kind")) if isinstance(other, dict) else "?" for other, _ in documents if other is not body
    ]
    return Manifest(source, body, lines, tuple(skipped))


class _Loader(yaml.SafeLoader):
    """Scalars mean what they mean to kubectl: no dates, no base-60 numbers, and `1e-4` is a number."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith((":timestamp", ":float", ":int"))]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0o?[0-7]+|0b[01]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


class _Reader:
    """Turns one document's nodes into plain values and keeps where they stand."""

    def __init__(self, source: str, loader: _Loader) -> None:
        self.lines: dict[admission.Path, int] = {}
        self._source = source
        self._loader = loader

    def read(self, node: yaml.Node, path: admission.Path) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(child, (*path, index)) for index, child in enumerate(node.value)]
        value = self._loader.construct_object(node)
        return value if value is None or isinstance(value, str | bool | int | float) else node.value

    def _mapping(self, node: yaml.MappingNode, path: admission.Path) -> dict[str, Any]:
        own: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ManifestError(
                    f"{self._source}:{key_node.start_mark.line + 1}: a key must be a text, not a list or a mapping"
                )
            if key_node.value in own:
                field = admission.Violation((*path, str(key_node.value)), "").field
                raise ManifestError(f"{self._source}:{key_node.start_mark.line + 1}: {field}: stands here twice")
            own.add(str(key_node.value))
        self._loader.flatten_mapping(node)  # `<<`: merged keys come first, the mapping's own win
        made: dict[str, Any] = {}
        for key_node, child in node.value:
            key = str(key_node.value)
            self.lines[*path, key] = key_node.start_mark.line + 1
            made[key] = self.read(child, (*path, key))
        return made
