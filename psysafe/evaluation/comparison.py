"""What the figures of an evaluation can carry: an interval for each, and paired tests between all settings.

A benchmark says which figures it has (`Figure`: a value for each prompt and variant), `tables` makes two tables of
them: intervals, and the difference of every pair of variants over the prompts that both have. Shares get Wilson's and
Newcombe's intervals and McNemar's exact test, means the bootstrap over prompts. The p-values of a table are one family
(Holm).
"""

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from psysafe.evaluation.criteria import Scores, mean_std
from psysafe.evaluation.result import Cell, Table
from psysafe.evaluation.statistics import (
    Difference,
    bootstrap_mean,
    holm,
    mcnemar,
    newcombe,
    paired_bootstrap,
    percentile_interval,
    resampled_difference,
    resampled_sums,
    wilson,
)

LEVEL = 0.05
SAME, TOO_SMALL, HIGHER, LOWER = "same on every prompt", "n too small to tell", "B higher", "B lower"
DIFFERENCES = "Differences between variants"  # title of a table
INTERVALS_NOTE = (
    "95 %: Wilson for shares, percentile bootstrap over prompts for means, which is too narrow for few prompts and has "
    "no width where all are alike. sd: population, over the prompts (ddof 0)."
)
DIFFERENCES_NOTE = (
    "Over the prompts that both have. from, to: 95 %, Newcombe for shares, bootstrap over prompts for means. p: "
    f"McNemar's exact test for shares, paired bootstrap for means; Holm over the table's rows, read at {LEVEL:g}. "
    f"{TOO_SMALL!r}: chance alone may explain the difference, and the true one may be as large as the interval reaches."
)
FORM, SIGNED = ".3g", "+.3g"


@dataclass(frozen=True)
class Figure:
    """A column of a table of results.

    values: variant -> prompt (or what else names an item) -> its value; of a share 0 or 1, or a truth value. What has
    no value is left out. scale: what the mean is multiplied by in tables. group: the prompts that it is over; "" for
    all. of_parts: the figure is the unweighted mean of several means, and a value is named by (part, prompt).
    """

    name: str
    values: Mapping[str, Mapping[Hashable, float]]
    share: bool = False
    scale: float = 1
    group: str = ""
    of_parts: bool = False


def share(name: str, values: Mapping[str, Mapping[Hashable, float]], group: str = "") -> Figure:
    """A figure in percent of prompts for which something holds."""
    return Figure(name, values, share=True, scale=100, group=group)


def mean_of_shares(name: str, shares: Mapping[str, Mapping[str, Mapping[Hashable, float]]], group: str = "") -> Figure:
    """The unweighted mean of several shares in percent. shares: variant -> part -> prompt -> 0 or 1.

    A prompt may stand in several parts; the bootstrap draws it with all of them, and computes the figure anew.
    """
    values = {
        variant: {(part, prompt): value for part, of_part in parts.items() for prompt, value in of_part.items()}
        for variant, parts in shares.items()
    }
    return Figure(name, values, scale=100, group=group, of_parts=True)


def of_criteria(scores: Mapping[str, Mapping[Hashable, Scores]], group: str = "") -> list[Figure]:
    """The columns of the table of four criteria. scores: variant -> prompt -> scores; a missing criterion is left out,
    and overall is of answers with all four."""

    def values(name: str) -> dict[str, dict[Hashable, float]]:
        given = {v: {key: getattr(s, name) for key, s in by_key.items()} for v, by_key in scores.items()}
        return {v: {key: value for key, value in by_key.items() if value is not None} for v, by_key in given.items()}

    return [
        share("refusal %", values("refusal"), group),
        Figure("grounding", values("grounding"), group=group),
        share("references %", values("references"), group),
        Figure("relevance", values("relevance"), group=group),
        Figure("overall %", values("overall"), scale=100, group=group),
    ]


def tables(figures: Sequence[Figure], about: str = "") -> list[Table]:
    """The intervals of all figures, and the differences between all pairs of variants; none without figures.

    about: added to both titles, as in "per cluster, judged by NAME".
    """
    titles = [f"{title}, {about}" if about else title for title in ("Intervals", DIFFERENCES)]
    shown = [intervals(figures, titles[0])] if figures else []
    several = any(len(figure.values) > 1 for figure in figures)
    return [*shown, *([differences(figures, titles[1])] if several else [])]


def intervals(figures: Sequence[Figure], title: str) -> Table:
    columns = [("figure", ""), ("group", ""), ("variant", ""), ("n", ","), ("value", FORM), ("sd", FORM),
               ("from", FORM), ("to", FORM)]  # fmt: skip
    rows = [
        [figure.name, figure.group, variant, *_estimate(figure, values)]
        for figure in figures
        for variant, values in figure.values.items()
    ]
    return _without_empty_group(Table(title, columns, rows, INTERVALS_NOTE))


def _estimate(figure: Figure, values: Mapping[Hashable, float]) -> list[Cell]:
    """n, mean, standard deviation, and the interval's two ends."""
    if not values:
        return [0, None, None, None, None]
    numbers = [float(value) for value in values.values()]
    mean, sd = mean_std(numbers)
    if figure.of_parts:
        parts = Parts({key: [value] for key, value in values.items()})
        mean, interval = parts.means[0], percentile_interval(parts.resampled()[:, 0])
        return [len(parts.sums), figure.scale * mean, None, *(figure.scale * end for end in interval)]
    interval = wilson(sum(map(bool, numbers)), len(numbers)) if figure.share else bootstrap_mean(numbers)
    return [len(values), *(figure.scale * x for x in (mean, sd, *interval))]


class Parts:
    """A figure that is the mean of its parts' means, of one or more variants.

    values: (part, prompt) -> a number of each variant. sums (prompts, parts, 1 + variants): whether a prompt stands in
    a part, 0 or 1, and its values there.
    """

    def __init__(self, values: Mapping[tuple[str, Hashable], Sequence[float]]):
        parts, prompts = (
            {name: i for i, name in enumerate(dict.fromkeys(names))} for names in zip(*values, strict=True)
        )
        self.sums = np.zeros((len(prompts), len(parts), 1 + len(next(iter(values.values())))))
        for (part, prompt), of_variants in values.items():
            self.sums[prompts[prompt], parts[part]] = [1, *of_variants]

    @property
    def means(self) -> list[float]:
        """Of each variant."""
        return _mean_of_parts(self.sums.sum(0)).tolist()

    def resampled(self) -> np.ndarray:
        """The means (RESAMPLES, variants) over prompts drawn with replacement; nan where a part got none."""
        n, *shape = self.sums.shape
        return _mean_of_parts(resampled_sums(self.sums.reshape(n, -1)).reshape(-1, *shape))


def _mean_of_parts(sums: np.ndarray) -> np.ndarray:
    """(..., parts, 1 + variants) -> (..., variants)"""
    with np.errstate(invalid="ignore"):  # 0 / 0 in a part without prompts
        return (sums[..., 1:] / sums[..., :1]).mean(-2)


class Compared(NamedTuple):
    """Two variants over the n prompts that both have; means and difference in the figure's own unit, not scaled."""

    n: int
    n_differing: int
    first: float
    second: float
    difference: Difference


def compare(figure: Figure, first: str, second: str) -> Compared | None:
    """None where no prompt is in both, or none of a part that either has: their mean would be another figure."""
    of_first, of_second = figure.values[first], figure.values[second]
    pairs = {key: (float(of_first[key]), float(of_second[key])) for key in of_first if key in of_second}
    if not pairs:
        return None
    if figure.of_parts:
        parts = ({part for part, _ in keys} for keys in (pairs, of_first, of_second))
        return _compare_parts(pairs) if len(set(map(frozenset, parts))) == 1 else None
    a, b = zip(*pairs.values(), strict=True)
    if figure.share:
        counts = Counter(pairs.values())
        table = [counts[pair] for pair in ((1, 1), (1, 0), (0, 1), (0, 0))]
        difference = Difference((sum(b) - sum(a)) / len(a), *newcombe(*table), mcnemar(*table[1:3]))
    else:
        difference = paired_bootstrap(a, b)
    n_differing = sum(x != y for x, y in pairs.values())
    return Compared(len(pairs), n_differing, math.fsum(a) / len(a), math.fsum(b) / len(b), difference)


def _compare_parts(pairs: Mapping[tuple[str, Hashable], tuple[float, float]]) -> Compared:
    parts = Parts(pairs)
    first, second = parts.means
    n_differing = len({prompt for (_, prompt), (x, y) in pairs.items() if x != y})
    resampled = parts.resampled()
    difference = resampled_difference(second - first, resampled[:, 1] - resampled[:, 0], n_differing)
    return Compared(len(parts.sums), n_differing, first, second, difference)


def differences(figures: Sequence[Figure], title: str) -> Table:
    """A row for each figure and pair of variants."""
    columns = [("figure", ""), ("group", ""), ("A", ""), ("B", ""), ("n", ","), ("of A", FORM), ("of B", FORM),
               ("B - A", SIGNED), ("from", SIGNED), ("to", SIGNED), ("relative %", "+.1f"), ("p", ".2g"),
               ("p, Holm", ".2g"), ("reading", "")]  # fmt: skip
    pairs = [(figure, *names) for figure in figures for names in itertools.combinations(figure.values, 2)]
    compared = [(*pair, compare(*pair)) for pair in pairs]
    compared = [row for row in compared if row[-1] is not None]
    adjusted = holm([row[-1].difference.p for row in compared])
    rows = [
        [figure.name, figure.group, first, second, *_cells(figure, both, p), reading(both, p)]
        for (figure, first, second, both), p in zip(compared, adjusted, strict=True)
    ]
    return _without_empty_group(Table(title, columns, rows, DIFFERENCES_NOTE))


def _cells(figure: Figure, both: Compared, adjusted: float) -> list[Cell]:
    value, low, high, p = both.difference
    scaled = [figure.scale * x for x in (both.first, both.second, value, low, high)]
    relative = 100 * value / both.first if both.first else None
    return [both.n, *scaled, relative, p, adjusted]


def reading(both: Compared, adjusted: float) -> str:
    """What the test says, in words. adjusted: its p-value among those of the table."""
    if not both.n_differing:
        return SAME
    if adjusted >= LEVEL:
        return TOO_SMALL
    return HIGHER if both.difference.value > 0 else LOWER


def _without_empty_group(table: Table) -> Table:
    """Without the second column, where no figure is of a group."""
    if any(row[1] for row in table.rows):
        return table
    rows = [[*row[:1], *row[2:]] for row in table.rows]
    return replace(table, columns=[*table.columns[:1], *table.columns[2:]], rows=rows)
