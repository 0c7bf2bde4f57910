"""What each format calls its columns, turns and roles, and how a job renames them. Owns the names, reads no records."""

from dataclasses import dataclass, field
from typing import Any

from finetune_api.spec import ColumnsSpec, DatasetFormat, TagsSpec
from finetune_trainer.errors import ConfigError

COLUMNS: dict[DatasetFormat, dict[str, str]] = {
    DatasetFormat.MESSAGES: {"messages": "messages", "tools": "tools", "images": "images"},
    DatasetFormat.SHARE_GPT: {
        "messages": "conversations",
        "system": "system",
        "tools": "tools",
        "images": "images",
    },
    DatasetFormat.ALPACA: {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "history": "history",
        "system": "system",
        "tools": "tools",
        "images": "images",
    },
    DatasetFormat.TEXT: {"text": "text"},
}
"""Our names (those of `datasets.columns`) and the format's; Auto takes the first format whose required columns are all there."""
OPTIONAL: dict[DatasetFormat, tuple[str, ...]] = {DatasetFormat.MESSAGES: ("system",)}
"""Columns that count only where the job names them: Messages has its system turn in the list."""
REQUIRED: dict[DatasetFormat, tuple[str, ...]] = {
    DatasetFormat.MESSAGES: ("messages",),
    DatasetFormat.SHARE_GPT: ("messages",),
    DatasetFormat.ALPACA: ("prompt", "response"),
    DatasetFormat.TEXT: ("text",),
}
FUNCTION_CALL = "function_call"
"""Not a chat template's role: an assistant's turn whose text is the JSON of its calls."""
_ROLES: dict[DatasetFormat, dict[str, str]] = {
    DatasetFormat.MESSAGES: {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"},
    DatasetFormat.SHARE_GPT: {
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "system": "system",
        "observation": "tool",
        "tool": "tool",
        "function_call": FUNCTION_CALL,
    },
}
_KEYS = {DatasetFormat.MESSAGES: ("role", "content"), DatasetFormat.SHARE_GPT: ("from", "value")}


@dataclass(frozen=True)
class Layout:
    """One data set's names."""

    form: DatasetFormat
    columns: dict[str, str]
    """From our name to the record's."""
    role_key: str = ""
    content_key: str = ""
    roles: dict[str, str] = field(default_factory=dict)
    """From the data set's role to the chat template's, or to `FUNCTION_CALL`."""

    @property
    def required(self) -> tuple[str, ...]:
        """The columns that every record must have, by the record's names."""
        return tuple(self.columns[name] for name in REQUIRED[self.form])


def layout_of(form: DatasetFormat, columns: ColumnsSpec | None = None, tags: TagsSpec | None = None) -> Layout:
    """The names of a data set of a known format.

    A tag replaces all of the format's own names of that role.

    Raises:
        ConfigError: the job names a column or tag that the format does not have.
    """
    renamed = columns.model_dump(exclude_none=True) if columns else {}
    known = _known(form)
    if unknown := sorted(renamed.keys() - known):
        raise ConfigError(
            f"datasets.columns.{unknown[0]}: the format {form} has no such column; it has {', '.join(sorted(known))}"
        )
    names = {**COLUMNS[form], **renamed}
    if form not in _ROLES:
        if tags is not None:
            raise ConfigError(f"datasets.tags: the format {form} has no turns; set `format: ShareGPT` or `Messages`")
        return Layout(form, names)
    given = tags or TagsSpec()
    roles = dict(_ROLES[form])
    for role, tag in (
        ("user", given.user_tag),
        ("assistant", given.assistant_tag),
        ("tool", given.observation_tag),
        (FUNCTION_CALL, given.function_tag),
        ("system", given.system_tag),
    ):
        if tag is not None:
            roles = {name: value for name, value in roles.items() if value != role} | {tag: role}
    role_key, content_key = _KEYS[form]
    return Layout(form, names, given.role_tag or role_key, given.content_tag or content_key, roles)


def detect(value: dict[str, Any], columns: ColumnsSpec | None = None) -> Layout | None:
    """The first format that a record's keys fit, with the job's names for its columns; None if none does."""
    renamed = columns.model_dump(exclude_none=True) if columns else {}
    for form in COLUMNS:
        if renamed.keys() <= _known(form):
            layout = layout_of(form, columns)
            if all(key in value for key in layout.required) and _turns_fit(value, layout):
                return layout
    return None


def _known(form: DatasetFormat) -> set[str]:
    return {*COLUMNS[form], *OPTIONAL.get(form, ())}


def _turns_fit(value: dict[str, Any], layout: Layout) -> bool:
    """Messages and ShareGPT differ in their turns' keys alone once `columns` names the list of turns."""
    if not layout.roles or layout.columns["messages"] == COLUMNS[layout.form]["messages"]:
        return True
    turns = value[layout.columns["messages"]]
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and layout.role_key in turns[0]
