"""eval.py agreement: how far people agree with each other, and a judge with people.

    python eval.py agreement --human labels.csv --judged runs/judged --out runs/agreement
    python eval.py agreement --ratings anna.json ben.json --key key.json --judged runs/judged --out runs/agreement

The CSV has a row per answer: prompt, refusal (Yes or No), grounding (1 to 5), references (Yes or No), relevance
(1 to 5), variant where several were judged, and rater where several people labelled. An empty cell was not labelled;
4.0, True and nan are read as pandas writes them. A rater labels an answer once: a second row of it is refused.
--ratings takes what raters exported from a page of eval.py rate, and --key the page's key. --judged takes a folder of
eval.py judge, or a file like the CSV; without it only people are compared.

Pooled kappa is computed as the published one: all labels of all criteria in one list, Yes as 1, No as 0, ratings as
they are. So a Yes and a rating of 1 count as the same label. The pooled kappa can be far above that of a criterion: the
published 0.61 is pooled from criteria with 0.79, 0.26, 1.00 and 0.19.
"""

import argparse
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from psysafe.evaluation import kappa
from psysafe.evaluation.benchmark import Evaluation
from psysafe.evaluation.benchmarks import preferences
from psysafe.evaluation.criteria import CRITERIA
from psysafe.evaluation.labels import LABELS, Answer, Labels, Ratings, read_csv, read_judged, read_ratings
from psysafe.evaluation.result import Result, Table, load
from psysafe.evaluation.statistics import percentile_interval, resampled_sums
from psysafe.evaluation.stored import ITEMS
from psysafe.program import UserError

POOLED = "pooled"
K = 6  # labels are 0 to 5
MAJORITY = "the majority"
Tables = dict[str, dict[str, np.ndarray]]  # criterion, or pooled -> prompt -> table of labels (K, K)


class Agreement(Evaluation):
    name = "agreement"
    help = "people's labels, and a judge's scores against them: kappa"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--human", metavar="CSV", help="people's labels")
        help_text = "people's exports of a rating page"
        parser.add_argument("--ratings", nargs="+", default=[], metavar="FILE", help=help_text)
        parser.add_argument("--key", metavar="FILE", help="of --ratings: the key of that page")
        parser.add_argument("--judged", metavar="DIR|FILE", help="the --out folder of eval.py judge, or labels as CSV")

    def without_effect(self, args: argparse.Namespace) -> dict[str, str]:
        return {} if args.ratings else {"--key": "without --ratings: a CSV names its variants"}

    def run(self, args: argparse.Namespace) -> Result:
        if bool(args.human) == bool(args.ratings):
            raise UserError("expected one of --human CSV and --ratings FILE ... --key FILE")
        if args.ratings and not args.key:
            raise UserError("--ratings needs --key FILE, the key of the rating page, which names the variants")
        judge, judged = read_judge(args.judged) if args.judged else ("", {})
        variants = dict.fromkeys(variant for variant, _ in judged)
        source, people = args.human or args.ratings[0], read_people(args, variants)
        if not judged and len(people.labels) < 2 and not people.preferences:
            people_text = "one person" if people.labels else "nobody"
            raise UserError(f"{source}: labels of {people_text}, and no --judged to compare them with; add either")
        n_matched = require_match(people.labels, judged, source) if judged else 0
        title = "Agreement of the judge with people" if judged else "Agreement of people"
        result = Result("agreement", title, tables(people.labels, judged))
        result.tables += preferences.tables(people.preferences)
        result.settings = {"human": ", ".join([args.human] if args.human else args.ratings), "key": args.key or ""}
        result.settings |= {"judged": args.judged or "", "judge": judge}
        result.notes = notes(people.labels, n_matched if judged else None)
        return result


def read_people(args: argparse.Namespace, variants: Mapping[str, None]) -> Ratings:
    if args.ratings:
        return read_ratings(args.ratings, args.key)
    return Ratings(read_csv(args.human, variants), [])


def read_judge(path: str) -> tuple[str, Labels]:
    """(the judge's name, its labels)."""
    if not Path(path).is_dir():
        by_rater = read_csv(path)
        if len(by_rater) != 1:
            raise UserError(f"{path}: labels of {len(by_rater)} raters; expected those of one judge")
        (labels,) = by_rater.values()
        return Path(path).stem, labels
    judgement, _ = load(path)
    if judgement.kind != "judge":
        raise UserError(f"{path}: a result of {judgement.kind}; expected the --out folder of eval.py judge")
    several = sorted(Path(path, "judges").glob("*/result.json"))
    if several and not Path(path, ITEMS).exists():
        raise UserError(f"{path}: the result of several judges; give one of them, as in --judged {several[0].parent}")
    return str(judgement.settings.get("judge")), read_judged(Path(path, ITEMS))


def require_match(people: Mapping[str, Labels], judged: Labels, source: str) -> int:
    """How many labelled answers were judged. UserError where none has a label of both."""
    answers = dict.fromkeys(answer for labels in people.values() for answer in labels)
    if not any(set(labels[answer]) & set(judged.get(answer, ())) for labels in people.values() for answer in labels):
        variants = ", ".join(dict.fromkeys(variant for variant, _ in judged))
        raise UserError(
            f"{source}: none of its labels belongs to a judged answer; expected prompts and variants as in "
            f"{variants:.99}"
        )
    return sum(answer in judged for answer in answers)


def notes(people: Mapping[str, Labels], n_judged: int | None) -> list[str]:
    n_answers = len({answer for labels in people.values() for answer in labels})
    unmatched = "" if n_judged is None else f", {n_answers - n_judged:,} of them not among the judged"
    lines = [f"{n_answers:,} labelled answers{unmatched}"]
    if len(people) > 1:
        lines.append(f"raters: {', '.join(f'{rater} ({len(labels):,} answers)' for rater, labels in people.items())}")
        lines.append("Majority: the label that most raters of an answer gave; without one the answer has none.")
    return lines


def majority(people: Sequence[Labels]) -> Labels:
    """Of each answer and criterion the label that more raters gave than any other; none where two are as frequent."""
    given: dict[Answer, dict[str, Counter]] = {}
    for labels in people:
        for answer, by_criterion in labels.items():
            for name, label in by_criterion.items():
                given.setdefault(answer, {}).setdefault(name, Counter())[label] += 1
    labels: Labels = {}
    for answer, by_criterion in given.items():
        for name, counts in by_criterion.items():
            (label, most), *others = counts.most_common(2)
            if not others or others[0][1] < most:
                labels.setdefault(answer, {})[name] = label
    return labels


def label_tables(first: Labels, second: Labels) -> Tables:
    """Both raters' labels by criterion and prompt: prompts are what a bootstrap draws."""
    tables: Tables = {name: {} for name in (*CRITERIA, POOLED)}
    for answer, by_criterion in first.items():
        for name, label in by_criterion.items():
            if (other := second.get(answer, {}).get(name)) is not None:
                for of in (name, POOLED):
                    tables[of].setdefault(answer[1], np.zeros((K, K)))[label, other] += 1
    return tables


# Tables


def tables(people: Mapping[str, Labels], judged: Labels) -> list[Table]:
    """The judge against people, first; then rater against rater. judged: empty without a judge."""
    several = len(people) > 1
    consensus = majority(list(people.values()))
    against = {}  # who is compared -> their labels
    if judged:
        against[f"judge, {MAJORITY}" if several else "judge, people"] = label_tables(consensus, judged)
    if judged and several:
        against |= {f"judge, {rater}": label_tables(labels, judged) for rater, labels in people.items()}
    raters = {f"{a}, {b}": label_tables(people[a], people[b]) for a, b in itertools.combinations(people, 2)}
    shown = []
    if judged:
        (_, first), *others = against.items()
        shown.append(table_of_agreement("By criterion" + (f", judge against {MAJORITY}" if several else ""), first))
        shown += [confusion(name, first[name]) for name in CRITERIA if first[name]]
        shown += [table_of_pairs("Judge against each rater", dict(others))] if others else []
    if raters:
        shown += [table_of_pairs("Rater against rater", raters), table_of_all(people)]
    return [*shown, table_of_intervals(against | raters)] if against or raters else shown


COLUMNS = [("criterion", ""), ("n", ","), ("equal %", ".1f"), ("Cohen's kappa", ".3f"), ("quadratic kappa", ".3f"),
           ("Spearman", ".3f"), ("Pearson", ".3f")]  # fmt: skip
ONE_LABEL = "Where all labels are one and the same, kappa and alpha have no value, and are given as 1."
NOTE = f"Pooled: Yes and a rating of 1 are one label there, and it hides how unlike the criteria are. {ONE_LABEL}"


def table_of_agreement(title: str, tables: Tables) -> Table:
    rows = [[name, *_measures(by_prompt)] for name, by_prompt in tables.items()]
    return Table(title, COLUMNS, rows, NOTE, bars=["Cohen's kappa"])


def table_of_pairs(title: str, pairs: Mapping[str, Tables]) -> Table:
    rows = [[who, name, *_measures(by_prompt)] for who, tables in pairs.items() for name, by_prompt in tables.items()]
    return Table(title, [("raters", ""), *COLUMNS], rows, ONE_LABEL)


def _measures(by_prompt: Mapping[str, np.ndarray]) -> list:
    table = sum(by_prompt.values(), np.zeros((K, K)))
    return [int(table.sum()), *(_number(measure(table)) for measure in kappa.OF_TWO.values())]


def table_of_all(people: Mapping[str, Labels]) -> Table:
    """Krippendorff's alpha of all raters at once; an answer counts where two or more labelled it."""
    rows = []
    for name in CRITERIA:
        by_prompt: dict[str, np.ndarray] = {}
        n = 0
        for answer in dict.fromkeys(answer for labels in people.values() for answer in labels):
            given = [labels[answer][name] for labels in people.values() if name in labels.get(answer, {})]
            if len(given) > 1:
                n += 1
                by_prompt[answer[1]] = by_prompt.get(answer[1], 0) + kappa.coincidences(given, K)
        table = sum(by_prompt.values(), np.zeros((K, K)))
        ends = resampled_intervals(by_prompt, kappa.OF_MANY)
        rows.append([name, n, *(cell for of, measure in kappa.OF_MANY.items()
                                for cell in (_number(measure(table)), *map(_number, ends[of])))])  # fmt: skip
    named = [(f"{of}{end}", ".3f") for of in kappa.OF_MANY for end in ("", ", from", ", to")]
    weights = "Nominal: every disagreement counts the same; interval: by squared distance."
    note = f"Krippendorff's alpha. {weights} {ONE_LABEL}"
    return Table("All raters", [("criterion", ""), ("n", ","), *named], rows, note)


def table_of_intervals(pairs: Mapping[str, Tables]) -> Table:
    columns = [("raters", ""), ("criterion", ""), ("measure", ""), ("prompts", ","), ("value", ".3f"), ("from", ".3f"),
               ("to", ".3f")]  # fmt: skip
    rows = []
    for who, tables in pairs.items():
        for name, by_prompt in tables.items():
            _, *values = _measures(by_prompt)
            ends = resampled_intervals(by_prompt, kappa.OF_TWO)
            rows += [[who, name, measure, len(by_prompt), value, *map(_number, ends[measure])]
                     for measure, value in zip(kappa.OF_TWO, values, strict=True)]  # fmt: skip
    return Table("Intervals", columns, rows, f"95 %, percentile bootstrap over prompts. {ONE_LABEL}")


def resampled_intervals(by_prompt: Mapping[str, np.ndarray], measures: Mapping) -> dict[str, tuple[float, float]]:
    """measure -> the 95 % interval when prompts are drawn with replacement."""
    if not by_prompt:
        return dict.fromkeys(measures, (math.nan, math.nan))
    sums = resampled_sums([table.ravel() for table in by_prompt.values()]).reshape(-1, K, K)
    return {name: percentile_interval(measure(sums)) for name, measure in measures.items()}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def confusion(name: str, by_prompt: Mapping[str, np.ndarray]) -> Table:
    """How often each label of a person met each label of the judge."""
    counts = sum(by_prompt.values(), np.zeros((K, K))).astype(int).tolist()
    given = {label for label in range(K) if any(counts[label]) or any(row[label] for row in counts)}
    labels = {word.capitalize(): label for word, label in LABELS[name].items() if label in given}
    columns = [("person \\ judge", ""), *((word, ",") for word in labels)]
    rows = [[word, *(counts[person][judge] for judge in labels.values())] for word, person in labels.items()]
    return Table(f"{name}: people in rows, judge in columns", columns, rows)
