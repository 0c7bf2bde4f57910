"""pass@k, the chance that one of k samples of a problem passes."""

import math
from collections.abc import Iterable


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate from n samples of which c are correct: 1 - C(n - c, k) / C(n, k).

    Computed as 1 - prod over i from n - c + 1 to n of (1 - k / i), without large numbers. Chen et al. 2021, "Evaluating
    Large Language Models Trained on Code", equation 1 and figure 3. (1 - (1 - c / n)^k would be biased.)

    Args:
        samples: n, at least k.
        correct: c, from 0 to n.
        k: from 1.
    """
    assert 0 <= correct <= samples and 1 <= k <= samples
    if samples - correct < k:
        return 1.0
    missed = 1.0
    for i in range(samples - correct + 1, samples + 1):
        missed *= 1.0 - k / i
    return 1.0 - missed


def mean_pass_at_k(samples: int, correct: Iterable[int], k: int) -> float:
    """The mean over problems, each with its number of correct samples; the sum is exact, so that no order shows in it."""
    values = [pass_at_k(samples, count, k) for count in correct]
    return math.fsum(values) / len(values)
