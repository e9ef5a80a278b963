"""How far raters agree, from tables of their labels: kappas and correlations of two, Krippendorff's alpha of many.

A table (k, k) counts how often the first rater gave the label i and the second the label j to the same answer. A label
is its own index, 0 to k - 1, so that ratings keep their distances. Every measure takes tables (..., k, k) and gives
(...): a bootstrap has thousands of them. nan stands for a measure that is undefined.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np


def label_table(pairs: Iterable[tuple[int, int]], k: int) -> np.ndarray:
    """(first rater's, second rater's) labels as a table (k, k)."""
    table = np.zeros((k, k))
    for first, second in pairs:
        table[first, second] += 1
    return table


def equal_percent(tables: np.ndarray) -> np.ndarray:
    return _ratio(100 * np.trace(tables, axis1=-2, axis2=-1), tables.sum((-2, -1)), np.nan)


def cohen_kappa(tables: np.ndarray) -> np.ndarray:
    """Unweighted: every disagreement counts the same."""
    return _kappa(tables, 1 - np.eye(tables.shape[-1]))


def quadratic_kappa(tables: np.ndarray) -> np.ndarray:
    """Weighted by the squared distance of the labels: 4 and 5 disagree less than 1 and 5."""
    return _kappa(tables, _squared_distances(tables.shape[-1]))


def _kappa(tables: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """1 - observed / expected disagreement. 1 where both raters gave one and the same label throughout, for which the
    formula has no value."""
    n, expected = tables.sum((-2, -1)), _rows(tables)[..., :, None] * _columns(tables)[..., None, :]
    observed, by_chance = (weights * tables).sum((-2, -1)), (weights * expected).sum((-2, -1))
    return np.where(n == 0, np.nan, 1 - _ratio(n * observed, by_chance, 0.0))


def pearson(tables: np.ndarray) -> np.ndarray:
    """Correlation of the labels as numbers; undefined where a rater gave one label throughout."""
    labels = np.arange(tables.shape[-1], dtype=np.float64)
    return _correlation(tables, labels, labels)


def spearman(tables: np.ndarray) -> np.ndarray:
    """Correlation of the ranks; equal labels share the mean of theirs."""
    return _correlation(tables, _midranks(_rows(tables)), _midranks(_columns(tables)))


def _correlation(tables: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x, y (..., k): what each label of the first and of the second rater stands for."""
    rows, columns, n = _rows(tables), _columns(tables), tables.sum((-2, -1))
    x = x - _ratio((rows * x).sum(-1), n, 0.0)[..., None]
    y = y - _ratio((columns * y).sum(-1), n, 0.0)[..., None]
    covariance = (tables * x[..., :, None] * y[..., None, :]).sum((-2, -1))
    return _ratio(covariance, np.sqrt((rows * x**2).sum(-1) * (columns * y**2).sum(-1)), np.nan)


def _midranks(counts: np.ndarray) -> np.ndarray:
    return counts.cumsum(-1) - (counts - 1) / 2


def coincidences(labels: Sequence[int], k: int) -> np.ndarray:
    """The labels of one answer as Krippendorff's coincidences (k, k): each ordered pair of different raters counts
    1 / (raters - 1). Zeros for fewer than two labels."""
    counts = np.bincount(labels, minlength=k).astype(np.float64) if len(labels) else np.zeros(k)
    return (np.outer(counts, counts) - np.diag(counts)) / max(len(labels) - 1, 1)


def nominal_alpha(tables: np.ndarray) -> np.ndarray:
    """Krippendorff's alpha of summed coincidences (..., k, k): every disagreement counts the same, as in kappa."""
    return _alpha(tables, 1 - np.eye(tables.shape[-1]))


def interval_alpha(tables: np.ndarray) -> np.ndarray:
    """Krippendorff's alpha by squared distance, as in quadratic kappa."""
    return _alpha(tables, _squared_distances(tables.shape[-1]))


def _alpha(tables: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """1 - observed / expected disagreement; 1 where there is one label throughout, as in `_kappa`."""
    n, expected = tables.sum((-2, -1)), _rows(tables)[..., :, None] * _rows(tables)[..., None, :]
    observed, by_chance = (weights * tables).sum((-2, -1)), (weights * expected).sum((-2, -1))
    return np.where(n == 0, np.nan, 1 - _ratio((n - 1) * observed, by_chance, 0.0))


def _squared_distances(k: int) -> np.ndarray:
    return np.subtract.outer(np.arange(k), np.arange(k)) ** 2.0


def _rows(tables: np.ndarray) -> np.ndarray:
    return tables.sum(-1)


def _columns(tables: np.ndarray) -> np.ndarray:
    return tables.sum(-2)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, otherwise: float) -> np.ndarray:
    """otherwise: where the denominator is 0."""
    result = np.full(np.broadcast(numerator, denominator).shape, otherwise)
    return np.divide(numerator, denominator, out=result, where=denominator != 0)


OF_TWO: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "equal %": equal_percent,
    "Cohen's kappa": cohen_kappa,
    "quadratic kappa": quadratic_kappa,
    "Spearman": spearman,
    "Pearson": pearson,
}
OF_MANY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "nominal alpha": nominal_alpha,
    "interval alpha": interval_alpha,
}
