"""eval.py agreement: a judge's scores against people's, by Cohen's kappa.

    python eval.py agreement --human labels.csv --judged runs/judged --out runs/agreement

The CSV has a row per answer: prompt, refusal (Yes or No), grounding (1 to 5), references (Yes or No), relevance
(1 to 5), and setting where several were judged. An empty cell was not labelled.

Pooled kappa follows the published figure: all labels of all criteria in one list, Yes as 1, No as 0, ratings as they
are. So a Yes and a rating of 1 count as the same label, and criteria with other spreads lend each other agreement:
the published 0.61 stands over 0.79, 0.26, 1.00 and 0.19.
"""

import argparse
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

from psysafe.data.rows import read_table
from psysafe.evaluation.result import Result, Table, load
from psysafe.evaluation.scores import CRITERIA
from psysafe.program import UserError

LABELS = {name: range(2) if name in ("refusal", "references") else range(1, 6) for name in CRITERIA}
Pairs = list[tuple[Hashable, Hashable]]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--human", required=True, metavar="CSV", help="people's labels")
    parser.add_argument("--judged", required=True, metavar="DIR", help="the --out folder of eval.py judge")


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


def run(args: argparse.Namespace) -> Result:
    people = read_table(args.human, ["prompt"])
    if not set(people[0]).intersection(CRITERIA):
        found = ", ".join(map(str, people[0]))
        raise UserError(f"{args.human}: no labels in it (columns: {found:.100}); expected {', '.join(CRITERIA)}")
    judgement, _ = load(args.judged)
    if judgement.kind != "judge":
        raise UserError(f"{args.judged}: a result of {judgement.kind}; expected the --out folder of eval.py judge")
    file = Path(args.judged, "items.jsonl")
    judged = read_table(file, ["setting", "prompt"])
    for number, item in enumerate(judged, 1):
        wrong = [name for name in CRITERIA if item.get(name, "missing") not in (None, *LABELS[name])]
        if wrong or not isinstance(item["setting"], str):
            found = f"{', '.join(wrong)} of setting {item['setting']!r:.60}"
            raise UserError(f"{file} row {number}: {found} as eval.py judge does not write it; judge again")
    pairs, unmatched = pair(people, judged, args.human)
    result = Result("agreement", "Agreement of the judge with people", tables(pairs))
    result.settings = {"human": str(args.human), "judged": str(args.judged), "judge": judgement.settings.get("judge")}
    result.notes = [f"{len(people):,} labelled answers, {unmatched:,} of them not among the judged"]
    return result


def pair(people: Sequence[dict], judged: Sequence[dict], file: str | Path) -> tuple[dict[str, Pairs], int]:
    """(person's, judge's) labels by criterion, where both gave one; and how many labelled answers were not judged."""
    several = len({item["setting"] for item in judged}) > 1
    if several and any(not row.get("setting") for row in people):
        raise UserError(f"{file}: no column setting, and several settings were judged; name one in each row")
    by_answer = {(item["setting"] if several else "", item["prompt"]): item for item in judged}
    pairs: dict[str, Pairs] = {name: [] for name in CRITERIA}
    unmatched = 0
    for number, row in enumerate(people, 1):
        item = by_answer.get((row["setting"] if several else "", row["prompt"]))
        unmatched += item is None
        for name in CRITERIA:
            label = _label(row.get(name), name, f"{file} row {number}")
            if item is not None and label is not None and item[name] is not None:
                pairs[name].append((label, int(item[name])))
    if not any(pairs.values()):
        raise UserError(f"{file}: none of its labels belongs to a judged answer; expected the same prompts")
    return pairs, unmatched


def tables(pairs: dict[str, Pairs]) -> list[Table]:
    pooled = [p for criterion in CRITERIA for p in pairs[criterion]]
    rows = [
        [name, len(found), 100 * sum(a == b for a, b in found) / len(found) if found else None, cohen_kappa(found)]
        for name, found in (*pairs.items(), ("pooled", pooled))
    ]
    note = "Pooled: Yes and a rating of 1 are one label there, and it hides how unlike the criteria are."
    columns = [("criterion", ""), ("n", ","), ("equal %", ".1f"), ("Cohen's kappa", ".3f")]
    found = [Table("By criterion", columns, rows, note, bars=["Cohen's kappa"])]
    for name, mine in pairs.items():
        labels = sorted({label for both in mine for label in both})
        if labels:
            counts = Counter(mine)
            words = ["No", "Yes"] if name in ("refusal", "references") else [str(k) for k in range(6)]
            columns = [("person \\ judge", ""), *((words[label], ",") for label in labels)]
            cells = [[words[a], *(counts[a, b] for b in labels)] for a in labels]
            found.append(Table(f"{name}: people in rows, judge in columns", columns, cells))
    return found


def _label(text: str | int | None, name: str, where: str) -> int | None:
    if text is None or not str(text).strip():
        return None
    word = str(text).strip().lower()
    if name in ("refusal", "references"):
        if word in ("yes", "no"):
            return int(word == "yes")
        raise UserError(f"{where}: {name} is {text!r}; expected Yes or No")
    if word in ("1", "2", "3", "4", "5"):
        return int(word)
    raise UserError(f"{where}: {name} is {text!r}; expected 1 to 5")
