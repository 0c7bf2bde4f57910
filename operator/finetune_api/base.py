"""Building blocks of the contract: the base model and the string types that carry their own rules.

Each string type checks its rule twice from one definition: in Python (for local runs and tests) and in the API server, as a
CEL rule that the CRD generator copies out of the JSON schema. The message is the same in both places.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

VALIDATIONS = "x-kubernetes-validations"


class ApiModel(BaseModel):
    """A frozen value with camelCase names on the wire and snake_case names in Python. Unknown fields are refused."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    def to_wire(self) -> dict[str, Any]:
        """The JSON form with camelCase names and without what is absent."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def to_json(self) -> str:
        """The JSON text with camelCase names and without what is absent."""
        return self.model_dump_json(by_alias=True, exclude_none=True)


def rules(*pairs: tuple[str, str]) -> dict[str, Any]:
    """JSON schema extras that hold CEL rules, each a pair of (rule, message)."""
    return {VALIDATIONS: [{"rule": rule, "message": message} for rule, message in pairs]}


def _matching(pattern: str, message: str) -> Callable[[str], str]:
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.search(value):
            raise ValueError(f"{message}, got `{value}`")
        return value

    return check


def _text(pattern: str, message: str, max_length: int, *more: tuple[str, str]) -> Any:
    """A string type with one pattern and one message for Python and the API server (RE2 and `re` agree on these)."""
    matches = f"self.matches('{pattern}')"
    return Annotated[
        str,
        AfterValidator(_matching(pattern, message)),
        Field(max_length=max_length, json_schema_extra=rules((matches, message), *more)),
    ]


_DECIMAL = r"^(0|[1-9][0-9]*)([.][0-9]+)?([eE][-+]?[0-9]{1,2})?$"
_NO_PARENT = r"(/([^./][^/]*|[.][^./][^/]*|[.]{2}[^/]+))*/?$"
"""Path segments without `.` and `..`."""


def _decimal(message: str, rule: str, check: Callable[[float], bool]) -> Any:
    def in_range(value: str) -> str:
        if not check(float(value)):
            raise ValueError(f"{message}, got `{value}`")
        return value

    return Annotated[
        str,
        AfterValidator(_matching(_DECIMAL, message)),
        AfterValidator(in_range),
        Field(max_length=24, json_schema_extra=rules((f"self.matches('{_DECIMAL}') && {rule}", message))),
    ]


PositiveDecimal = _decimal(
    'must be a decimal number above 0 and at most 1, in quotes, such as "0.0002" or "2e-4"',
    "double(self) > 0.0 && double(self) <= 1.0",
    lambda x: 0 < x <= 1,
)
"""A learning rate."""
Ratio = _decimal(
    'must be a decimal number from 0 up to, but not including, 1, in quotes, such as "0.03"',
    "double(self) < 1.0",
    lambda x: x < 1,
)
"""A share: dropout, warm-up, weight decay."""
NonNegativeDecimal = _decimal(
    'must be a decimal number of 0 or more, in quotes, such as "1.0"', "double(self) >= 0.0", lambda x: x >= 0
)
"""A norm."""
LoraPlusRatio = _decimal(
    'must be a decimal number from 1 to 1000, in quotes, such as "16"',
    "double(self) >= 1.0 && double(self) <= 1000.0",
    lambda x: 1 <= x <= 1000,
)
"""A multiple of the learning rate."""
Weight = _decimal(
    'must be a decimal number above 0, in quotes, such as "0.7" or "2"', "double(self) > 0.0", lambda x: x > 0
)
"""A relative share."""

_CLAIM = r"pvc://[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
_HUB = r"hf://(datasets/)?[A-Za-z0-9][-A-Za-z0-9._]*/[A-Za-z0-9][-A-Za-z0-9._]*"

ModelUri = _text(
    r"^(hf://[A-Za-z0-9][-A-Za-z0-9._]*/[A-Za-z0-9][-A-Za-z0-9._]*$|(" + _CLAIM + r"|file://)" + _NO_PARENT + ")",
    "must be `hf://org/name`, `pvc://claim/path` or `file:///path`, without `..` in the path",
    1024,
)
DatasetUri = _text(
    r"^(hf://datasets/[A-Za-z0-9][-A-Za-z0-9._]*/[A-Za-z0-9][-A-Za-z0-9._]*|" + _CLAIM + "|file://)" + _NO_PARENT,
    "must be `hf://datasets/org/name[/path]`, `pvc://claim/path` or `file:///path`, without `..` in the path",
    1024,
)
VolumeUri = _text(
    r"^(" + _CLAIM + "|file://)" + _NO_PARENT,
    "must be `pvc://claim/path` or `file:///path` (where the trainer can write), without `..` in the path",
    1024,
)
ResourceName = _text(
    r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
    "must be the name of a Kubernetes object: lower-case letters, digits, `-` and `.`",
    253,
)
EnvVarName = _text(
    r"^[A-Za-z_][A-Za-z0-9_]*$",
    "must be an environment variable's name: letters, digits and `_`, no leading digit",
    253,
)
FileSize = _text(
    r"^[1-9][0-9]{0,8}(KB|MB|GB|KiB|MiB|GiB)$",
    "must be a whole number with KB, MB, GB, KiB, MiB or GiB, such as `5GB`",
    12,
)
"""A size as transformers' `max_shard_size` has it: powers of 1,000, or of 1,024 with an `i`."""
