"""Intervals and tests against scipy and statsmodels, and by what they must cover."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from psysafe.evaluation import statistics
from psysafe.evaluation.statistics import (
    bootstrap_mean,
    holm,
    mcnemar,
    newcombe,
    paired_bootstrap,
    percentile_interval,
    resampled_sums,
    sign_test,
    wilson,
)

CASES = [(0, 1), (1, 1), (0, 120), (3, 120), (60, 120), (117, 120), (120, 120), (13, 16), (450, 10_000)]


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize(("successes", "n"), CASES)
def test_wilson_is_statsmodels(successes, n, confidence):
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    expected = proportion.proportion_confint(successes, n, 1 - confidence, method="wilson")
    assert wilson(successes, n, confidence) == pytest.approx(expected, abs=1e-12)


def test_a_share_of_nothing_may_be_anything():
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("values", [np.random.default_rng(1).gamma(0.5, 0.1, 120), [5] * 90 + [1] * 25 + [3] * 5])
def test_bootstrap_is_scipys_but_for_chance(values):
    """Values that are all distinct, and ratings, most of which are one."""
    stats = pytest.importorskip("scipy.stats")
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


def test_a_large_mcnemar_does_not_overflow():
    stats = pytest.importorskip("scipy.stats")
    assert mcnemar(1000, 1200) == pytest.approx(stats.binomtest(1000, 2200).pvalue, rel=1e-9)


def test_many_distinct_values_are_drawn_in_parts(monkeypatch):
    """In parts or at once: sums of n rows, of which each is drawn once on average."""
    rows = np.random.default_rng(3).normal(size=(40, 2))
    whole = resampled_sums(rows)
    monkeypatch.setattr(statistics, "CHUNK", 40 * 1000)
    assert np.array_equal(resampled_sums(rows), whole) and whole.shape == (statistics.RESAMPLES, 2)
    assert whole.mean(0) == pytest.approx(rows.sum(0), abs=0.3)
    assert np.cov(whole.T) == pytest.approx(40 * np.cov(rows.T, ddof=0), abs=3)


def test_undefined_resamples_do_not_count():
    assert percentile_interval([math.nan, 1.0, 1.0]) == (1.0, 1.0)
    assert all(map(math.isnan, percentile_interval([math.nan])))


@pytest.mark.parametrize("shift", [0.0, 0.15, 0.6])
def test_paired_bootstrap_is_scipys_but_for_chance(shift):
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(4)
    first = draw.integers(1, 6, 150).astype(float)
    second = first + draw.normal(shift, 1, 150)
    ours = paired_bootstrap(first, second)
    drawn = stats.bootstrap((second - first,), np.mean, method="percentile", rng=np.random.default_rng(5))
    theirs = drawn.confidence_interval
    assert ours.value == pytest.approx(np.mean(second - first))
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.05 * (theirs.high - theirs.low))
    p = stats.ttest_rel(second, first).pvalue  # another test of the same, close at 150 prompts
    assert ours.p == pytest.approx(p, abs=0.02)
    assert (ours.p < 0.05) == (not ours.low <= 0 <= ours.high)


# Both, only the first, only the second, neither; and the interval as printed by the R package contingencytables.
PRINTED = [((59, 6, 16, 80), (0.0046, 0.1186)), ((59, 16, 6, 80), (-0.1186, -0.0046))]


@pytest.mark.parametrize(("counts", "printed"), PRINTED)
def test_newcombe_as_printed_elsewhere(counts, printed):
    assert newcombe(*counts) == pytest.approx(printed, abs=5e-5)


@pytest.mark.parametrize(("first", "second"), [(0, 10), (4, 6), (10, 10), (25, 0), (40, 20)])
def test_newcombe_of_unrelated_settings_is_statsmodels(first, second):
    """Of shares that do not go together pairing says nothing: the interval of two independent samples."""
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    n = 100
    only_first, only_second = first * (n - second) / n, second * (n - first) / n
    counts = first * second / n, only_first, only_second, n - first - only_second
    expected = proportion.confint_proportions_2indep(second, n, first, n, method="newcomb")
    assert newcombe(*counts) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("counts", [(0, 0, 3, 0), (0, 3, 0, 0), (3, 0, 0, 0), (0, 0, 0, 1), (200, 0, 0, 200)])
def test_newcombe_has_a_width_where_every_prompt_is_alike(counts):
    low, high = newcombe(*counts)
    difference = (counts[2] - counts[1]) / sum(counts)
    assert -1 - 1e-9 < low <= difference <= high < 1 + 1e-9 and high - low > 0.005
    assert newcombe(*counts[:1], counts[2], counts[1], *counts[3:]) == pytest.approx((-high, -low))


def test_newcombe_covers_the_truth_where_a_bootstrap_does_not():
    """15 prompts, of which the second setting gets nearly all."""
    tables = np.random.default_rng(6).multinomial(15, [0.1, 0.02, 0.85, 0.03], 300)
    ends = [newcombe(*map(int, table)) for table in tables]
    drawn = [paired_bootstrap(np.repeat([1, 1, 0, 0], table), np.repeat([1, 0, 1, 0], table)) for table in tables]
    assert np.mean([low <= 0.83 <= high for low, high in ends]) >= 0.93
    assert np.mean([one.low <= 0.83 <= one.high for one in drawn]) < 0.92


def test_few_prompts_show_nothing_however_they_differ():
    assert paired_bootstrap([1.0], [5.0]).p == 1.0
    assert paired_bootstrap([1.0] * 5, [5.0] * 5).p == 0.0625
    assert paired_bootstrap([1.0] * 500, [1.0] * 495 + [5.0] * 5).p >= 0.0625
    assert paired_bootstrap([1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (7, 0), (12, 30), (30, 12), (15, 15)])
def test_sign_test_is_scipys(wins, losses):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_statsmodels(seed):
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(seed).random(7) ** 3
    p[3] = p[5]
    assert holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1], abs=1e-12)
    assert holm([]) == []


def power(n: int, difference: float, other: float) -> float:
    """Of McNemar's exact test at 5 %: of n prompts a share `other` changes in one direction, in the other a share that
    is larger by `difference`."""
    changing, total = difference + 2 * other, 0.0
    for m in range(1, n + 1):
        share = math.comb(n, m) * changing**m * (1 - changing) ** (n - m)
        if share > 1e-9:
            k = next((k for k in range(m // 2, -1, -1) if mcnemar(k, m - k) < 0.05), -1)
            p = other / changing
            total += share * sum(math.comb(m, j) * p**j * (1 - p) ** (m - j) for j in range(k + 1))
    return total


def test_the_table_of_what_n_can_show():
    """docs/selective.md: intervals of 0, 50 and 95 %, and the smallest difference found in four of five experiments."""
    page = (Path(__file__).parents[1] / "docs" / "selective.md").read_text()
    table = {int(n): row for row, n in re.findall(r"^(\| (\d+)[^|]* \| 0 to .*)$", page, re.MULTILINE)}
    assert list(table) == [100, 120, 200, 250, 500]
    for n, row in table.items():
        _, zero, half, most, difference = (cell.strip().removesuffix(" points") for cell in row.strip("|").split("|"))
        for text, share, digits in ((zero, 0, 1), (half, 0.5, 0), (most, 0.95, 0)):
            low, high = (round(100 * x, digits) for x in wilson(share * n, n))
            assert text == f"{low:g} to {high:g}", (n, text)
        for points, other in zip(map(int, difference.split(" to ")), (0.02, 0.05), strict=True):
            assert power(n, (points - 1) / 100, other) < 0.8 <= power(n, points / 100, other), (n, points, other)
