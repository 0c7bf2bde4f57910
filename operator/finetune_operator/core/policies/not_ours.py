"""Jobs that are left alone: being deleted, or managed by another controller."""

from finetune_api.job import MANAGED_BY
from finetune_operator.core.situation import Plan, Situation


def not_ours(s: Situation) -> Plan | None:
    """Nothing is done and nothing is written."""
    if s.job.metadata.deletion_timestamp is not None or s.job.spec.managed_by != MANAGED_BY:
        return Plan(status=s.job.status)
    return None
