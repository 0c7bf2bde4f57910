"""The ConfigMap that brings `launch.json` into an attempt's pods."""

from typing import Any

from finetune_api.job import FineTuneJob
from finetune_operator.core.build.metadata import build_metadata
from finetune_operator.core.resolve import Resolved

LAUNCH_FILE = "launch.json"


def build_configmap(job: FineTuneJob, resolved: Resolved) -> dict[str, Any]:
    """Builds the ConfigMap. It may change until its Job is there, which may be refused for a while."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": build_metadata(job, resolved.launch.attempt),
        "data": {LAUNCH_FILE: resolved.launch.model_dump_json(by_alias=True, indent=2) + "\n"},
    }
