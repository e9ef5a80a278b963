"""What the figures of an evaluation can carry: an interval for each, and paired tests between all settings.

A benchmark says which figures it has (`Figure`: a value for each prompt and variant), `tables` makes two tables of
them: intervals, and the difference of every pair of variants over the prompts that both have. Shares get Wilson's
interval and McNemar's exact test, means the bootstrap over prompts. The p-values of a table are one family (Holm).
"""

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from psysafe.evaluation.criteria import Scores, mean_std
from psysafe.evaluation.result import Cell, Table
from psysafe.evaluation.statistics import Difference, bootstrap_mean, holm, mcnemar, paired_bootstrap, wilson

LEVEL = 0.05
SAME, TOO_SMALL, HIGHER, LOWER = "same on every prompt", "n too small to tell", "B higher", "B lower"
DIFFERENCES = "Differences between variants"  # title of a table
INTERVALS_NOTE = (
    "95 %: Wilson for shares, percentile bootstrap over prompts for means. sd: population, over the prompts (ddof 0)."
)
DIFFERENCES_NOTE = (
    "Over the prompts that both have. p: McNemar's exact test for shares, paired bootstrap for means; Holm over the "
    f"rows of this table, read at {LEVEL:g}. {TOO_SMALL!r}: chance alone may explain the difference, and the true one "
    "may be as large as the interval reaches."
)
FORM, SIGNED = ".3g", "+.3g"


@dataclass(frozen=True)
class Figure:
    """A column of a table of results.

    values: variant -> prompt (or what else names an item) -> its value; of a share 0 or 1, or a truth value. What has
    no value is left out. scale: what the mean is multiplied by in tables. group: the prompts that it is over; "" for
    all. sd: False where the values of single prompts mean nothing.
    """

    name: str
    values: Mapping[str, Mapping[Hashable, float]]
    share: bool = False
    scale: float = 1
    group: str = ""
    sd: bool = True


def share(name: str, values: Mapping[str, Mapping[Hashable, float]], group: str = "") -> Figure:
    """A figure in percent of prompts for which something holds."""
    return Figure(name, values, share=True, scale=100, group=group)


def mean_of_shares(name: str, shares: Mapping[str, Mapping[str, Mapping[Hashable, float]]], group: str = "") -> Figure:
    """The unweighted mean of several shares in percent. shares: variant -> part -> prompt -> 0 or 1.

    A prompt may stand in several parts. Its value is the mean and what the prompt itself moves it by (the influence
    function), so that the mean over prompts is the figure, and the bootstrap sees how far prompts move it.
    """
    return Figure(name, {variant: _influences(parts) for variant, parts in shares.items()}, False, 100, group, sd=False)


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


def _influences(parts: Mapping[str, Mapping[Hashable, float]]) -> dict[Hashable, float]:
    parts = {name: of_part for name, of_part in parts.items() if of_part}
    means = {name: math.fsum(of_part.values()) / len(of_part) for name, of_part in parts.items()}
    keys = dict.fromkeys(key for of_part in parts.values() for key in of_part)
    values = dict.fromkeys(keys, math.fsum(means.values()) / len(parts) if parts else 0.0)
    for name, of_part in parts.items():
        weight = len(keys) / len(of_part) / len(parts)
        for key, value in of_part.items():
            values[key] += weight * (value - means[name])
    return values


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
        [figure.name, figure.group, variant, *_estimate(figure, list(values.values()))]
        for figure in figures
        for variant, values in figure.values.items()
    ]
    return _without_empty_group(Table(title, columns, rows, INTERVALS_NOTE))


def _estimate(figure: Figure, values: Sequence[float]) -> list[Cell]:
    """n, mean, standard deviation, and the interval's two ends."""
    if not values:
        return [0, None, None, None, None]
    mean, sd = mean_std([float(value) for value in values])
    interval = wilson(sum(map(bool, values)), len(values)) if figure.share else bootstrap_mean(values)
    scaled = [figure.scale * x for x in (mean, sd, *interval)]
    return [len(values), scaled[0], scaled[1] if figure.sd else None, *scaled[2:]]


class Compared(NamedTuple):
    """Two variants over the n prompts that both have; means and difference in the figure's own unit, not scaled."""

    n: int
    n_differing: int
    first: float
    second: float
    difference: Difference


def compare(figure: Figure, first: str, second: str) -> Compared | None:
    """None where no prompt is in both."""
    of_first, of_second = figure.values[first], figure.values[second]
    pairs = [(float(of_first[key]), float(of_second[key])) for key in of_first if key in of_second]
    if not pairs:
        return None
    a, b = zip(*pairs, strict=True)
    difference = paired_bootstrap(a, b)
    if figure.share:
        difference = difference._replace(p=mcnemar(sum(x > y for x, y in pairs), sum(x < y for x, y in pairs)))
    return Compared(len(pairs), sum(x != y for x, y in pairs), math.fsum(a) / len(a), math.fsum(b) / len(b), difference)


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
