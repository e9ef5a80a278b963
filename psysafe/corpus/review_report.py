"""What came of a review: counts and agreement as lines, and a page of Markdown to read and to settle from."""

import math
from collections.abc import Mapping, Sequence

from psysafe.corpus.review_exports import APPROVE, REJECT, Draft, Result, Review, misfit
from psysafe.evaluation.kappa import cohen_kappa, equal_percent, label_table
from psysafe.printable import counted, in_markdown

LABELS = {APPROVE: 0, REJECT: 1}


def summary(result: Result) -> list[str]:
    exports = result.exports
    edited = sum(bool(fields.get("edited")) for place, fields in result.rows.items() if place not in result.unreviewed)
    passed = len(result.rows.keys() - set(result.unreviewed))
    without = "pass unreviewed (--unreviewed)" if result.rows.keys() & set(result.unreviewed) else "left out"
    lines = [
        f"{counted(passed, 'row')} approved, {edited:,} of them edited; {len(result.rejected):,} rejected; "
        f"{len(result.disputed):,} disputed and left out; {len(result.settled):,} settled; "
        f"{len(result.unreviewed):,} unreviewed, {without}"
    ]
    if result.misfits:
        lines.append(f"{counted(len(result.misfits), 'row')} with a strategy of another cluster, left out")
    lines += [f"{name}: {counted(len(reviews), 'row')} reviewed" for name, reviews in result.reviews.items()]
    if exports.n_undecided:
        lines.append(f"{counted(exports.n_undecided, 'row')} begun without a decision, and not counted as reviewed")
    if exports.n_repeated:
        lines.append(f"{counted(exports.n_repeated, 'row')} reviewed twice by the same person: the later entry counts")
    return lines + agreement(result)


def misfit_lines(result: Result, drafts: Sequence[Draft]) -> list[str]:
    """For each row with a strategy of another cluster: the files, the row, who approved it, what was expected."""
    lines = []
    for place, reviews in result.misfits.items():
        files = ", ".join(file for name in reviews for file in result.exports.files[name])
        problem = misfit(drafts[place], next(iter(reviews.values())))
        lines.append(f"{files}: row {place + 1}, approved by {', '.join(reviews)}: {problem}")
    return lines


def agreement(result: Result) -> list[str]:
    """For every two reviewers with rows in common: percent of equal decisions, and Cohen's kappa."""
    if not result.pairs:
        return ["agreement: no row was reviewed by two people"]
    lines = []
    for first, second, decisions in result.pairs:
        table = label_table([(LABELS[a], LABELS[b]) for a, b in decisions], len(LABELS))
        kappa = float(cohen_kappa(table))
        shown = "undefined" if math.isnan(kappa) else f"{kappa:.3f}"
        both = f"{first} and {second}, {counted(len(decisions), 'row')} of both"
        lines.append(f"{both}: {float(equal_percent(table)):.1f} % the same decision, Cohen's kappa {shown}")
    return lines


def as_markdown(result: Result, drafts: Sequence[Draft]) -> str:
    """Counts, then each row that is disputed or rejected or has a note, with what was said of it."""
    prompts = [draft.fields["prompt"] for draft in drafts]
    lines = ["# Review", "", *(f"- {in_markdown(line)}" for line in summary(result))]
    lines += ["", "## To settle", ""]
    lines += _rows(result.disputed, prompts) or ["Nothing: no two reviewers differ, or the difference was settled.", ""]
    if result.misfits:
        listed = (f"- {in_markdown(line)}" for line in misfit_lines(result, drafts))
        lines += ["## Strategies of another cluster", "", *listed, "", *_rows(result.misfits, prompts)]
    if result.rejected:
        lines += ["## Rejected", "", *_rows(result.rejected, prompts)]
    notes = [
        f"- row {place + 1}, {in_markdown(name)}: {in_markdown(review.note)}"
        for name, reviews in result.reviews.items()
        for place, review in reviews.items()
        if review.note
    ]
    return "\n".join(lines + (["## Notes", "", *notes, ""] if notes else []))


def _rows(rows: Mapping[int, Mapping[str, Review]], prompts: Sequence[str]) -> list[str]:
    lines = []
    for place, reviews in rows.items():
        lines += [f"### Row {place + 1}", "", in_markdown(prompts[place]), ""]
        for name, review in reviews.items():
            reason = f", because {in_markdown(review.reason)}" if review.decision == REJECT and review.reason else ""
            lines.append(f"- {in_markdown(name)}: {review.decision}{reason}")
            lines += [f"  - {field}: {in_markdown(text)}" for field, text in review.edits.items()]
        lines.append("")
    return lines
