"""One pure builder for each Kubernetes object of an attempt."""

from dataclasses import dataclass
from typing import Any

from finetune_api.job import FineTuneJob
from finetune_operator.core.build.configmap import build_configmap
from finetune_operator.core.build.job import build_job
from finetune_operator.core.build.service import build_service
from finetune_operator.core.resolve import Resolved
from finetune_operator.core.settings import PlanConfig

__all__ = ["AttemptObjects", "build_attempt", "build_configmap", "build_job", "build_service"]


@dataclass(frozen=True, slots=True)
class AttemptObjects:
    """The three objects of an attempt."""

    configmap: dict[str, Any]
    service: dict[str, Any]
    job: dict[str, Any]


def build_attempt(job: FineTuneJob, resolved: Resolved, config: PlanConfig, previous_end: str | None) -> AttemptObjects:
    """Builds all objects of the attempt that `resolved` describes.

    Args:
        job: the owner.
        resolved: the attempt.
        config: the installation's settings.
        previous_end: how the attempt before ended, as JSON, to be kept on the new Job.
    """
    return AttemptObjects(
        configmap=build_configmap(job, resolved),
        service=build_service(job, resolved),
        job=build_job(job, resolved, config, previous_end),
    )
