"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from finetune_api.spec import Scheduler


def learning_rate(step: int, total_steps: int, peak: float, warmup_ratio: float, scheduler: Scheduler) -> float:
    """The learning rate of one optimizer step.

    Args:
        step: from 1 to `total_steps`.
        total_steps: optimizer steps of the whole job.
        peak: the rate at the end of warm-up.
        warmup_ratio: share of all steps in which the rate rises from 0, rounded up to whole steps.
        scheduler: the course after warm-up; Linear and Cosine would reach 0 one step after the last.
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    if step <= warmup:
        return peak * step / warmup
    share = (step - 1 - warmup) / max(1, total_steps - warmup)
    if scheduler is Scheduler.CONSTANT:
        return peak
    if scheduler is Scheduler.LINEAR:
        return peak * (1 - share)
    return peak * 0.5 * (1 + math.cos(math.pi * share))
