"""What a figure over n prompts can show: intervals of shares and means, and whether two settings differ.

Shares from 0 to 1. Every interval is 95 % unless another confidence is asked for.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
SEED = 0  # of the resampling: the same values give the same interval

Interval = tuple[float, float]


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval (1927) of a share: the p with |successes/n - p| <= z sqrt(p (1 - p) / n).

    Unlike the normal approximation it stays within 0 and 1, and has a width at 0 and at n successes. (0, 1) for n = 0.
    """
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, z2n = successes / n, z * z / n
    middle = (share + z2n / 2) / (1 + z2n)
    half = z * math.sqrt(share * (1 - share) / n + z2n / (4 * n)) / (1 + z2n)
    low, high = middle - half, middle + half
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)  # exact where rounding is not


def bootstrap_mean(values: Sequence[float], confidence: float = CONFIDENCE, seed: int = SEED) -> Interval:
    """Percentile bootstrap of the mean over prompts: values (n,), one a prompt; n are drawn with replacement.

    (nan, nan) without values.
    """
    x = np.asarray(values, dtype=np.float64)
    if not len(x):
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    # A row at a time: all resamples of 10,000 prompts at once would take 800 MB.
    means = [x[generator.integers(0, len(x), len(x))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test: only the prompts on which two settings differ count.

    only_first, only_second: prompts with the property in one of the two settings alone. p = 2 P(X <= min) for
    X ~ Binomial(n, 1/2), at most 1; 1 where the settings never differ.
    """
    n, smaller = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, k) for k in range(smaller + 1))
    return min(1.0, 2 * tail / 2**n)
