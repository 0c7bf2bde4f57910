"""`spec.trainer`: the pods."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel, EnvVarName, ResourceName, rules
from finetune_api.spec.common import Quantity, SecretKeyRef


class ResourcesSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            (
                "!has(self.requests) || !has(self.limits) || self.requests.all(name, !(name in self.limits)"
                " || quantity(string(self.requests[name])).compareTo(quantity(string(self.limits[name]))) <= 0)",
                "each of `requests` must be at most the same resource's `limits`",
            ),
        )
    }

    requests: Annotated[dict[str, Quantity], Field(max_length=16)] = {}
    """Minimum of each resource, as in a container's `resources.requests`."""
    limits: Annotated[dict[str, Quantity], Field(max_length=16)] = {}
    """Maximum of each resource, as in a container's `resources.limits`; GPUs (`nvidia.com/gpu`) stand here."""


class EnvVarSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            ("has(self.value) != has(self.secretKeyRef)", "set `value` or `secretKeyRef`, not both")
        ),
    }

    name: EnvVarName
    """Name of the variable."""
    value: Annotated[str, Field(max_length=4096)] | None = None
    """Its value, in the open; use `secretKeyRef` for secrets."""
    secret_key_ref: SecretKeyRef | None = None
    """The Secret that holds its value."""


class TolerationOperator(StrEnum):
    EQUAL = "Equal"
    EXISTS = "Exists"


class TaintEffect(StrEnum):
    NO_SCHEDULE = "NoSchedule"
    PREFER_NO_SCHEDULE = "PreferNoSchedule"
    NO_EXECUTE = "NoExecute"


class TolerationSpec(ApiModel):
    key: Annotated[str, Field(max_length=316)] | None = None
    """Taint key; absent with `operator: Exists` matches all."""
    operator: TolerationOperator = TolerationOperator.EQUAL
    """How `value` is compared."""
    value: Annotated[str, Field(max_length=63)] | None = None
    """Taint value, for `Equal`."""
    effect: TaintEffect | None = None
    """Taint effect; absent matches all."""
    toleration_seconds: Annotated[int, Field(ge=0)] | None = None
    """For NoExecute: stay bound so long."""


class TrainerSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            (
                "!has(self.resourcesPerNode) || !has(self.resourcesPerNode.limits)"
                " || !('nvidia.com/gpu' in self.resourcesPerNode.limits)"
                " || string(self.resourcesPerNode.limits['nvidia.com/gpu']) == string(self.numProcPerNode)",
                "`resourcesPerNode.limits['nvidia.com/gpu']` must equal `numProcPerNode`: one process drives one GPU",
            ),
        )
    }

    image: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """Trainer image; absent: the one last named here, or the operator's when the job first started: a job keeps its image."""
    num_nodes: Annotated[int, Field(ge=1, le=512)] = 1
    """Pods of the gang, spread over Kubernetes nodes."""
    num_proc_per_node: Annotated[int, Field(ge=1, le=16)] = 1
    """Processes (ranks) in each pod; one for each GPU."""
    resources_per_node: ResourcesSpec = ResourcesSpec()
    """Resources of each pod."""
    env: Annotated[list[EnvVarSpec], Field(max_length=64)] = []
    """Environment of each pod, for libraries such as NCCL."""
    node_selector: Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=16)] = {}
    """Labels that a node must have."""
    tolerations: Annotated[list[TolerationSpec], Field(max_length=16)] = []
    """Taints that the pods tolerate."""
    priority_class_name: ResourceName | None = None
    """PriorityClass of the pods."""
    service_account_name: ResourceName | None = None
    """ServiceAccount of the pods (for image pull secrets); its token is not mounted."""
