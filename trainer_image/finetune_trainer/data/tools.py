"""Functions that an assistant may call, and its calls. Owns their form: that of OpenAI's API, which chat templates expect."""

import json
from typing import Any

from finetune_trainer.data.unicode import valid
from finetune_trainer.errors import DataError


def read_tools(value: Any, place: str, key: str) -> list[dict[str, Any]] | None:
    """The functions of a record; None if it has none.

    Args:
        value: a list of functions, or its JSON text (as ShareGPT has it); each bare, or as {"type": "function", "function": …}.
        place: of the record, for messages.
        key: of the record, for messages.

    Raises:
        DataError: it is neither, or no valid Unicode.
    """
    tools = _json(value, place, key) if isinstance(value, str) and value.strip() else valid(value, place, key)
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError(f"{place}: `{key}` must be a list of functions, or its JSON text")
    found = []
    for number, tool in enumerate(tools):
        at = f"{key}[{number}]"
        if isinstance(tool, str):
            tool = _json(tool, place, at)
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{place}: `{at}` must be a function with a `name`")
        found.append(tool if "function" in tool else {"type": "function", "function": tool})
    return found


def read_calls(value: Any, place: str, at: str) -> list[dict[str, Any]]:
    """The calls of one turn, as `tool_calls` of a message; arguments are objects, as templates render them.

    Args:
        value: a call {"name": …, "arguments": …}, a list of them, or the JSON text of either; each bare, or with `function`.
        place: of the record, for messages.
        at: of the record, for messages.

    Raises:
        DataError: it is none of these, or no valid Unicode.
    """
    calls = _json(value, place, at) if isinstance(value, str) else valid(value, place, at)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise DataError(f"{place}: `{at}` has no call")
    return [_call(call, place, at if len(calls) == 1 else f"{at}[{number}]") for number, call in enumerate(calls)]


def without_nulls(value: Any) -> Any:
    """Calls or functions without the keys that are null: a table's, which are other rows'. JSON text stays as it is."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _call(call: Any, place: str, at: str) -> dict[str, Any]:
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{place}: `{at}` must be a call with `name` and `arguments`")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = _json(arguments, place, f"{at}.arguments")
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, dict):
        raise DataError(f"{place}: `{at}.arguments` must be an object, or its JSON text")
    named = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {**named, "id": call["id"]} if isinstance(call.get("id"), str) else named


def _json(text: str, place: str, at: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(f"{place}: `{at}` must be JSON: {error}") from error
    return valid(value, place, at)
