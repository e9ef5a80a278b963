"""What a figure over n prompts can show: intervals of shares and means, and whether two settings differ.

Shares from 0 to 1. Every interval is 95 %. The bootstrap draws prompts, never
single answers: two answers to one prompt are not independent.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
RESAMPLES = 10_000
SEED = 0  # of the resampling: the same values give the same interval
CHUNK = 1 << 22  # numbers drawn at once: 32 MB

Interval = tuple[float, float]


class Difference(NamedTuple):
    """Of the second setting to the first, over the same prompts."""

    value: float
    low: float
    high: float
    p: float  # two-sided


def wilson(successes: float, n: int, confidence: float = CONFIDENCE) -> Interval:
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


def resampled_sums(rows: ArrayLike) -> np.ndarray:
    """Sums over n rows drawn with replacement from rows (n, m) -> (RESAMPLES, m). rows: a prompt each."""
    rows = np.asarray(rows, dtype=np.float64)
    # How often each distinct row is drawn is multinomial: ratings have five, so that n costs nothing.
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    generator = np.random.default_rng(SEED)
    step = max(1, CHUNK // len(distinct))
    sizes = [min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step)]
    return np.concatenate([generator.multinomial(len(rows), counts / len(rows), size) @ distinct for size in sizes])


def percentile_interval(resampled: ArrayLike) -> Interval:
    """The middle of what a figure came to in the resamples (R,). Those in which it is undefined (nan) do not count;
    (nan, nan) where it is undefined in all."""
    resampled = np.asarray(resampled, dtype=np.float64)
    defined = resampled[~np.isnan(resampled)]
    if not len(defined):
        return math.nan, math.nan
    low, high = np.quantile(defined, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def bootstrap_mean(values: Sequence[float]) -> Interval:
    """Percentile bootstrap of the mean over prompts: values (n,), one a prompt; n are drawn with replacement.

    (nan, nan) without values.
    """
    if not len(values):
        return math.nan, math.nan
    sums = resampled_sums(np.reshape(values, (-1, 1)))
    return percentile_interval(sums[:, 0] / len(values))


def paired_bootstrap(first: Sequence[float], second: Sequence[float]) -> Difference:
    """How far the mean of second (n,) is above that of first (n,), prompt by prompt. n >= 1.

    p is twice the share of resamples in which the difference has the other sign or none, but never below 2^(1 - m), the
    chance that all of the m prompts that differ do so in one direction. Of few prompts a bootstrap alone would give p
    near 0.
    """
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    means = resampled_sums(differences[:, None])[:, 0] / len(differences)
    return resampled_difference(float(differences.mean()), means, np.count_nonzero(differences))


def resampled_difference(value: float, resampled: np.ndarray, n_differing: int) -> Difference:
    """A difference, with what it came to in the resamples (R,), of which nan do not count. p as in paired_bootstrap."""
    defined = resampled[~np.isnan(resampled)]
    smaller = min((defined <= 0).sum(), (defined >= 0).sum())
    p = min(1.0, max(2.0 ** (1 - n_differing), 2 * (smaller + 1) / (len(defined) + 1)))
    return Difference(value, *percentile_interval(defined), p)


def newcombe(both: int, only_first: int, only_second: int, neither: int) -> Interval:
    """Newcombe's (1998) interval of the second share minus the first, over the same prompts: his method 10 for pairs.

    Wilson's intervals of the two shares, put together as far as the prompts make them go together (phi). Like Wilson's
    it has a width where a bootstrap has none: where all prompts are alike. counts: of prompts; at least one.
    """
    n = both + only_first + only_second + neither
    counts = (both + only_first, both + only_second)
    first, second = (count / n for count in counts)
    (first_low, first_high), (second_low, second_high) = (wilson(count, n) for count in counts)
    excess = both * neither - only_first * only_second
    if excess > 0:
        excess = max(excess - n / 2, 0)  # a continuity correction: few prompts do not show that the two go together
    product = math.prod(count * (n - count) for count in counts)
    phi = excess / math.sqrt(product) if product else 0.0

    def distance(of_first: float, of_second: float) -> float:
        return math.sqrt(of_first**2 - 2 * phi * of_first * of_second + of_second**2)

    difference = second - first
    low = difference - distance(first_high - first, second - second_low)
    high = difference + distance(first - first_low, second_high - second)
    return low, high


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test: only the prompts on which two settings differ count.

    only_first, only_second: prompts with the property in one of the two settings alone. p = 2 P(X <= min) for
    X ~ Binomial(n, 1/2), at most 1; 1 where the settings never differ.
    """
    n, smaller = only_first + only_second, min(only_first, only_second)
    # Whole numbers, for a float cannot hold 2**1024; each coefficient from the last, for MMLU has thousands of them.
    coefficient = tail = 1
    for k in range(smaller):
        coefficient = coefficient * (n - k) // (k + 1)
        tail += coefficient
    return min(1.0, 2 * tail / 2**n)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value for wins and losses that are as likely; ties do not count. McNemar's test is this one."""
    return mcnemar(wins, losses)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values of a family of tests, in their order: the chance that any of them errs stays
    below the level that each is compared with."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()
