"""Names, labels and the owner that all objects of an attempt share."""

from typing import Any

from finetune_api.job import API_VERSION, KIND, LABEL_ATTEMPT, LABEL_JOB_NAME, LABEL_JOB_UID, FineTuneJob
from finetune_operator.core.names import attempt_name, label_value


def attempt_labels(job: FineTuneJob, attempt: int) -> dict[str, str]:
    """Labels of the objects and pods of one attempt; as a selector they match its pods alone."""
    return {
        LABEL_JOB_NAME: label_value(job.metadata.name),
        LABEL_JOB_UID: job.metadata.uid,
        LABEL_ATTEMPT: str(attempt),
    }


def build_metadata(job: FineTuneJob, attempt: int) -> dict[str, Any]:
    """Metadata of an attempt's object. `blockOwnerDeletion: false` spares the right to set finalizers on FineTuneJobs."""
    labels = {
        **attempt_labels(job, attempt),
        "app.kubernetes.io/name": "finetune-trainer",
        "app.kubernetes.io/managed-by": "finetune-operator",
    }
    owner = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": job.metadata.name,
        "uid": job.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }
    return {
        "name": attempt_name(job.metadata.name, attempt),
        "namespace": job.metadata.namespace,
        "labels": labels,
        "ownerReferences": [owner],
    }
