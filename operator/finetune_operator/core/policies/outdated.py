"""An attempt of an older `spec.trainer`: the job was suspended, changed and resumed before this operator looked."""

from finetune_operator.core.lifecycle import interrupt
from finetune_operator.core.policies.start import start
from finetune_operator.core.resolve import made_from_another
from finetune_operator.core.situation import Plan, Situation


def outdated(s: Situation) -> Plan | None:
    """What the suspension would have done is done now: the pods save a checkpoint and leave, then the next attempt starts."""
    if s.attempt is None or s.child is None or not made_from_another(s.child, s.job.spec.trainer):
        return None
    return start(s.with_status(interrupt(s, "spec.trainer was changed.")))
