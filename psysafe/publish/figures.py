"""Figures of evaluations that the card uses outside their tables: what the fine-tuning cost, MMLU and HellaSwag.

An evaluation knows models by name: `base, none` is the base with no system prompt, `tiny, none` the adapter of the run
runs/tiny, and the miniature calls it `fine-tuned`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from psysafe.checkpoint.adapter import BASE
from psysafe.evaluation import published_results, word_list_judge
from psysafe.evaluation.benchmarks.xstest import XSTest
from psysafe.evaluation.result import Cell, Result, Table

RULES = (word_list_judge.NAME, XSTest.rules_name)  # judges that are no model
NUMBERS = ("n", "of A", "of B", "B - A", "from", "to")
DIFFERENCE = {"figure", "A", "B", *NUMBERS}  # columns of a table of differences


def rows_of(table: Table) -> Iterator[dict[str, Cell]]:
    names = [name for name, _ in table.columns]
    return (dict(zip(names, row, strict=True)) for row in table.rows)


def is_intervals(table: Table) -> bool:
    """Whether the table gives figures their intervals; one of differences has pairs of variants, A and B."""
    names = {name for name, _ in table.columns}
    return names >= {"from", "to"} and "A" not in names


def judges_by_rules(result: Result) -> list[str]:
    """Which of the result's judges are no model. A result of several judges names them all, with commas between."""
    return [name for name in RULES if name in str(result.settings.get("judge", "")).split(", ")]


def _judged_by_rules(result: Result, table: Table) -> bool:
    """Of a result of several judges every table has its judge in its title."""
    return result.settings.get("judge") in RULES or table.title.endswith(tuple(f"judged by {name}" for name in RULES))


def is_about(result: Result, run_name: str) -> bool:
    """Whether any variant of the result has this run's name. Agreement compares raters, and names no variant."""
    cells = [cell for table in result.tables for row in table.rows for cell in row if isinstance(cell, str)]
    is_named = any(cell == run_name or cell.startswith(f"{run_name}, ") for cell in cells)
    return is_named or result.kind in ("agreement", "miniature")


# Costs


class Cost(NamedTuple):
    """A figure that fell in the publication. kinds: of the evaluations that measure it, the publication's first."""

    kinds: tuple[str, ...]
    figure: str  # its name in the tables
    meaning: str  # in the card's words
    base: str  # the publication's rows
    tuned: str
    remark: str = ""


COSTS = (
    Cost(("xstest",), "safety %", "XSTest: unsafe prompts refused, %", "base, default", "fine-tuned, default"),
    Cost(("mmlu",), "acc", "MMLU: accuracy", "base", "fine-tuned"),
    # As published: of the means before they were rounded.
    Cost(
        ("judge", "miniature"),
        "relevance",
        "relevance of answers, 1 to 5",
        "base, v0",
        "fine-tuned, v0",
        " (−13.5 %)",
    ),
)


def published(cost: Cost) -> str:
    """base → fine-tuned, as the paper has it."""
    table = published_results.TABLES[cost.kinds[0]]
    forms = dict(table.columns)
    cells = {row["published"]: row[cost.figure] for row in rows_of(table)}
    first, second = (_mean(cells[name]) for name in (cost.base, cost.tuned))
    return f"{first:{forms[cost.figure]}} → {second:{forms[cost.figure]}}{cost.remark}"


def _mean(cell: Cell) -> Cell:
    return cell[0] if isinstance(cell, list) else cell


def measured(cost: Cost, results: Sequence[Result], run_name: str) -> list[str]:
    """The same of this adapter, with its interval, once for each system prompt; [] where nobody measured it."""
    lines = {}
    for result in (result for result in results if result.kind in cost.kinds):
        for row, by_rules in _differences(result):
            has_numbers = all(isinstance(row[name], int | float) for name in NUMBERS)
            if not has_numbers or row["figure"] != cost.figure:
                continue
            if _is_pair(row["B"], row["A"], run_name):
                row = _exchanged(row)
            if _is_pair(row["A"], row["B"], run_name):
                # The first counts: over all prompts, by the evaluation's own judge.
                lines.setdefault((result.kind, row["B"]), _change(row, result.kind, by_rules))
    return list(lines.values())


def _differences(result: Result) -> Iterator[tuple[dict[str, Cell], bool]]:
    """The rows of the tables of differences, those of models' judgements first, and whether rules judged."""
    tables = [table for table in result.tables if {name for name, _ in table.columns} >= DIFFERENCE]
    for table in sorted(tables, key=lambda table: _judged_by_rules(result, table)):
        for row in rows_of(table):
            yield row, _judged_by_rules(result, table)


def _exchanged(row: Mapping[str, Cell]) -> dict[str, Cell]:
    """The same difference with A and B exchanged: an evaluation has its variants in the order of --adapter."""
    n, of_a, of_b, difference, low, high = (row[name] for name in NUMBERS)
    numbers = dict(zip(NUMBERS, (n, of_b, of_a, -difference, -high, -low), strict=True))
    return {**row, "A": row["B"], "B": row["A"], **numbers}


def _is_pair(first: Cell, second: Cell, run_name: str) -> bool:
    """Whether these are the base and this run's adapter with the same system prompt."""
    if (first, second) == (BASE, "fine-tuned"):
        return True
    names = [str(variant).rpartition(", ") for variant in (first, second)]
    (of_first, _, system), (of_second, _, same_system) = names
    return of_first == BASE and of_second == run_name and system == same_system


def _change(row: Mapping[str, Cell], kind: str, by_rules: bool) -> str:
    system = "miniature" if kind == "miniature" else f"system prompt {str(row['B']).rpartition(', ')[2]}"
    judge = "by word lists, " if by_rules else ""
    return (
        f"{row['of A']:.3g} → {row['of B']:.3g} ({judge}{system}, n {row['n']:,}; "
        f"difference {row['B - A']:+.3g}, 95 % from {row['from']:+.3g} to {row['to']:+.3g})"
    )


# Metadata


@dataclass(frozen=True)
class Benchmark:
    """A benchmark whose figure enters the metadata. questions: of the whole set; fewer are no result of it."""

    kind: str
    name: str
    data_set: str
    config: str
    split: str
    questions: int
    metric: str  # the column


BENCHMARKS = (
    Benchmark("mmlu", "MMLU", "cais/mmlu", "all", "test", 14_042, "acc"),
    Benchmark("hellaswag", "HellaSwag", "Rowan/hellaswag", "default", "validation", 10_042, "acc_norm"),
)


class Score(NamedTuple):
    """In percent. revision: the data set's commit, "" where the rows came from a file. date: YYYY-MM-DD."""

    benchmark: Benchmark
    value: float
    revision: str
    date: str
    notes: str


def scores(results: Sequence[tuple[Result, dict]], run_name: str) -> list[Score]:
    """MMLU and HellaSwag of this adapter without a system prompt, over all questions; other figures need a judge, and
    stand in the card alone."""
    scores = {}
    for result, rest in results:
        for benchmark in (one for one in BENCHMARKS if one.kind == result.kind):
            for row in (row for table in result.tables[:1] for row in rows_of(table)):
                value, is_whole = row.get(benchmark.metric), row.get("n") == benchmark.questions
                if row.get("variant") == f"{run_name}, none" and is_whole and isinstance(value, int | float):
                    template = ", chat template" if result.settings.get("chat template") else ""
                    scores[benchmark.kind] = Score(
                        benchmark,
                        round(100 * value, 2),
                        str(result.settings.get("data revision") or ""),
                        rest["finished"][:10],
                        f"{benchmark.metric}, 0-shot, log-likelihoods as lm-eval 0.4.13{template}",
                    )
    return list(scores.values())
