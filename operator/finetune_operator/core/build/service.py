"""The headless Service that gives each pod of an attempt a DNS name."""

from typing import Any

from finetune_api.job import FineTuneJob
from finetune_operator.core.build.metadata import attempt_labels, build_metadata
from finetune_operator.core.resolve import Resolved


def build_service(job: FineTuneJob, resolved: Resolved) -> dict[str, Any]:
    """Builds the Service. Names resolve before pods are ready: the ranks find each other while they start."""
    attempt = resolved.launch.attempt
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": build_metadata(job, attempt),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": attempt_labels(job, attempt),
            "ports": [{"name": "http", "port": resolved.launch.http_port, "protocol": "TCP"}],
        },
    }
