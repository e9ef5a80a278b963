"""eval.py mmlu, eval.py hellaswag: 0-shot accuracy, numerically equal to lm-eval 0.4.13.

    python eval.py mmlu --adapter base --adapter runs/psysafe --system none,v1 --out runs/mmlu
    python eval.py hellaswag --data hellaswag_val.jsonl --adapter base --adapter runs/psysafe --out runs/hellaswag

A choice's log-likelihood is that of its text behind the question's; acc takes the likeliest, acc_norm the likeliest
per character. Equality covers the request strings, the cut between question and choice in tokens, the metrics and their
standard errors (lm-eval: `api/task.py`, `api/model.py`, `tasks/hellaswag/utils.py`, `tasks/mmlu/default`).
"""

import argparse
import csv
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from psysafe.checkpoint.adapter import load_adapter
from psysafe.data.prompts import system_text
from psysafe.data.rows import read_table
from psysafe.data.tokenizer import Tokenizer
from psysafe.evaluation import datasets as hub
from psysafe.evaluation import models_under_test as subjects
from psysafe.evaluation.benchmarks import log_likelihood as scoring
from psysafe.evaluation.models_under_test import BASE, Setting, Subject
from psysafe.evaluation.overlap import overlap, training_prompts
from psysafe.evaluation.result import Result, Table, say
from psysafe.files import expand, parse_json
from psysafe.journal import Journal, key_of
from psysafe.model.lora import detach
from psysafe.program import UserError

MMLU_GROUPS = {
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
GROUP_OF = {subject: group for group, subjects_ in MMLU_GROUPS.items() for subject in subjects_.split()}


class Item(NamedTuple):
    """A question as lm-eval puts it: description + question, then one of the choices."""

    question: str
    choices: list[str]
    gold: int
    subject: str = ""
    description: str = ""


class Metric(NamedTuple):
    value: float
    stderr: float | None  # of a single item there is none
    n: int


# From rows to requests


def hellaswag_item(row: dict) -> Item:
    context = row["ctx_a"] + " " + row["ctx_b"].capitalize()  # the field ctx is not used
    question = _clean(row["activity_label"] + ": " + context)
    return Item(question, [_clean(ending) for ending in _listed(row["endings"])], int(row["label"]))


def mmlu_item(row: dict) -> Item:
    choices, answer = _listed(row["choices"]), str(row["answer"]).strip()
    gold = "ABCD".index(answer) if answer in ("A", "B", "C", "D") else int(answer)
    lines = [row["question"].strip(), *(f"{letter}. {text}" for letter, text in zip("ABCD", choices, strict=True))]
    subject = row["subject"].replace("_", " ")
    description = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return Item("\n".join(lines) + "\nAnswer:", list("ABCD"), gold, row["subject"], description)


def _clean(text: str) -> str:
    """What is left of WikiHow's marks is taken out; two spaces become one, once."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _listed(value) -> list[str]:
    return parse_json(value) if isinstance(value, str) else value


def request(item: Item, system: str | None, tokenizer: Tokenizer | None, thinking: bool) -> tuple[str, list[str]]:
    """(context, continuations). tokenizer: whose chat template to put around it; None for plain text."""
    # Whitespace on either side of the joint stands for the separator.
    joint = "\n\n" if system and item.description and not system[-1].isspace() else ""
    head = (system or "") + joint + item.description
    if tokenizer is None:
        return head + item.question, [" " + choice for choice in item.choices]
    messages = [{"role": "system", "content": head}] if head else []
    messages.append({"role": "user", "content": item.question})
    return tokenizer.render(messages, add_generation_prompt=True, enable_thinking=thinking), list(item.choices)


# From log-likelihoods to metrics


def correct(item: Item, log_likelihoods: Sequence[float]) -> dict[str, float]:
    """acc and acc_norm of one item, 0 or 1; of equal choices the first is taken."""
    per_character = [ll / len(choice) for ll, choice in zip(log_likelihoods, item.choices, strict=True)]
    return {"acc": float(_argmax(log_likelihoods) == item.gold), "acc_norm": float(_argmax(per_character) == item.gold)}


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: (values[i], -i))


def mean(values: Sequence[float]) -> Metric:
    """With its standard error: sample standard deviation / sqrt(n)."""
    n, average = len(values), sum(values) / len(values)
    if n < 2:
        return Metric(average, None, n)
    return Metric(average, math.sqrt(sum((x - average) ** 2 for x in values) / (n - 1)) / math.sqrt(n), n)


def pooled(metrics: Sequence[Metric]) -> Metric:
    """Of a group: leaves weighted by size, standard errors by pooled variance."""
    total, k = sum(m.n for m in metrics), len(metrics)
    value = sum(m.value * m.n for m in metrics) / total
    if any(m.stderr is None for m in metrics) or total <= k:
        return Metric(value, None, total)
    variance = sum((m.n - 1) * m.stderr**2 * m.n for m in metrics) / (total - k)
    return Metric(value, math.sqrt(variance / total), total)


# The benchmarks


class Benchmark:
    """One of the two as a command of eval.py."""

    def __init__(self, name: str, fields: Sequence[str], item: Callable[[dict], Item]):
        self.name, self.fields, self.item = name, fields, item
        self.__doc__ = __doc__  # what --help shows

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        folder = ", or the authors' folder of *_test.csv" if self.name == "mmlu" else ""
        hub.add_arguments(parser, self.name, "FILE", f"rows with {', '.join(self.fields)}{folder}")
        parser.add_argument("--chat", action="store_true", help="put the questions into the chat template")
        parser.add_argument("--max-tokens", type=int, default=0, metavar="N",
                            help="where contexts are cut, at their left (the model's own limit)")  # fmt: skip
        parser.add_argument("--batch-tokens", type=int, default=0, metavar="N", help="tokens of a forward pass (auto)")
        parser.add_argument("--train", nargs="*", default=[], metavar="FILE", help="training rows, for overlap")
        subjects.add_arguments(parser)

    def run(self, args: argparse.Namespace) -> Result:
        path, origin = hub.locate(self.name, args)
        rows = self.read(path)[: args.limit or None]
        items = []
        for number, row in enumerate(rows, 1):
            try:
                items.append(self.item(row))
                assert 0 <= items[-1].gold < len(items[-1].choices)
            except (ValueError, TypeError, AttributeError, AssertionError, OverflowError):
                raise UserError(
                    f"{path} row {number}: not a row of {self.name}; expected {', '.join(self.fields)}"
                ) from None
        subject, settings = subjects.from_arguments(args)
        if args.chat and args.thinking:
            say("warning: the template ends in <think>, so each choice is scored as the first words of reasoning; "
                "--no-thinking scores it as the answer")  # fmt: skip
        found, rate = self.score(subject, settings, items, args)
        result = Result(self.name, f"{self.name.upper() if self.name == 'mmlu' else 'HellaSwag'}, 0-shot", [])
        result.tables = tables(self.name, items, {s.name: found[s] for s in settings})
        result.settings = {**subject.facts(), "chat template": args.chat, **origin}
        result.settings = {k: v for k, v in result.settings.items() if k not in GENERATION_ONLY}
        result.notes = [rate] if rate else []
        if args.train:
            asked = [row.get("question") or row["ctx_a"] for row in rows]
            result.contamination = overlap(asked, training_prompts(args.train))
        return result

    def score(self, subject: Subject, settings: Sequence[Setting], items: Sequence[Item], args):
        """({setting: [log-likelihoods of each item]}, a line on speed)."""
        identity, found, rate, loaded = subject.identity[:3], {}, "", None
        with Journal(Path(args.out) / "items.jsonl") as journal:
            for setting in settings:
                adapter, system = subjects.setting_identity(setting)
                asked = [self.name, identity, adapter, system, args.chat, args.thinking, args.max_tokens]
                keys = [key_of(*asked, *item) for item in items]
                if any(key not in journal.rows for key in keys):
                    loaded = loaded or subject.loaded()
                    rate = self._score(*loaded, setting, items, keys, journal, args)
                found[setting] = [journal.rows[key]["log_likelihoods"] for key in keys]
            journal.sync()
        return found, rate

    def _score(self, model, tokenizer, setting: Setting, items, keys, journal: Journal, args) -> str:
        limit = args.max_tokens or model.config.max_position_embeddings
        template, system = tokenizer if args.chat else None, system_text(setting.system)
        encoded = [
            scoring.encode(tokenizer, *request(item, system, template, args.thinking), limit) for item in items
        ]
        sizes = [scoring.size(branches) for branches in encoded]
        whole = scoring.batches(model, encoded, args.batch_tokens)
        todo = [batch for batch in whole if any(keys[i] not in journal.rows for i in batch)]
        total, done, began, said = sum(sizes[i] for batch in todo for i in batch), 0, time.monotonic(), 0.0
        if setting.adapter != BASE:
            load_adapter(model, expand(setting.adapter))
        for batch in todo:
            for i, lls in zip(batch, scoring.score(model, [encoded[i] for i in batch]), strict=True):
                if keys[i] not in journal.rows:
                    row = {"setting": setting.name, "item": i, "subject": items[i].subject, "log_likelihoods": lls}
                    journal.append(keys[i], row | correct(items[i], lls))
            done, now = done + sum(sizes[i] for i in batch), time.monotonic()
            rate = done / max(now - began, 1e-9)
            if now - said > 2 or done == total:
                left = (total - done) / rate
                say(f"{setting.name}: {done:,} of {total:,} tokens, {rate:,.0f} tokens/s, {left:,.0f} s left")
                said = now
        detach(model)
        saved = sum(len(b.prefix) * (len(b.choices) - 1) for batch in todo for i in batch for b in encoded[i])
        return f"{rate:,.0f} tokens/s; contexts shared by their choices saved {saved / (saved + total):.0%} of them"

    def read(self, path: Path) -> list[dict]:
        if self.name == "mmlu" and path.is_dir():
            return _read_folder(path)
        return read_table(path, self.fields)


GENERATION_ONLY = {"max_new_tokens", "max_think_tokens", "context", "temperature", "top_k", "top_p", "min_p",
                   "repetition_penalty", "presence_penalty", "seed"}  # fmt: skip


def _read_folder(folder: Path) -> list[dict]:
    """The authors' own files: {subject}_test.csv without a header, question, A, B, C, D, letter."""
    rows = []
    for path in sorted(folder.glob("*_test.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            for number, line in enumerate(csv.reader(file), 1):
                if len(line) != 6:
                    raise UserError(f"{path} row {number}: {len(line)} fields; expected question, A, B, C, D, letter")
                subject = path.name.removesuffix("_test.csv")
                rows.append({"question": line[0], "choices": line[1:5], "answer": line[5], "subject": subject})
    if not rows:
        raise UserError(f"{folder}: no *_test.csv in it; expected the test folder of MMLU, or a file")
    return rows


def tables(name: str, items: Sequence[Item], found: dict[str, list[list[float]]]) -> list[Table]:
    """found: setting -> log-likelihoods of each item."""
    metrics = {s: [correct(item, lls) for item, lls in zip(items, rows, strict=True)] for s, rows in found.items()}
    columns = [("setting", ""), ("n", ","), ("acc", ".4f"), ("stderr", ".4f")]
    if name == "hellaswag":
        rows = []
        for setting, scored in metrics.items():
            acc, norm = mean([m["acc"] for m in scored]), mean([m["acc_norm"] for m in scored])
            rows.append([setting, acc.n, acc.value, acc.stderr, norm.value, norm.stderr])
        columns += [("acc_norm", ".4f"), ("stderr of it", ".4f")]
        return [Table("Accuracy", columns, rows, bars=["acc_norm"])]
    leaves = {setting: mmlu_leaves(items, scored) for setting, scored in metrics.items()}
    whole, groups = [], []
    for setting, by_subject in leaves.items():
        whole.append([setting, *_cells(pooled(list(by_subject.values())))])
        for group in dict.fromkeys(GROUP_OF.get(subject, "unknown subject") for subject in by_subject):
            mine = [m for subject, m in by_subject.items() if GROUP_OF.get(subject, "unknown subject") == group]
            groups.append([group, setting, *_cells(pooled(mine))])
    subjects_ = [[subject, s, *_cells(m)] for s, by_subject in leaves.items() for subject, m in by_subject.items()]
    return [
        Table("All subjects", columns, whole, bars=["acc"]),
        Table("Groups of subjects", [("group", ""), *columns], sorted(groups)),
        Table("Subjects", [("subject", ""), *columns], sorted(subjects_)),
    ]


def _cells(metric: Metric) -> list:
    return [metric.n, metric.value, metric.stderr]


def mmlu_leaves(items: Sequence[Item], scored: Sequence[dict[str, float]]) -> dict[str, Metric]:
    by_subject: dict[str, list[float]] = {}
    for item, metrics in zip(items, scored, strict=True):
        by_subject.setdefault(item.subject, []).append(metrics["acc"])
    return {subject: mean(values) for subject, values in sorted(by_subject.items())}


MMLU = Benchmark("mmlu", ["question", "choices", "answer", "subject"], mmlu_item)
HELLASWAG = Benchmark("hellaswag", ["activity_label", "ctx_a", "ctx_b", "endings", "label"], hellaswag_item)
