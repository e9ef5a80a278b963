"""eval.py mmlu: questions of 57 subjects with four choices, 0-shot, numerically equal to lm-eval 0.4.13.

    python eval.py mmlu --adapter base --adapter runs/psysafe --system none,v1 --out runs/mmlu

The choices are scored by their letters. Subjects are put together in four groups and as a whole, weighted by size.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from psysafe.evaluation.benchmarks.multiple_choice import (
    COLUMNS,
    Item,
    Metric,
    MultipleChoice,
    accuracy,
    listed,
    mean,
    pooled,
)
from psysafe.evaluation.comparison import Figure
from psysafe.evaluation.datasets import Repository
from psysafe.evaluation.result import Table
from psysafe.files import read_text
from psysafe.program import UserError

GROUPS = {
    "stem": """abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""",
    "other": """business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing
        medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology""",
    "social sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""",
    "humanities": """formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory
        professional_law world_religions""",
}
GROUP_OF = {subject: group for group, subjects in GROUPS.items() for subject in subjects.split()}


class MMLU(MultipleChoice):
    name = "mmlu"
    help = "accuracy on MMLU, as lm-eval"
    title = "MMLU"
    repository = Repository("cais/mmlu", ("all/test-00000-of-00001.parquet",))
    fields = ("question", "choices", "answer", "subject")
    prompt_field = "question"
    data_note = ", or the authors' folder of *_test.csv"

    def item(self, row: dict) -> Item:
        choices, answer = listed(row["choices"]), str(row["answer"]).strip()
        # The hub's files number the answer, the authors' own have its letter.
        gold = "ABCD".index(answer) if answer in ("A", "B", "C", "D") else int(answer)
        lines = [row["question"].strip(), *(f"{letter}. {text}" for letter, text in zip("ABCD", choices, strict=True))]
        subject = row["subject"].replace("_", " ")
        description = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        return Item("\n".join(lines) + "\nAnswer:", list("ABCD"), gold, row["subject"], description)

    def read(self, path: Path) -> list[dict]:
        return read_folder(path) if path.is_dir() else super().read(path)

    def tables(self, items: Sequence[Item], scores: dict[str, list[dict[str, float]]]) -> list[Table]:
        whole, by_group, by_subject = [], [], []
        for variant, by_item in scores.items():
            accuracy = subject_accuracy(items, by_item)
            whole.append([variant, *pooled(list(accuracy.values()))])
            groups: dict[str, list[Metric]] = {}
            for subject, metric in accuracy.items():
                # A subject of one's own file is counted, in a group that says that nobody knows it.
                groups.setdefault(GROUP_OF.get(subject, "unknown subject"), []).append(metric)
                by_subject.append([subject, variant, *metric])
            by_group += [[group, variant, *pooled(metrics)] for group, metrics in groups.items()]
        return [
            Table("All subjects", COLUMNS, whole, bars=["acc"]),
            Table("Groups of subjects", [("group", ""), *COLUMNS], sorted(by_group)),
            Table("Subjects", [("subject", ""), *COLUMNS], sorted(by_subject)),
        ]

    def figures(self, items: Sequence[Item], scores: dict[str, list[dict[str, float]]]) -> list[Figure]:
        groups: dict[str, list[int]] = {}
        for i, item in enumerate(items):
            groups.setdefault(GROUP_OF.get(item.subject, "unknown subject"), []).append(i)
        of_groups = [accuracy(scores, "acc", members, group) for group, members in sorted(groups.items())]
        return [accuracy(scores, "acc", group="all"), *of_groups]


def subject_accuracy(items: Sequence[Item], scores: Sequence[dict[str, float]]) -> dict[str, Metric]:
    """acc of each subject, in the order of their names."""
    by_subject: dict[str, list[float]] = {}
    for item, score in zip(items, scores, strict=True):
        by_subject.setdefault(item.subject, []).append(score["acc"])
    return {subject: mean(values) for subject, values in sorted(by_subject.items())}


def read_folder(folder: Path) -> list[dict]:
    """The authors' own files: {subject}_test.csv without a header, question, A, B, C, D, letter."""
    rows = []
    for path in sorted(folder.glob("*_test.csv")):
        # csv, not split: questions contain quoted commas and line breaks.
        for number, line in enumerate(csv.reader(io.StringIO(read_text(path), newline="")), 1):
            if len(line) != 6:
                raise UserError(f"{path} row {number}: {len(line)} fields; expected question, A, B, C, D, letter")
            subject = path.name.removesuffix("_test.csv")
            rows.append({"question": line[0], "choices": line[1:5], "answer": line[5], "subject": subject})
    if not rows:
        raise UserError(f"{folder}: no *_test.csv in it; expected the test folder of MMLU, or a file")
    return rows
