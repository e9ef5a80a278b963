"""The report as Markdown: tables, and of the answers those that are read first, quoted."""

from collections.abc import Mapping, Sequence

from psysafe.evaluation.judged_answers import Answer, Item, largest_differences, worst_answers
from psysafe.evaluation.result import Table
from psysafe.evaluation.transcript import fenced
from psysafe.printable import in_markdown

N_QUOTED = 10


def table_lines(table: Table) -> list[str]:
    names, *rows = [list(map(in_markdown, row)) for row in ([name for name, _ in table.columns], *table.cells())]
    rules = ["---:" if form else "---" for _, form in table.columns]
    return ["| " + " | ".join(row) + " |" for row in [names, rules, *rows]]


def list_lines(items: Mapping[str, str]) -> list[str]:
    return [f"- {in_markdown(f'{name}: {value}')}" for name, value in items.items()]


def answer_lines(items: Sequence[Item]) -> list[str]:
    """The answers of the largest differences between variants, and the worst answers; as many as are quoted here."""
    different, worst = largest_differences(items, N_QUOTED), worst_answers(items, N_QUOTED)
    lines = []
    if different:
        lines += [f"### Largest differences between variants: {len(different)} of {len(items):,} prompts", ""]
    for item in different:
        lines += [f"#### {in_markdown(item.heading)}: difference {100 * item.difference:.1f} %", "", *_prompt(item)]
        for answer in item.answers:
            lines += _answer(answer)
    if worst:
        n_answers = sum(len(item.answers) for item in items)
        lines += [f"### Worst answers: {len(worst)} of {n_answers:,}", ""]
    for item, answer in worst:
        lines += [f"#### {in_markdown(item.heading)}", "", *_prompt(item), *_answer(answer)]
    return lines


def _prompt(item: Item) -> list[str]:
    return [fenced(item.prompt), ""] if item.prompt else []


def _answer(answer: Answer) -> list[str]:
    name = in_markdown(answer.variant)
    lines = [f"**{name}** was asked:", "", fenced(answer.prompt), ""] if answer.prompt else []
    lines += [f"**{name}** answered:", "", fenced(answer.text) if answer.text else "(no answer)", ""]
    for judgement in answer.judgements:
        lines += [f"{in_markdown(judgement.judge)}: {in_markdown(judgement.verdict)}", ""]
        lines += [fenced(judgement.words), ""] if judgement.words else []
    return lines
