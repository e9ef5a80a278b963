"""Kappas, correlations and alpha against scikit-learn, scipy and krippendorff, and at their ends."""

import itertools
import math
import random

import krippendorff
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from psysafe.evaluation import kappa
from psysafe.evaluation.kappa import OF_TWO, coincidences, label_table


def drawn(seed: int, n: int = 0) -> list[tuple[int, int]]:
    """Pairs of ratings that agree more often than by chance; the second rater never gives a 4."""
    draw = random.Random(seed)
    pairs = [(draw.randint(1, 5), draw.choice([1, 2, 3, 5])) for _ in range(n or draw.randint(3, 60))]
    return [(a, a if draw.random() < 0.3 and a != 4 else b) for a, b in pairs]


REFERENCES = {
    "equal %": lambda a, b: 100 * metrics.accuracy_score(a, b),
    "Cohen's kappa": metrics.cohen_kappa_score,
    # All five labels: scikit-learn counts distances between the labels that it sees.
    "quadratic kappa": lambda a, b: metrics.cohen_kappa_score(a, b, weights="quadratic", labels=range(1, 6)),
    "Spearman": lambda a, b: stats.spearmanr(a, b).statistic,
    "Pearson": lambda a, b: stats.pearsonr(a, b).statistic,
}


@pytest.mark.parametrize("name", OF_TWO)
def test_two_raters_against_the_references(name):
    tables = [label_table(drawn(seed), 6) for seed in range(30)]
    expected = [REFERENCES[name](*zip(*drawn(seed), strict=True)) for seed in range(30)]
    assert OF_TWO[name](np.array(tables)) == pytest.approx(expected, abs=1e-12)  # as many tables at once
    assert OF_TWO[name](tables[0]) == pytest.approx(expected[0], abs=1e-12)


@pytest.mark.parametrize(("name", "level"), [("nominal_alpha", "nominal"), ("interval_alpha", "interval")])
def test_alpha_against_krippendorff(name, level):
    for seed in range(10):
        draw = random.Random(seed)
        truth = [draw.randint(1, 5) for _ in range(30)]
        raters = [[t if draw.random() < 0.6 else draw.randint(1, 5) if draw.random() < 0.7 else None for t in truth]
                  for _ in range(2 + seed % 4)]  # fmt: skip
        units = [[label for label in unit if label is not None] for unit in zip(*raters, strict=True)]
        table = sum(coincidences(unit, 6) for unit in units)
        data = [[math.nan if label is None else label for label in rater] for rater in raters]
        assert getattr(kappa, name)(table) == pytest.approx(
            krippendorff.alpha(data, level_of_measurement=level), abs=1e-12)  # fmt: skip


def test_at_their_ends():
    def kappas(*pairs):
        return [float(OF_TWO[name](label_table(pairs, 6))) for name in ("Cohen's kappa", "quadratic kappa")]

    assert kappas(*[(1, 1)] * 5) == [1.0, 1.0]  # one label throughout
    assert kappas((0, 1), (1, 0)) == [-1.0, -1.0]
    assert kappas(*itertools.product((0, 1), repeat=2)) == [0.0, 0.0]
    assert all(map(math.isnan, kappas()))
    same = label_table([(3, 3)] * 4, 6)
    assert math.isnan(kappa.pearson(same)) and math.isnan(kappa.spearman(same)) and kappa.nominal_alpha(same * 2) == 1
    assert coincidences([4], 6).sum() == 0 and math.isnan(kappa.nominal_alpha(coincidences([], 6)))
