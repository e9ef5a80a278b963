"""eval.py agreement: a judge's scores against people's, by Cohen's kappa.

    python eval.py agreement --human labels.csv --judged runs/judged --out runs/agreement

The CSV has a row per answer: prompt, refusal (Yes or No), grounding (1 to 5), references (Yes or No), relevance
(1 to 5), and variant where several were judged. An empty cell was not labelled; 4.0, True and nan are read as pandas
writes them. Each answer counts once: a row that stands twice is counted once, and two that differ are refused.

Pooled kappa is computed as the published one: all labels of all criteria in one list, Yes as 1, No as 0, ratings as
they are. So a Yes and a rating of 1 count as the same label. The pooled kappa can be far above that of a criterion: the
published 0.61 is pooled from criteria with 0.79, 0.26, 1.00 and 0.19.
"""

import argparse
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import NamedTuple

from psysafe.data.rows import read_table
from psysafe.evaluation.benchmark import Evaluation
from psysafe.evaluation.criteria import CRITERIA
from psysafe.evaluation.result import Result, Table, load, percent
from psysafe.program import UserError

YES_NO = {"no": 0, "yes": 1}
RATINGS = {str(rating): rating for rating in range(1, 6)}
LABELS = {"refusal": YES_NO, "grounding": RATINGS, "references": YES_NO, "relevance": RATINGS}  # word -> score
# A column of truth values with a gap in it is one of decimal numbers in pandas: 1.0 and 0.0.
YES_NO_OF_PANDAS = {"true": "yes", "1": "yes", "1.0": "yes", "false": "no", "0": "no", "0.0": "no"}
NOT_LABELLED = ("", "nan", "<na>")
Pairs = list[tuple[Hashable, Hashable]]


class Agreement(Evaluation):
    name = "agreement"
    help = "a judge's scores against people's: Cohen's kappa"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--human", required=True, metavar="CSV", help="people's labels")
        parser.add_argument("--judged", required=True, metavar="DIR", help="the --out folder of eval.py judge")

    def run(self, args: argparse.Namespace) -> Result:
        people = read_table(args.human, ["prompt"])
        if not set(people[0]).intersection(CRITERIA):
            columns = ", ".join(map(str, people[0]))
            raise UserError(f"{args.human}: no labels in it (columns: {columns:.100}); expected {', '.join(CRITERIA)}")
        judgement, _ = load(args.judged)
        if judgement.kind != "judge":
            raise UserError(f"{args.judged}: a result of {judgement.kind}; expected the --out folder of eval.py judge")
        judged = read_items(Path(args.judged, "items.jsonl"))
        pairs, n_unmatched, n_labelled = pair(people, judged, args.human)
        result = Result("agreement", "Agreement of the judge with people", tables(pairs))
        judge = judgement.settings.get("judge")
        result.settings = {"human": str(args.human), "judged": str(args.judged), "judge": judge}
        result.notes = [f"{n_labelled:,} labelled answers, {n_unmatched:,} of them not among the judged"]
        if more := len(people) - n_labelled:
            result.notes.append(f"{more:,} rows without effect: they are empty, or say the same of an answer again")
        return result


def read_items(file: Path) -> list[dict]:
    """The judged answers with their scores, as eval.py judge has written them."""
    items = read_table(file, ["variant", "prompt"])
    for number, item in enumerate(items, 1):
        wrong = [name for name in CRITERIA if item.get(name, "missing") not in (None, *LABELS[name].values())]
        if wrong or not isinstance(item["variant"], str):
            where = f"{', '.join(wrong)} of variant {item['variant']!r:.60}"
            raise UserError(f"{file} row {number}: {where} as eval.py judge does not write it; judge again")
    return items


def cohen_kappa(pairs: Sequence[tuple[Hashable, Hashable]]) -> float | None:
    """Unweighted kappa of (first rater's, second rater's) labels. None without pairs; 1.0 where both raters gave one
    and the same label throughout, for which the formula has no value."""
    n = len(pairs)
    if not n:
        return None
    observed = sum(a == b for a, b in pairs)
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    chance = sum(first[label] * second[label] for label in first)
    return 1.0 if chance == n * n else (n * observed - chance) / (n * n - chance)


Answer = tuple[str, str]  # (variant, prompt)


def labelled(people: Sequence[dict], judged: Sequence[dict], file: str | Path) -> dict[Answer, dict[str, int | None]]:
    """Each labelled answer once, with its labels by criterion.

    UserError for two rows that label one answer differently, since neither can be preferred.
    """
    variants = {item["variant"] for item in judged}
    labels: dict[Answer, tuple[int, dict]] = {}  # answer -> (row, its labels)
    for number, row in enumerate(people, 1):
        # An empty line of a spreadsheet is `,,,,,` in its CSV.
        if not any(str(cell or "").strip() for cell in row.values()):
            continue
        if len(variants) > 1 and not row.get("variant"):
            raise UserError(f"{file} row {number}: no variant, and several were judged; name one in each row")
        answer = (row.get("variant") or next(iter(variants)), row["prompt"])
        of_row = {name: _label(row.get(name), name, f"{file} row {number}") for name in CRITERIA}
        earlier, of_earlier = labels.setdefault(answer, (number, of_row))
        if of_row != of_earlier:
            raise UserError(
                f"{file} row {number}: labels the answer of row {earlier} again, and differently; expected one row for "
                "each answer (of several people: a file for each, or what they agreed on)"
            )
    return {answer: of_row for answer, (_, of_row) in labels.items()}


class Paired(NamedTuple):
    """pairs: (person's, judge's) labels by criterion, where both gave one. Of the n_labelled answers n_unmatched were
    not judged."""

    pairs: dict[str, Pairs]
    n_unmatched: int
    n_labelled: int


def pair(people: Sequence[dict], judged: Sequence[dict], file: str | Path) -> Paired:
    """People's labels beside the judge's. file: of the labels, for errors. UserError where no answer is in both."""
    labels = labelled(people, judged, file)
    by_answer = {(item["variant"], item["prompt"]): item for item in judged}
    pairs: dict[str, Pairs] = {name: [] for name in CRITERIA}
    for answer, of_row in labels.items():
        item = by_answer.get(answer, {})
        for name, label in of_row.items():
            if label is not None and item.get(name) is not None:
                pairs[name].append((label, int(item[name])))
    if not any(pairs.values()):
        variants = ", ".join(dict.fromkeys(variant for variant, _ in by_answer))
        raise UserError(
            f"{file}: none of its labels belongs to a judged answer; expected prompts and variants as in {variants:.99}"
        )
    return Paired(pairs, sum(answer not in by_answer for answer in labels), len(labels))


def tables(pairs: dict[str, Pairs]) -> list[Table]:
    pooled = [labels for name in CRITERIA for labels in pairs[name]]
    rows = []
    for name, of_criterion in (*pairs.items(), ("pooled", pooled)):
        equal = percent(person == judge for person, judge in of_criterion)
        rows.append([name, len(of_criterion), equal, cohen_kappa(of_criterion)])
    note = "Pooled: Yes and a rating of 1 are one label there, and it hides how unlike the criteria are."
    columns = [("criterion", ""), ("n", ","), ("equal %", ".1f"), ("Cohen's kappa", ".3f")]
    by_criterion = Table("By criterion", columns, rows, note, bars=["Cohen's kappa"])
    return [by_criterion, *(confusion(name, pairs[name]) for name in CRITERIA if pairs[name])]


def confusion(name: str, pairs: Pairs) -> Table:
    """How often each label of a person met each label of the judge."""
    counts = Counter(pairs)
    given = {label for both in pairs for label in both}
    labels = {word.capitalize(): label for word, label in LABELS[name].items() if label in given}
    columns = [("person \\ judge", ""), *((word, ",") for word in labels)]
    rows = [[word, *(counts[person, judge] for judge in labels.values())] for word, person in labels.items()]
    return Table(f"{name}: people in rows, judge in columns", columns, rows)


def _label(text: object, name: str, where: str) -> int | None:
    """A person's label as the judge's scores have it; None for an empty cell."""
    word = "" if text is None else str(text).strip().lower()
    if word in NOT_LABELLED:
        return None
    word = YES_NO_OF_PANDAS.get(word, word) if LABELS[name] is YES_NO else word.removesuffix(".0")
    if word not in LABELS[name]:
        expected = "Yes or No" if LABELS[name] is YES_NO else "1 to 5"
        raise UserError(f"{where}: {name} is {text!r}; expected {expected}")
    return LABELS[name][word]
