"""Text that no tokenizer takes. Owns how it is found and named."""

from typing import Any

from finetune_trainer.errors import DataError


def valid(value: Any, place: str, at: str) -> Any:
    """A value of a record as it is: JSON's escapes can spell half of a character (`\\ud83d`), which UTF-8 cannot.

    Args:
        value: a text, or lists and objects with texts.
        place: of the record, for messages.
        at: of the value in the record, for messages.

    Raises:
        DataError: a text has a lone surrogate.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}: `{_shown(at)}` is not valid Unicode: a lone surrogate at character {error.start + 1}, as where an "
                "emoji was cut"
            ) from error
    elif isinstance(value, list):
        for number, item in enumerate(value):
            valid(item, place, f"{at}[{number}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            valid(key, place, f"{at}.{key}")
            valid(item, place, f"{at}.{key}")
    return value


def _shown(at: str) -> str:
    return at.encode(errors="backslashreplace").decode()
