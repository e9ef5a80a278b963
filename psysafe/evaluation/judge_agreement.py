"""How far several judges of the same answers agree: Cohen's kappa of every two, Krippendorff's alpha of more."""

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from psysafe.evaluation import kappa
from psysafe.evaluation.result import Table
from psysafe.evaluation.statistics import percentile_interval, resampled_sums

Labels = Mapping[str, Mapping[tuple[str, Hashable], Hashable]]  # figure -> (variant, prompt) -> the judge's label
NOTE = "n: answers with a verdict of both. from, to: 95 % of Cohen's kappa, percentile bootstrap over prompts."


def tables(judges: Mapping[str, Labels], ratings: Sequence[str] = ()) -> list[Table]:
    """judges: by name, each with the same figures. ratings: the figures whose labels are numbers with distances."""
    figures = next(iter(judges.values()))
    labels = {name: _numbered([of_judge[name] for of_judge in judges.values()]) for name in figures}
    rows = [
        [name, a, b, *_of_two(dict(zip(judges, labels[name], strict=True)), a, b, name in ratings)]
        for name in figures
        for a, b in itertools.combinations(judges, 2)
    ]
    columns = [("figure", ""), ("A", ""), ("B", ""), ("n", ","), ("equal %", ".1f"), ("Cohen's kappa", ".3f"),
               ("from", ".3f"), ("to", ".3f"), ("quadratic kappa", ".3f")]  # fmt: skip
    note = f"{NOTE} Quadratic, of ratings: 4 and 5 disagree less than 1 and 5." if ratings else NOTE
    shown = [Table("Agreement between judges", columns, rows, note, bars=["Cohen's kappa"])]
    if len(judges) > 2:
        rows = [[name, *_of_all(labels[name], name in ratings)] for name in figures]
        columns = [("figure", ""), ("n", ","), ("nominal alpha", ".3f"), ("interval alpha", ".3f")]
        note = "Krippendorff's alpha. n: answers with a verdict of two judges or more."
        shown.append(
            Table("Agreement of all judges", columns, rows, f"{note} Interval: of ratings." if ratings else note)
        )
    return shown if ratings else [_without_last_column(table) for table in shown]


def _without_last_column(table: Table) -> Table:
    """Without the one that is of ratings."""
    return replace(table, columns=table.columns[:-1], rows=[row[:-1] for row in table.rows])


def _numbered(columns: Sequence[Mapping]) -> list[dict]:
    """The labels of each judge as numbers from 0, in the order of the labels: ratings keep their distances."""
    given = {label for column in columns for label in column.values()}
    if all(isinstance(label, int) for label in given):
        low = min(given, default=0)
        places = {label: label - low for label in given}
    else:
        places = {label: place for place, label in enumerate(sorted(given, key=str))}
    return [{key: places[label] for key, label in column.items()} for column in columns]


def _of_two(columns: Mapping[str, Mapping], a: str, b: str, is_rating: bool) -> list:
    """n, equal %, Cohen's kappa and its interval, quadratic kappa."""
    size = 1 + max((place for column in columns.values() for place in column.values()), default=0)
    by_prompt: dict[Hashable, np.ndarray] = {}
    for key, place in columns[a].items():
        if key in columns[b]:
            by_prompt.setdefault(key[1], np.zeros((size, size)))[place, columns[b][key]] += 1
    if not by_prompt:
        return [0, None, None, None, None, None]
    table = sum(by_prompt.values())
    sums = resampled_sums([of_prompt.ravel() for of_prompt in by_prompt.values()]).reshape(-1, size, size)
    interval = percentile_interval(kappa.cohen_kappa(sums))
    measures = [kappa.equal_percent(table), kappa.cohen_kappa(table), *interval]
    return [int(table.sum()), *map(_number, measures), _number(kappa.quadratic_kappa(table)) if is_rating else None]


def _of_all(columns: Sequence[Mapping], is_rating: bool) -> list:
    """n, nominal alpha, interval alpha."""
    size = 1 + max((place for column in columns for place in column.values()), default=0)
    keys = dict.fromkeys(key for column in columns for key in column)
    given = [[column[key] for column in columns if key in column] for key in keys]
    given = [places for places in given if len(places) > 1]
    table = sum((kappa.coincidences(places, size) for places in given), np.zeros((size, size)))
    alphas = [kappa.nominal_alpha(table), kappa.interval_alpha(table) if is_rating else math.nan]
    return [len(given), *map(_number, alphas)]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
