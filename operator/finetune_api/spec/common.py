"""Values that several blocks of the spec share."""

from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel, ResourceName, rules

Short = Annotated[str, Field(min_length=1, max_length=253)]


QUANTITY = "must be a positive Kubernetes quantity such as `4`, `500m` or `16Gi`"


Quantity = Annotated[
    str | int,
    Field(
        json_schema_extra=rules(
            ("isQuantity(string(self)) && quantity(string(self)).isGreaterThan(quantity('0'))", QUANTITY)
        )
        | {"x-finetune-quantity": True}
    ),
]
"""A Kubernetes quantity such as `4`, `500m` or `16Gi`."""


class SecretKeyRef(ApiModel):
    name: ResourceName
    """Secret in the job's namespace."""
    key: Short = "token"
    """Key in the Secret that holds the token."""


HUB_ONLY = "is only for `hf://` URIs; remove it or use an `hf://` URI"
