"""Turns a record of any format into a conversation or a text. Owns the formats' keys and roles."""

from typing import Any, NamedTuple

from finetune_api.spec import DatasetFormat
from finetune_trainer.data.records import Record
from finetune_trainer.errors import DataError

KEYS: dict[DatasetFormat, tuple[str, ...]] = {
    DatasetFormat.MESSAGES: ("messages",),
    DatasetFormat.SHARE_GPT: ("conversations",),
    DatasetFormat.ALPACA: ("instruction", "output"),
    DatasetFormat.TEXT: ("text",),
}
"""What a record must have; Auto takes the first format whose keys are all there."""
SHARE_GPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    role: str
    content: str


class Sample(NamedTuple):
    """Exactly one of the two is set."""

    messages: list[Message] | None
    text: str | None
    place: str


def detect(record: Record) -> DatasetFormat:
    """The format of a data set, by the keys of its first record.

    Raises:
        DataError: no format has these keys.
    """
    for name, keys in KEYS.items():
        if all(key in record.value for key in keys):
            return name
    wanted = ", ".join(f"{name} ({' and '.join(f'`{k}`' for k in keys)})" for name, keys in KEYS.items())
    have = ", ".join(f"`{k}`" for k in sorted(record.value)) or "none"
    raise DataError(f"{record.place}: no known format has these keys: {have}; allowed are {wanted}")


def to_sample(record: Record, form: DatasetFormat) -> Sample:
    """Reads one record.

    Raises:
        DataError: a key is missing, a value is not text, a role is unknown, or the conversation is empty.
    """
    for key in KEYS[form]:
        if key not in record.value:
            raise DataError(f"{record.place}: the key `{key}` is missing; {form} needs {_quoted(KEYS[form])}")
    if form is DatasetFormat.TEXT:
        return Sample(None, _text(record, "text", record.value["text"]), record.place)
    messages = _CONVERSATIONS[form](record)
    if not messages:
        raise DataError(f"{record.place}: the conversation is empty")
    return Sample(messages, None, record.place)


def _alpaca(record: Record) -> list[Message]:
    value = record.value
    question = _text(record, "instruction", value["instruction"])
    extra = _text(record, "input", value.get("input") or "")
    messages = _system(record)
    for number, pair in enumerate(value.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{record.place}: `history[{number}]` must be a pair [instruction, output]")
        messages.append(Message("user", _text(record, f"history[{number}][0]", pair[0])))
        messages.append(Message("assistant", _text(record, f"history[{number}][1]", pair[1])))
    messages.append(Message("user", f"{question}\n\n{extra}" if extra else question))
    messages.append(Message("assistant", _text(record, "output", value["output"])))
    return messages


def _share_gpt(record: Record) -> list[Message]:
    messages = _system(record)
    for number, turn in enumerate(_list(record, "conversations")):
        at = f"conversations[{number}]"
        role = SHARE_GPT_ROLES.get(_field(record, at, turn, "from"))
        if role is None:
            raise DataError(
                f"{record.place}: `{at}.from` must be one of {_quoted(SHARE_GPT_ROLES)}, got `{turn['from']}`"
            )
        messages.append(Message(role, _field(record, at, turn, "value")))
    return messages if any(m.role != "system" for m in messages) else []


def _messages(record: Record) -> list[Message]:
    messages = []
    for number, turn in enumerate(_list(record, "messages")):
        at = f"messages[{number}]"
        role = _field(record, at, turn, "role")
        if role not in ROLES:
            raise DataError(f"{record.place}: `{at}.role` must be one of {_quoted(ROLES)}, got `{role}`")
        messages.append(Message(role, _field(record, at, turn, "content")))
    return messages


def _system(record: Record) -> list[Message]:
    text = record.value.get("system")
    return [Message("system", _text(record, "system", text))] if text else []


def _list(record: Record, key: str) -> list[Any]:
    value = record.value[key]
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
    return value


def _quoted(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


_CONVERSATIONS = {
    DatasetFormat.ALPACA: _alpaca,
    DatasetFormat.SHARE_GPT: _share_gpt,
    DatasetFormat.MESSAGES: _messages,
}
