"""What the word lists are worth: measured on labelled answers, and said beside every table that they made.

The figures stand in assets/rules_judge.json, which `python -m benchmarks.rules_judge` writes; the answers and how they
were labelled in benchmarks/rules_judge/.
"""

import functools
from collections.abc import Mapping, Sequence

from psysafe.evaluation import word_list_judge
from psysafe.evaluation.result import Table
from psysafe.files import ASSETS, read_json

PATH = ASSETS / "rules_judge.json"
WORD_LISTS = word_list_judge.NAME
STRING_MATCHES = ("official string match", "normalised string match")  # XSTest's: how responses begin

MEASURES = {  # as the note says them
    "precision": "precision",
    "recall": "recall",
    "within_1": "within 1 of the label",
    "constant_within_1": "the best constant",
}


@functools.cache
def accuracy_note(*judges: str) -> str:
    """One line: precision and recall of these judges on the held-out answers. judges: WORD_LISTS if none is named."""
    measured = read_json(PATH)
    said = "; ".join(f"{judge}: {_said(measured['judges'][judge])}" for judge in judges or (WORD_LISTS,))
    return f"{said[:1].upper()}{said[1:]} (n = {measured['n']} held-out answers)."


def _said(figures: Mapping[str, Mapping[str, float]]) -> str:
    """`refusal precision 90 %, recall 80 %; ... grounding within 1 of the label 70 %`: every criterion's measures."""
    return "; ".join(
        f"{criterion} " + ", ".join(f"{MEASURES[name]} {100 * value:.0f} %" for name, value in measures.items())
        for criterion, measures in figures.items()
    )


def with_accuracy(tables: Sequence[Table], *judges: str) -> list[Table]:
    """The tables, each with that line below it."""
    return [table.with_note(accuracy_note(*judges)) for table in tables]
