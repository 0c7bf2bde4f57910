"""`spec.evaluation`: benchmarks, the best checkpoint, early stopping."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel, NonNegativeDecimal, PositiveDecimal, rules


class EvaluationMetric(StrEnum):
    EVAL_LOSS = "EvalLoss"
    TOKEN_ACCURACY = "TokenAccuracy"
    HUMAN_EVAL_PASS_AT_1 = "HumanEvalPassAt1"
    MBPP_PASS_AT_1 = "MBPPPassAt1"


class GenerationSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            (
                "self.samples == 1 || double(self.temperature) > 0.0",
                "`samples` above 1 need a `temperature` above 0, else all samples of a problem are the same",
            ),
            ("self.k.all(n, n <= self.samples)", "each of `k` must be at most `samples`"),
        )
    }

    samples: Annotated[int, Field(ge=1, le=1000)] = 1
    """Programs that are generated for each problem."""
    temperature: NonNegativeDecimal = "0"
    """0 takes the likeliest token; above, tokens are drawn."""
    top_p: PositiveDecimal = "1"
    """Draw from the likeliest tokens that together have this probability."""
    max_new_tokens: Annotated[int, Field(ge=1, le=32768)] = 512
    """Length of one answer at most."""
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 8
    """Answers that one rank generates at the same time."""
    k: Annotated[list[Annotated[int, Field(ge=1, le=1000)]], Field(min_length=1, max_length=8)] = [1]
    """pass@k is reported for each."""
    timeout_seconds: Annotated[int, Field(ge=1, le=600)] = 5
    """CPU time of one program; it is given up after four times as much wall-clock time."""


class EvaluationSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            (
                "has(self.metric) || !(self.exportBest || has(self.earlyStoppingPatience))",
                "`exportBest` and `earlyStoppingPatience` need a `metric`",
            ),
            (
                "has(self.earlyStoppingPatience) || !has(self.earlyStoppingMinDelta)",
                "`earlyStoppingMinDelta` needs `earlyStoppingPatience`",
            ),
            (
                "!has(self.metric) || !self.metric.endsWith('PassAt1') || 1 in self.generation.k",
                "this `metric` needs 1 in `generation.k`",
            ),
        )
    }

    generation: GenerationSpec = GenerationSpec()
    """How programs for benchmarks are generated and run."""
    metric: EvaluationMetric | None = None
    """What tells the best checkpoint, which is saved when it is measured and then kept, whatever `checkpoint.keep` says.
    The loss is better when it is lower, all else when it is higher. Absent: no checkpoint is the best."""
    export_best: bool = False
    """Export the best checkpoint instead of the last."""
    early_stopping_patience: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Stop after so many evaluations in a row without an improvement of `metric`; the job is then Complete."""
    early_stopping_min_delta: NonNegativeDecimal | None = None
    """Less than this is no improvement. Absent: 0."""
