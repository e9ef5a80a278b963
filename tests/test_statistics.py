"""Intervals and tests against scipy and statsmodels, and by what they must cover."""

import math

import numpy as np
import pytest

from psysafe.evaluation.statistics import bootstrap_mean, mcnemar, wilson

CASES = [(0, 1), (1, 1), (0, 120), (3, 120), (60, 120), (117, 120), (120, 120), (13, 16), (450, 10_000)]


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize(("successes", "n"), CASES)
def test_wilson_is_statsmodels(successes, n, confidence):
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    expected = proportion.proportion_confint(successes, n, 1 - confidence, method="wilson")
    assert wilson(successes, n, confidence) == pytest.approx(expected, abs=1e-12)


def test_a_share_of_nothing_may_be_anything():
    assert wilson(0, 0) == (0.0, 1.0)


def test_bootstrap_is_scipys_but_for_chance():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).gamma(0.5, 0.1, 120)
    drawn = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(2))
    width = drawn.confidence_interval.high - drawn.confidence_interval.low
    for ours, theirs in zip(bootstrap_mean(values), drawn.confidence_interval, strict=True):
        assert abs(ours - theirs) < 0.05 * width
    assert bootstrap_mean(values) == bootstrap_mean(values)


def test_bootstrap_of_one_value_and_of_none():
    assert bootstrap_mean([0.25, 0.25]) == (0.25, 0.25)
    assert all(map(math.isnan, bootstrap_mean([])))


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (5, 0), (3, 9), (9, 3), (40, 61), (7, 7)])
def test_mcnemar_is_statsmodels_exact_test(first, second):
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    expected = tables.mcnemar([[50, first], [second, 20]], exact=True).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(min(1.0, expected), abs=1e-12)
