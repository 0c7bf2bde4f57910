"""Turns a record of any format into a conversation or a text. Owns what a record must look like; names are `layout`'s."""

import json
from typing import Any, NamedTuple

from finetune_api.spec import ColumnsSpec, DatasetFormat
from finetune_trainer.data import layout as layouts
from finetune_trainer.data.images import PLACEHOLDER, Image, read_images
from finetune_trainer.data.layout import FUNCTION_CALL, Layout, layout_of
from finetune_trainer.data.records import Record
from finetune_trainer.data.tools import read_calls, read_tools, without_nulls
from finetune_trainer.data.unicode import valid
from finetune_trainer.errors import DataError

_PASSED_ON = ("name", "tool_call_id")
"""Of a tool's turn in Messages: some templates show them."""


class Message(NamedTuple):
    role: str
    content: str
    tool_calls: list[dict[str, Any]] | None = None
    more: dict[str, str] | None = None
    """Other keys of the turn that templates know."""

    def as_turn(self, *, in_parts: bool = False) -> dict[str, Any]:
        """What a chat template gets.

        Args:
            in_parts: the template wants a list of texts and images as content (see `chat_templates.wants_parts`).
        """
        content: Any = _parts(self.content) if in_parts else self.content
        turn: dict[str, Any] = {"role": self.role, "content": content, **(self.more or {})}
        return {**turn, "tool_calls": self.tool_calls} if self.tool_calls else turn


class Sample(NamedTuple):
    """Exactly one of `messages` and `text` is set."""

    messages: list[Message] | None
    text: str | None
    place: str
    tools: list[dict[str, Any]] | None = None
    images: tuple[Image, ...] = ()


def _parts(content: str) -> list[dict[str, str]]:
    """Such templates set images apart by themselves, so the line breaks around a placeholder go."""
    first, *others = content.split(PLACEHOLDER)
    parts = [{"type": "text", "text": first.rstrip("\n") if others else first}]
    for text in others:
        parts += [{"type": "image"}, {"type": "text", "text": text.strip("\n")}]
    return [part for part in parts if part["type"] == "image" or part["text"]]


def detect(record: Record, columns: ColumnsSpec | None = None) -> Layout:
    """The format of a data set, by the keys of its first record.

    Raises:
        DataError: no format has these keys.
    """
    layout = layouts.detect(record.value, columns)
    if layout is not None:
        return layout
    wanted = ", ".join(
        f"{form} ({' and '.join(f'`{k}`' for k in layout_of(form).required)})" for form in layouts.COLUMNS
    )
    have = ", ".join(f"`{k}`" for k in sorted(record.value)) or "none"
    raise DataError(
        f"{record.place}: no known format has these keys: {have}; allowed are {wanted}, or other names through "
        "`datasets.columns`"
    )


def to_sample(record: Record, layout: Layout) -> Sample:
    """Reads one record.

    Raises:
        DataError: a key is missing, a value is not text, a role is unknown, or the conversation is empty.
    """
    for key in layout.required:
        if key not in record.value:
            raise DataError(
                f"{record.place}: the key `{key}` is missing; {layout.form} needs {_quoted(layout.required)}"
            )
    if layout.form is DatasetFormat.TEXT:
        key = layout.columns["text"]
        return Sample(None, _text(record, key, record.value[key]), record.place)
    record = _own_keys(record, layout) if record.of_table else record
    messages = _alpaca(record, layout) if layout.form is DatasetFormat.ALPACA else _turns(record, layout)
    if not messages:
        raise DataError(f"{record.place}: the conversation is empty")
    key = layout.columns["tools"]
    tools = read_tools(record.value.get(key), record.place, key)
    key = layout.columns["images"]
    images = read_images(record.value.get(key), key, record.place, record.folder)
    return Sample(messages, None, record.place, tools, images)


def _own_keys(record: Record, layout: Layout) -> Record:
    """A table's row whose functions and calls have the keys that they were written with."""
    tools, messages = layout.columns["tools"], layout.columns.get("messages", "")
    value = {**record.value, tools: without_nulls(record.value.get(tools))}
    if isinstance(value.get(messages), list):
        value[messages] = [_own_calls(turn) for turn in value[messages]]
    return record._replace(value=value)


def _own_calls(turn: Any) -> Any:
    calls = turn.get("tool_calls") if isinstance(turn, dict) else None
    return {**turn, "tool_calls": without_nulls(calls)} if calls else turn


def _alpaca(record: Record, layout: Layout) -> list[Message]:
    value, names = record.value, layout.columns
    question = _text(record, names["prompt"], value[names["prompt"]])
    extra = _text(record, names["query"], value.get(names["query"]) or "")
    messages = _system(record, layout)
    key = names["history"]
    for number, pair in enumerate(_list(record, key) if value.get(key) else []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{record.place}: `{key}[{number}]` must be a pair [instruction, output]")
        messages.append(Message("user", _text(record, f"{key}[{number}][0]", pair[0])))
        messages.append(Message("assistant", _text(record, f"{key}[{number}][1]", pair[1])))
    messages.append(Message("user", "\n\n".join(part for part in (question, extra) if part)))
    messages.append(Message("assistant", _text(record, names["response"], value[names["response"]])))
    return messages


def _turns(record: Record, layout: Layout) -> list[Message]:
    """ShareGPT and Messages; an error names the key as this data set has it. A system turn counts before the column."""
    key = layout.columns["messages"]
    messages = [_turn(record, layout, f"{key}[{number}]", turn) for number, turn in enumerate(_list(record, key))]
    if not messages or messages[0].role != "system":
        messages = _system(record, layout) + messages
    if layout.form is DatasetFormat.SHARE_GPT and all(message.role == "system" for message in messages):
        return []
    return messages


def _turn(record: Record, layout: Layout, at: str, turn: Any) -> Message:
    name = _field(record, at, turn, layout.role_key)
    role = layout.roles.get(name)
    if role is None:
        raise DataError(
            f"{record.place}: `{at}.{layout.role_key}` must be one of {_quoted(layout.roles)}, got `{name}`"
        )
    content_at = f"{at}.{layout.content_key}"
    if role == FUNCTION_CALL:
        text = _field(record, at, turn, layout.content_key)
        return Message("assistant", "", read_calls(text, record.place, content_at))
    calls = turn.get("tool_calls") if layout.form is DatasetFormat.MESSAGES else None
    if calls and role == "assistant":
        text = turn.get(layout.content_key) or ""  # may be null or absent beside calls
        return Message(role, _text(record, content_at, text), read_calls(calls, record.place, f"{at}.tool_calls"))
    content = _field(record, at, turn, layout.content_key)
    kept = [k for k in _PASSED_ON if isinstance(turn.get(k), str)] if role == "tool" else []
    return Message(role, content, more={k: _text(record, f"{at}.{k}", turn[k]) for k in kept} or None)


def _system(record: Record, layout: Layout) -> list[Message]:
    key = layout.columns.get("system", "")
    text = record.value.get(key)
    return [Message("system", _text(record, key, text))] if text else []


def _list(record: Record, key: str) -> list[Any]:
    value = record.value[key]
    if isinstance(value, str) and value.lstrip().startswith("["):  # CSV has no lists, and Parquet is often written so
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{record.place}: `{key}` must be a list of turns or its JSON text: {error}") from error
    if not isinstance(value, list):
        raise DataError(f"{record.place}: `{key}` must be a list of turns")
    return value


def _field(record: Record, at: str, turn: Any, key: str) -> str:
    if not isinstance(turn, dict) or key not in turn:
        raise DataError(f"{record.place}: `{at}` must be an object with the key `{key}`")
    return _text(record, f"{at}.{key}", turn[key])


def _text(record: Record, at: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{record.place}: `{at}` must be a string, got {type(value).__name__}")
    valid(value, record.place, at)
    return value


def _quoted(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)
