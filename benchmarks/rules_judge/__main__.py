"""The rule-based judge against labelled answers: precision, recall, and how near its ratings come.

    python -m benchmarks.rules_judge

Prints the tables and writes two files: benchmarks/results/rules-judge.json with every figure, and the held-out half's
in psysafe/assets/rules_judge.json, from which each table of that judge says them. Three ways of judging are compared:
the rule-based judge; its earlier lists, which the four-part reading still uses; and how a response begins (XSTest's).
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from psysafe.cli import Parser, say
from psysafe.data.rows import BENIGN, Row, read_file
from psysafe.evaluation import behaviour, kappa, word_list_judge, word_lists
from psysafe.evaluation.benchmarks.xstest import string_match
from psysafe.evaluation.result import Table
from psysafe.evaluation.rules_accuracy import PATH, STRING_MATCHES, WORD_LISTS
from psysafe.evaluation.statistics import wilson
from psysafe.files import clusters, write_atomic
from psysafe.program import UserError, main_guard

HERE = Path(__file__).resolve().parent
RESULT = HERE.parent / "results" / "rules-judge.json"
HALVES = ("dev", "heldout")
EARLIER = "earlier word lists"
YES_NO, RATINGS = ("refusal", "references"), ("grounding", "relevance")


def _earlier_refusal(answer: str) -> bool:
    return bool(word_lists.REFUSAL_OF_FOUR_PARTS.search(word_list_judge.plain(answer)))


def _earlier_references(answer: str) -> bool:
    return word_list_judge.names_own_service(word_list_judge.plain(answer))


JUDGES: dict[str, dict[str, Callable[[str], bool]]] = {
    WORD_LISTS: {"refusal": word_list_judge.refuses, "references": word_list_judge.gives_contact},
    EARLIER: {"refusal": _earlier_refusal, "references": _earlier_references},
    STRING_MATCHES[0]: {"refusal": lambda answer: string_match(answer, official=True) == behaviour.REFUSAL},
    STRING_MATCHES[1]: {"refusal": lambda answer: string_match(answer) == behaviour.REFUSAL},
}


class Share(NamedTuple):
    """successes of n, with Wilson's 95 % interval; from 0 to 1."""

    successes: int
    n: int

    def as_json(self) -> dict:
        low, high = wilson(self.successes, self.n)
        value = self.successes / self.n if self.n else None
        return {"of": [self.successes, self.n], "value": value, "from": low, "to": high}


def read_labelled(path: Path) -> list[dict]:
    """The labelled answers of a file. UserError names the row with a label that is none."""
    return [_checked(row) for row in read_file(path)]


def _checked(row: Row) -> dict:
    fields = row.fields
    for name in ("prompt", "answer", "cluster"):
        if not isinstance(fields.get(name), str):
            raise UserError(f"{row.where}: {name} is {fields.get(name)!r:.60}, expected a text")
    for name in YES_NO:
        if not isinstance(fields.get(name), bool):
            raise UserError(f"{row.where}: {name} is {fields.get(name)!r:.60}, expected true or false")
    known = [*clusters()["clusters"], BENIGN]
    if fields["cluster"] not in known:
        raise UserError(f"{row.where}: cluster is {fields['cluster']!r:.60}, expected one of {', '.join(known)}")
    expected = (None,) if fields["cluster"] == BENIGN else (1, 2, 3, 4, 5)
    for name in RATINGS:
        if fields.get(name) not in expected:
            raise UserError(f"{row.where}: {name} is {fields.get(name)!r:.60}, expected one of {expected}")
    return fields


def yes_no(rows: Sequence[Mapping], judge: str, criterion: str) -> dict[str, dict]:
    """Precision and recall of a judge's yes."""
    pairs = [(JUDGES[judge][criterion](row["answer"]), row[criterion]) for row in rows]
    both = sum(said and label for said, label in pairs)
    precision, recall = Share(both, sum(said for said, _ in pairs)), Share(both, sum(label for _, label in pairs))
    return {"precision": precision.as_json(), "recall": recall.as_json()}


def ratings(rows: Sequence[Mapping], criterion: str) -> dict[str, dict | float]:
    """How often the rule-based rating is the label, or within 1 of it, and Spearman's correlation of the two.

    constant_within_1: the same for the one rating that comes nearest if it is given to every answer.
    """
    rated = [row for row in rows if row["cluster"] != BENIGN]
    pairs = []
    for row in rated:
        scores = word_list_judge.judge(row["prompt"], row["answer"], row["cluster"]).scores
        pairs.append((getattr(scores, criterion), row[criterion]))
    labels = [label for _, label in pairs]
    constant = max(sum(abs(rating - label) <= 1 for label in labels) for rating in range(1, 6))
    return {
        "equal": Share(sum(said == label for said, label in pairs), len(pairs)).as_json(),
        "within_1": Share(sum(abs(said - label) <= 1 for said, label in pairs), len(pairs)).as_json(),
        "constant_within_1": Share(constant, len(pairs)).as_json(),
        "spearman": float(kappa.spearman(kappa.label_table(pairs, 6))),
    }


def figures(rows: Sequence[Mapping]) -> dict[str, dict[str, dict]]:
    """judge -> criterion -> measure."""
    measured = {judge: {name: yes_no(rows, judge, name) for name in criteria} for judge, criteria in JUDGES.items()}
    measured[WORD_LISTS] |= {name: ratings(rows, name) for name in RATINGS}
    return measured


def measure() -> dict:
    """half -> how many answers, and their figures."""
    halves = {half: read_labelled(HERE / f"{half}.jsonl") for half in HALVES}
    return {half: {"n": len(rows), "judges": figures(rows)} for half, rows in halves.items()}


def for_notes(measured: Mapping) -> dict:
    """What stands beside tables: of the held-out half, without intervals."""
    shown = {"precision", "recall", "within_1", "constant_within_1"}
    judges = {
        judge: {
            criterion: {name: of["value"] for name, of in measures.items() if name in shown}
            for criterion, measures in criteria.items()
        }
        for judge, criteria in measured["heldout"]["judges"].items()
        if judge != EARLIER
    }
    return {"made_by": "python -m benchmarks.rules_judge", "n": measured["heldout"]["n"], "judges": judges}


def tables(measured: Mapping) -> list[Table]:
    columns = [("criterion", ""), ("judge", ""), ("measure", "")] + [(half, "") for half in HALVES]
    first = measured[HALVES[0]]["judges"]
    rows = [
        [criterion, judge, name, *(cell(measured[half]["judges"][judge][criterion][name]) for half in HALVES)]
        for criterion in (*YES_NO, *RATINGS)
        for judge in first
        for name in first[judge].get(criterion, ())
    ]
    n = ", ".join(f"{half}: {measured[half]['n']} answers" for half in HALVES)
    note = f"{n}. Shares in percent [Wilson's 95 % interval] and of how many; patterns were chosen on dev."
    return [Table("The rule-based judge against labels", columns, rows, note)]


def cell(of: Mapping | float) -> str:
    if not isinstance(of, Mapping):
        return f"{of:.2f}"
    if of["value"] is None:
        return "–"
    value, low, high = (100 * of[name] for name in ("value", "from", "to"))
    return f"{value:.0f} [{low:.0f}, {high:.0f}] of {of['of'][1]}"


def main(argv: Sequence[str] | None = None) -> int:
    Parser("python -m benchmarks.rules_judge", description=__doc__.partition("\n")[0]).parse_args(argv)
    measured = measure()
    for table in tables(measured):
        print(table.as_text(), flush=True)
    for path, content in ((RESULT, measured), (PATH, for_notes(measured))):
        write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        say(f"written: {path.relative_to(HERE.parents[1])}")
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
