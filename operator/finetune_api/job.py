"""The FineTuneJob resource and the names around it."""

from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.alias_generators import to_camel

from finetune_api.base import ApiModel
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus

GROUP = "finetune.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"
SHORT_NAME = "ftj"
MANAGED_BY = "finetune.dev/finetune-operator"

LABEL_JOB_NAME = f"{GROUP}/job-name"
LABEL_JOB_UID = f"{GROUP}/job-uid"
LABEL_ATTEMPT = f"{GROUP}/attempt"


class ObjectMeta(ApiModel):
    """The part of Kubernetes' metadata that is read here; the rest is kept out on purpose."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)

    name: str
    namespace: str = "default"
    uid: str = ""
    generation: int = 1
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None


class FineTuneJob(ApiModel):
    """A fine-tuning run: model, data and method in, adapter or model out."""

    api_version: Literal["finetune.dev/v1alpha1"] = "finetune.dev/v1alpha1"
    kind: Literal["FineTuneJob"] = "FineTuneJob"
    metadata: ObjectMeta
    spec: FineTuneJobSpec
    status: FineTuneJobStatus = FineTuneJobStatus()

    @classmethod
    def from_object(cls, body: dict[str, Any]) -> "FineTuneJob":
        """Reads an object of the API server.

        Raises:
            pydantic.ValidationError: the object does not fit this version's schema.
        """
        return cls.model_validate(body)
