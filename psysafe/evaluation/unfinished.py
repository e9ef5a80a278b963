"""Reasoning that never ended: such an answer is no answer, and the prompt leaves the comparison of all variants.

    paired     (default) a prompt on which any variant never stopped reasoning leaves for all of them, so that all are
               compared on the same prompts, and no text that is only reasoning is scored
    published  the publication's rules. On the four criteria, and in `selective`, only what the base never finished
               leaves, and what another variant never finished is scored as an answer without text. The models that
               answer must include the base; of stored answers the baseline counts as one where no row says that it is.
               In the benchmarks nothing leaves: XSTest's published figures are shares of all 250 safe and all 200
               unsafe prompts. An answer without an end is one without text in XSTest; in SORRY-Bench the think block is
               cut off, and an answer of which nothing is left is judged by its whole text

Either way the share of unfinished answers is a column of its own: under `paired` a variant may look better because
prompts that were hard for another one are gone.
"""

import argparse
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from psysafe.evaluation.models_under_test import BASE
from psysafe.evaluation.result import Result, Table, percent
from psysafe.program import UserError

PAIRED, PUBLISHED = RULES = ("paired", "published")
COLUMN = ("unfinished %", ".1f")
Key = TypeVar("Key", bound=Hashable)


def add_argument(parser: argparse.ArgumentParser, published: str = "the base's") -> None:
    """published: which prompts leave by the publication's rule."""
    help_text = f"prompts with reasoning that never ended leave: any variant's, or, as published, {published} (paired)"
    parser.add_argument("--rules", choices=RULES, default=PAIRED, help=help_text)


def require_base(adapters: Collection[str], rules: str) -> None:
    """UserError where the publication's rule is asked for and no variant is a base. To be called before any answers."""
    if rules == PUBLISHED and BASE not in adapters:
        raise UserError(
            f"--rules {PUBLISHED} leaves out what the base never finished, but only {', '.join(adapters)} answers; "
            f"add --adapter {BASE}"
        )


def left_out(unfinished: Mapping[str, Collection[Key]], bases: Collection[str], rules: str) -> set[Key]:
    """The prompts that leave the comparison. unfinished: by variant; bases: the variants without an adapter."""
    return set().union(*(prompts for name, prompts in unfinished.items() if rules == PAIRED or name in bases))


def reason_left_out(rules: str) -> str:
    """Why prompts leave, for a note with their count."""
    return f"unfinished thinking in {'any' if rules == PAIRED else 'a base'} variant"


def with_shares(table: Table, unfinished: Mapping[str, Sequence[bool]]) -> Table:
    """The table with a last column: percent of all answers of the row's variant that never ended their reasoning."""
    of_variant = [name for name, _ in table.columns].index("variant")
    rows = [[*row, percent(unfinished[row[of_variant]])] for row in table.rows]
    return replace(table, columns=[*table.columns, COLUMN], rows=rows)


def note_rules(result: Result, rules: str) -> None:
    """Says in the result, and in every table under the publication's rule, which rule its figures follow."""
    result.settings["unfinished reasoning"] = rules
    if rules == PUBLISHED:
        for table in result.tables:
            table.title += " (rules: published)"
