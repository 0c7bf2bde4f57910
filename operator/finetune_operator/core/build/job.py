"""The Indexed Job that runs an attempt's gang."""

from typing import Any

from finetune_api.job import FineTuneJob
from finetune_operator.core.build.metadata import build_metadata
from finetune_operator.core.build.pod import build_pod_template
from finetune_operator.core.observe import ANNOTATION_PREVIOUS_END, ANNOTATION_TRAINER
from finetune_operator.core.resolve import Resolved, trainer_digest
from finetune_operator.core.settings import PlanConfig


def build_job(job: FineTuneJob, resolved: Resolved, config: PlanConfig, previous_end: str | None) -> dict[str, Any]:
    """Builds the Job. It never replaces a pod: one failure ends the gang, and the operator starts the next attempt."""
    metadata = build_metadata(job, resolved.launch.attempt)
    metadata["annotations"] = {ANNOTATION_TRAINER: trainer_digest(job.spec.trainer)}
    if previous_end is not None:
        metadata["annotations"][ANNOTATION_PREVIOUS_END] = previous_end
    num_nodes = resolved.launch.num_nodes
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "completionMode": "Indexed",
            "completions": num_nodes,
            "parallelism": num_nodes,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "template": build_pod_template(job, resolved, config),
        },
    }
