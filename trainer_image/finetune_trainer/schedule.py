"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from finetune_api.launch import LaunchSchedulerParameters, LaunchTraining
from finetune_api.spec import Scheduler

INVERSE_SQRT_TIMESCALE = 10_000
"""transformers' timescale without warm-up."""


def warmup_steps(training: LaunchTraining, total_steps: int) -> int:
    """Steps in which the rate rises from 0; a share of all steps is rounded up to whole ones."""
    if training.warmup_steps is not None:
        return training.warmup_steps
    return math.ceil(training.warmup_ratio * total_steps)


def learning_rate(step: int, total_steps: int, training: LaunchTraining) -> float:
    """The learning rate of one optimizer step.

    After warm-up the courses are transformers' own of the same name (at its step - 1). Warm-up differs by one step: theirs
    spends the first step at a rate of 0, here the first step learns and the last step of warm-up is at the peak.

    Args:
        step: from 1 to `total_steps`.
        total_steps: optimizer steps of the whole job.
        training: peak, warm-up, scheduler and its parameters. Linear and Cosine would reach 0 one step after the last.
    """
    peak, warmup = training.learning_rate, warmup_steps(training, total_steps)
    if step <= warmup:
        return peak * step / warmup
    done, remaining = step - 1 - warmup, max(1, total_steps - warmup)
    return peak * _factor(training.scheduler, done, remaining, warmup, peak, training.scheduler_parameters)


def _factor(
    scheduler: Scheduler, done: int, remaining: int, warmup: int, peak: float, given: LaunchSchedulerParameters
) -> float:
    """Share of the peak after `done` of `remaining` steps that follow warm-up."""
    share = done / remaining
    match scheduler:
        case Scheduler.CONSTANT:
            return 1.0
        case Scheduler.LINEAR:
            return 1 - share
        case Scheduler.COSINE:
            return _cosine(share)
        case Scheduler.COSINE_WITH_RESTARTS:
            return _cosine(given.num_cycles * share % 1.0)
        case Scheduler.COSINE_WITH_MIN_LR:
            return _above(given.min_lr_rate, _cosine(share))
        case Scheduler.POLYNOMIAL:
            end = given.lr_end / peak
            return (1 - end) * math.pow(1 - share, given.power) + end
        case Scheduler.INVERSE_SQRT:
            timescale = given.timescale or warmup or INVERSE_SQRT_TIMESCALE
            return 1 / math.sqrt((done + timescale) / timescale)
        case Scheduler.WARMUP_STABLE_DECAY:
            decay = remaining - remaining // 3 if given.num_decay_steps is None else given.num_decay_steps
            fallen = max(0, done - (remaining - decay)) / decay
            return _above(given.min_lr_rate, _cosine(fallen))


def _cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


def _above(lowest: float, factor: float) -> float:
    return factor * (1 - lowest) + lowest
