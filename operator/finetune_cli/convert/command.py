"""The subcommand `finetune convert`: the whole way from a file to a manifest or to refusals."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from finetune_cli.convert import datasets, deepspeed, emit
from finetune_cli.convert.config import Note, Problem, read_config
from finetune_cli.convert.conversion import Conversion, Options, apply_static
from finetune_cli.convert.files import is_file
from finetune_cli.convert.rules import RULES, combinations
from finetune_cli.convert.source import Source, SourceError, read_source
from finetune_cli.convert.uris import job_name

_Entry = TypeVar("_Entry", Note, Problem)
CONVERTED, REFUSED = 0, 2


class Result(NamedTuple):
    """A manifest, or what stands against it."""

    body: dict[str, Any] | None
    notes: list[Note]
    problems: list[Problem]


def convert(source: Source, options: Options, stem: str = "") -> Result:
    """Converts one configuration.

    Args:
        source: what stands in LLaMA-Factory's YAML (or JSON).
        options: what the file does not say.
        stem: the file's name, from which the job gets its own.
    """
    config = read_config(source)
    c = Conversion(config, options)
    c.problems += config.problems
    c.notes += config.notes
    apply_static(c)
    datasets.resolve(c)
    for rule in RULES:
        rule(c)
    deepspeed.translate(c)
    combinations.check(c)
    notes, problems = _sorted(c.notes), _sorted(c.problems)
    if problems:
        return Result(None, notes, problems)
    unaccounted = [name for name in config.given if name not in c.accounted]
    assert not unaccounted, f"dropped silently: {unaccounted}"
    name = options.name or job_name(stem, config["output_dir"])
    return Result(emit.manifest(name, options.namespace, c.spec), notes, [])


def render(result: Result, file: str) -> str:
    """The manifest's text, with the notes in a comment above it."""
    assert result.body is not None
    title = f"Converted by `finetune convert` from LLaMA-Factory's {file}."
    return emit.render(result.body, title, map(str, result.notes))


def _sorted(found: list[_Entry]) -> list[_Entry]:
    """Each once, in the order of the files' lines."""
    files = list(dict.fromkeys(entry.place.rpartition(":")[0] or entry.place for entry in found))

    def order(entry: _Entry) -> tuple[int, int]:
        file, _, line = entry.place.rpartition(":")
        return (files.index(file), int(line)) if line.isdigit() else (-1, 0)

    return sorted(dict.fromkeys(found), key=order)


def main(arguments: argparse.Namespace) -> int:
    """Runs the subcommand and returns the exit status."""
    given = {field.name: getattr(arguments, field.name) for field in fields(Options)}
    try:
        given["chat_template"] = _template(given["chat_template"])
        result = convert(read_source(arguments.config), Options(**given), arguments.config.stem)
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    for problem in result.problems:
        print(f"error: {problem}", file=sys.stderr)
    if result.body is None:
        count = len(result.problems)
        print(f"finetune: {arguments.config} is refused for {count} reason{'s' * (count > 1)}", file=sys.stderr)
        return REFUSED
    sys.stdout.write(render(result, arguments.config.name))
    return CONVERTED


def _template(given: str | None) -> str | None:
    """A file's text; names stay as they are."""
    if given is None or not is_file(Path(given)):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"--chat-template {given}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
