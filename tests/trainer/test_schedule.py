"""Every scheduler against transformers' own of the same name."""

from typing import Any

import pytest
import torch

from finetune_api.launch import LaunchTraining
from finetune_api.spec import Scheduler
from finetune_trainer.schedule import learning_rate
from tests.trainer import jobs

TOTAL, WARMUP = 100, 10
GIVEN: dict[Scheduler, dict[str, Any]] = {
    Scheduler.COSINE_WITH_RESTARTS: {"numCycles": 3},
    Scheduler.COSINE_WITH_MIN_LR: {"minLrRate": 0.2},
    Scheduler.POLYNOMIAL: {"lrEnd": 0.001, "power": 2.0},
    Scheduler.INVERSE_SQRT: {"timescale": 25},
    Scheduler.WARMUP_STABLE_DECAY: {"minLrRate": 0.1, "numDecaySteps": 30},
}


def training(scheduler: Scheduler, **changes: Any) -> LaunchTraining:
    block = jobs.launch(jobs.Path("/x"), jobs.Path("/m"), jobs.Path("/d"))["training"]
    parameters = {**block["schedulerParameters"], **changes.pop("parameters", {})}
    values = {"learningRate": 0.5, "warmupRatio": 0.1, "scheduler": scheduler, "schedulerParameters": parameters}
    return LaunchTraining.model_validate({**block, **values, **changes})


def theirs(scheduler: Scheduler) -> list[float]:
    """transformers' rates after warm-up; its step counts from 0."""
    from transformers import optimization as o

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    ends = {"num_warmup_steps": WARMUP, "num_training_steps": TOTAL}
    made: dict[Scheduler, Any] = {
        Scheduler.CONSTANT: lambda: o.get_constant_schedule_with_warmup(optimizer, WARMUP),
        Scheduler.LINEAR: lambda: o.get_linear_schedule_with_warmup(optimizer, **ends),
        Scheduler.COSINE: lambda: o.get_cosine_schedule_with_warmup(optimizer, **ends),
        Scheduler.COSINE_WITH_RESTARTS: lambda: o.get_cosine_with_hard_restarts_schedule_with_warmup(
            optimizer, **ends, num_cycles=3
        ),
        Scheduler.COSINE_WITH_MIN_LR: lambda: o.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, **ends, min_lr_rate=0.2
        ),
        Scheduler.POLYNOMIAL: lambda: o.get_polynomial_decay_schedule_with_warmup(
            optimizer, **ends, lr_end=0.001, power=2.0
        ),
        Scheduler.INVERSE_SQRT: lambda: o.get_inverse_sqrt_schedule(optimizer, WARMUP, timescale=25),
        Scheduler.WARMUP_STABLE_DECAY: lambda: o.get_wsd_schedule(
            optimizer, **ends, num_decay_steps=30, decay_type="cosine", min_lr_ratio=0.1
        ),
    }
    factor = made[scheduler]().lr_lambdas[0]
    return [0.5 * factor(step) for step in range(WARMUP, TOTAL)]


@pytest.mark.parametrize("scheduler", list(Scheduler))
def test_the_course_is_transformers_own(scheduler: Scheduler) -> None:
    given = training(scheduler, parameters=GIVEN.get(scheduler, {}))
    rates = [learning_rate(step, TOTAL, given) for step in range(1, TOTAL + 1)]
    assert rates[:WARMUP] == pytest.approx([0.5 * step / WARMUP for step in range(1, WARMUP + 1)])
    assert rates[WARMUP:] == pytest.approx(theirs(scheduler), rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "step", "share"),
    [
        ({"warmupSteps": 4, "warmupRatio": 0.0}, 2, 0.5),
        ({"warmupSteps": 0, "warmupRatio": 0.0}, 1, 1.0),
        ({"warmupSteps": 200, "warmupRatio": 0.0}, 100, 0.5),
        ({"scheduler": "InverseSqrt"}, 21, 1 / 2**0.5),
        ({"scheduler": "WarmupStableDecay"}, 41, 1.0),
        ({"scheduler": "WarmupStableDecay"}, 71, 0.5),
    ],
    ids=["warm-up", "none", "longer-than-the-run", "timescale-is-warm-up", "a-third-is-stable", "half-of-the-decay"],
)
def test_what_is_chosen_where_nothing_is_said(changes: dict[str, Any], step: int, share: float) -> None:
    given = training(Scheduler(changes.pop("scheduler", "Linear")), **changes)
    assert learning_rate(step, TOTAL, given) == pytest.approx(0.5 * share)
