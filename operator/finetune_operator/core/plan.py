"""`plan`: what to do about one job now. One pure function over a short, numbered chain of policies.

The first policy that has an answer gives it. Every answer is a whole: the actions, the status that holds once they are done,
the events, and when to look again. Planning again on the result changes nothing.
"""

from datetime import datetime

from finetune_api.job import FineTuneJob
from finetune_operator.core.lifecycle import adopt
from finetune_operator.core.observe import Observed
from finetune_operator.core.policies.complete import complete
from finetune_operator.core.policies.deadline import deadline
from finetune_operator.core.policies.failed import failed
from finetune_operator.core.policies.finished import finished
from finetune_operator.core.policies.not_ours import not_ours
from finetune_operator.core.policies.outdated import outdated
from finetune_operator.core.policies.running import running
from finetune_operator.core.policies.start import start
from finetune_operator.core.policies.suspended import suspended
from finetune_operator.core.settings import PlanConfig
from finetune_operator.core.situation import Plan, Situation

CHAIN = (
    not_ours,  # 1. being deleted, or managed by another controller: hands off
    finished,  # 2. Complete or Failed: only the TTL and left-over pods
    complete,  # 3. the whole gang succeeded (before 4 and 5: a result is not thrown away)
    suspended,  # 4. spec.suspend
    deadline,  # 5. spec.activeDeadlineSeconds
    outdated,  # 6. the attempt is one of an older spec.trainer: its pods leave, the next one follows
    failed,  # 7. the attempt ended: fail, wait, or start the next one in the same plan
    start,  # 8. no attempt runs: start one, now or after the wait
    running,  # 9. an attempt runs: say how it is
)


def plan(job: FineTuneJob, observed: Observed, now: datetime, config: PlanConfig) -> Plan:
    """Decides what to do.

    Args:
        job: the job as the API server has it.
        observed: its children and the newest progress report.
        now: the time, in UTC, to whole seconds.
        config: the installation's settings.

    Returns:
        The plan; its status is the job's own object where nothing changes.
    """
    situation = Situation(job=job, observed=observed, now=now, config=config, status=job.status)
    if not_ours(situation) is None and finished(situation) is None:
        situation = adopt(situation)
    for policy in CHAIN:
        answer = policy(situation)
        if answer is not None:
            return answer
    raise AssertionError("the last policy always answers")
