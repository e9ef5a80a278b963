"""What drafts share with each other: templates, near duplicates, prompts of evaluations."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from psysafe.corpus.contacts import Services
from psysafe.corpus.draft_checks import GROUP, Issue, group_of
from psysafe.corpus.draft_parts import split
from psysafe.corpus.texts import RUN, near_duplicates, word_runs
from psysafe.data.rows import Row
from psysafe.evaluation.word_list_judge import plain
from psysafe.files import clusters

MAX_SHARED = 0.5  # of an answer's runs of words that may stand in another row
COMMON = 50  # rows: a run that more rows have is everybody's, whichever row it is compared with


class Shared(NamedTuple):
    share: float  # of the answer's runs of RUN words
    other: int | None  # the row that shares most of them

    @property
    def is_template(self) -> bool:
        return self.share > MAX_SHARED


def shared_text(answers: Sequence[str], services: Services) -> list[Shared]:
    """How much of each answer stands in another one, services and names of strategies left out.

    Compared are runs of RUN words. A run of more than COMMON rows counts as shared, the others with the one row that
    shares most of them; so the work grows with the rows, not with their square.
    """
    runs = [_own_runs(answer, services) for answer in answers]
    rows_of: dict[str, list[int]] = {}
    for row, own in enumerate(runs):
        for run in own:
            rows_of.setdefault(run, []).append(row)
    results = []
    for row, own in enumerate(runs):
        common = {run for run in own if len(rows_of[run]) > COMMON}
        others = Counter(other for run in own - common for other in rows_of[run] if other != row)
        # Of equal counts the first row, whatever order a set has.
        other, count = min(others.items(), key=lambda item: (-item[1], item[0])) if others else (None, 0)
        results.append(Shared((len(common) + count) / len(own) if own else 0.0, other))
    return results


def _own_runs(answer: str, services: Services) -> set[str]:
    text = split(plain(answer), services, None).own_text()
    for name in clusters()["strategies"]:
        text = re.sub(re.escape(name.partition(" (")[0]), " ", text, flags=re.IGNORECASE)
    return word_runs([text]) if text.strip() else set()


def template_issues(rows: Sequence[Row], services: Services) -> tuple[dict[int, list[Issue]], list[Shared]]:
    shared = shared_text([row.fields["answer"] for row in rows], services)
    issues = {}
    for number, one in enumerate(shared):
        if one.is_template:
            most = f", most with {rows[one.other].where}" if one.other is not None else ""
            issues[number] = [Issue("template", "answer", f"{one.share:.0%} of the text stands in other rows{most}")]
    return issues, shared


def duplicate_issues(rows: Sequence[Row]) -> dict[int, list[Issue]]:
    """Prompts that are nearly those of an earlier row of their group."""
    grouped = [Row({**row.fields, GROUP: group_of(row.fields)}, row.file, row.number, row.line) for row in rows]
    return {
        number: [Issue("duplicate", "prompt", f"nearly the prompt of {rows[earlier].where}")]
        for number, earlier in near_duplicates(grouped).items()
    }


def leak_issues(rows: Sequence[Row], forbidden: set[str]) -> dict[int, list[Issue]]:
    """Prompts that share a run of words with one of an evaluation. forbidden: word_runs of these."""
    return {
        number: [Issue("leak", "prompt", f"{RUN} words in a row of an evaluation prompt: {min(common)}")]
        for number, row in enumerate(rows)
        if (common := word_runs([row.fields["prompt"]]) & forbidden)
    }
