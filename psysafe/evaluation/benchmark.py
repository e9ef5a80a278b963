"""What a command of eval.py is (`Evaluation`), and what a benchmark must say of itself (`Benchmark`).

A new benchmark is one file in benchmarks/ and one entry in eval.py. The file says where its rows are, what the judge is
asked about an answer, how its reply is read, and which tables the verdicts make. `Benchmark.run` does the rest: answers
of every variant, judging, failures, overlap with training rows, settings and notes of the result.
"""

import abc
import argparse
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from psysafe.evaluation import datasets, judge_models, models_under_test, unfinished
from psysafe.evaluation.judge_models import ask_all
from psysafe.evaluation.models_under_test import BASE, Question, only_rank_0
from psysafe.evaluation.overlap import add_training_argument, overlap_with_files
from psysafe.evaluation.result import Result, Table
from psysafe.program import UserError


class Evaluation(abc.ABC):
    """A command of eval.py: `python eval.py NAME --out DIR ...`."""

    name: str
    help: str  # one sentence, for the list of commands

    @property
    def description(self) -> str:
        """For --help: the docstring of the file in which the command is defined."""
        return inspect.getmodule(type(self)).__doc__

    @abc.abstractmethod
    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the command's flags; --out is there already."""

    def without_effect(self, args: argparse.Namespace) -> dict[str, str]:
        """Flag -> why it has no effect beside the others. eval.py refuses one that is given nevertheless."""
        return {}

    def answers_on_ranks(self, args: argparse.Namespace) -> bool:
        """Whether several ranks (torchrun) share the questions of such a run. Else it takes one rank."""
        return False

    @abc.abstractmethod
    def run(self, args: argparse.Namespace) -> Result:
        """The finished evaluation. What is computed on the way is saved in args.out. UserError for a user's mistake."""


class Item(NamedTuple):
    """A question of a benchmark, and the row that it was read from."""

    label: str  # its name in the list of failures
    prompt: str
    row: dict


@dataclass
class Rows:
    """What a benchmark has read. A file may fall into parts, such as mutations; one without parts is the part ""."""

    parts: dict[str, list[Item]]
    prompts: list[str]  # looked for among the training rows
    settings: dict = field(default_factory=dict)  # for the result
    notes: list[str] = field(default_factory=list)


Texts = Mapping[str, Sequence[str | None]]  # variant -> its answer to each item of a part; None where it has none
Verdicts = Mapping[str, Sequence[Any]]  # variant -> the verdict on each answer; None where there is none


class Judged(NamedTuple):
    """A benchmark's items with answers and verdicts, each by part."""

    parts: dict[str, list[Item]]
    texts: dict[str, Texts]
    verdicts: dict[str, Verdicts]
    judge: str  # its name; `rules_name` where the rules judged


class Benchmark(Evaluation):
    """Questions that each variant answers, and a judge that gives a verdict on each answer."""

    title: str  # of the result: "TITLE, judged by ..."
    repository: datasets.Repository | None = None  # where the rows are; None where --data has to be given
    data: tuple[str, str]  # of --data: what stands for it in --help, and what it means
    max_new_tokens = 4096
    temperature = 0.0
    rules = ""  # what --judge rules does here, for --help; "" where no rule can judge
    rules_name = ""
    note_on_judge = ""  # a note of every result that a model judged

    # What a benchmark defines.

    @abc.abstractmethod
    def load(self, args: argparse.Namespace, path: Path) -> Rows:
        """The items to ask. path: the file or folder of --data, or what was fetched from the hub."""

    @abc.abstractmethod
    def judge_messages(self, item: Item, answer: str) -> list[dict]:
        """What the judge is shown and asked."""

    @abc.abstractmethod
    def parse(self, reply: str) -> Any:
        """The verdict that a reply of the judge holds. Never None, which stands for a reply that is missing."""

    @abc.abstractmethod
    def tables(self, judged: Judged) -> list[Table]:
        """What the verdicts come to. The first table has a column `variant`, and gets one of unfinished answers."""

    # What a benchmark may define.

    def more_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Flags of this benchmark alone."""

    def needed(self, args: argparse.Namespace) -> datasets.Repository | None:
        """The repository with the files that these arguments need."""
        return self.repository

    def judge_by_rules(self, item: Item, answer: str) -> Any:
        """The verdict of --judge rules; a benchmark that sets `rules` defines it."""
        raise NotImplementedError

    def answer_text(self, answer: dict, rules: str) -> str:
        """What of an answer's row is judged. rules: on unfinished reasoning (psysafe/evaluation/unfinished.py)."""
        return answer["answer"]

    def prepare(self, part: str, texts: Texts, args: argparse.Namespace) -> tuple[Texts, dict[str, str]]:
        """(the texts as the judge is to see them, failed items): for answers that have to be decoded or translated."""
        return texts, {}

    def notes(self, judged: Judged) -> list[str]:
        """What the tables do not say."""
        return []

    # What all benchmarks do alike.

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        datasets.add_arguments(parser, self.repository, *self.data)
        self.more_arguments(parser)
        add_training_argument(parser)
        unfinished.add_argument(parser)
        models_under_test.add_arguments(parser, self.max_new_tokens, self.temperature)
        judge_models.add_arguments(parser, self.rules or "not possible here: it takes a model")

    def answers_on_ranks(self, args: argparse.Namespace) -> bool:
        return True

    def without_effect(self, args: argparse.Namespace) -> dict[str, str]:
        return judge_models.without_effect(args) | models_under_test.without_effect(args)

    def run(self, args: argparse.Namespace) -> Result:
        judge = judge_models.from_arguments(args, temperature=0.0)
        if judge is None and not self.rules:
            remedy = "give --judge-url and --judge-model, or --judge-local"
            raise UserError(f"{self.name} has no rule-based judge; {remedy}")
        # Rows before models: a missing file is found in a second, weights take minutes.
        path, origin = datasets.locate(self.needed(args), args)
        rows = self.load(args, path)
        model, variants = models_under_test.from_arguments(args)
        unfinished.require_base([variant.adapter for variant in variants], args.rules)
        out = Path(args.out)
        judged = Judged(rows.parts, {}, {}, judge.name if judge else self.rules_name)
        failed, n_left_out = {}, 0
        unfinished_by_variant: dict[str, list[bool]] = {variant.name: [] for variant in variants}
        suffixes = {part: f"_{part}.jsonl" if part else ".jsonl" for part in rows.parts}
        by_part = {}
        for part, items in rows.parts.items():
            # The number seeds an answer's sampling, so it counts all items, whatever is saved already.
            questions = [Question(number, item.prompt) for number, item in enumerate(items, 1)]
            by_part[part] = model.answers(variants, questions, out / f"answers{suffixes[part]}")
        only_rank_0()
        for part, items in rows.parts.items():
            numbers = range(1, len(items) + 1)
            answers = {variant.name: [by_part[part][variant][n] for n in numbers] for variant in variants}
            is_unfinished = {name: [row["unfinished_thinking"] for row in column] for name, column in answers.items()}
            left_out = self._left_out(is_unfinished, [v.name for v in variants if v.adapter == BASE], args.rules)
            texts = {
                name: [None if i in left_out else self.answer_text(row, args.rules) for i, row in enumerate(column)]
                for name, column in answers.items()
            }
            judged.texts[part], unprepared = self.prepare(part, texts, args)
            replies = out / f"replies{suffixes[part]}"
            judged.verdicts[part], unjudged = self._judge(judge, part, items, judged.texts[part], replies)
            failed |= unprepared | unjudged
            n_left_out += len(left_out)
            for name, flags in is_unfinished.items():
                unfinished_by_variant[name] += flags
        first, *more = self.tables(judged)
        tables = [unfinished.with_shares(first, unfinished_by_variant), *more]
        result = Result(self.name, f"{self.title}, judged by {judged.judge}", tables)
        judge_settings = judge.settings if judge else {"judge": self.rules_name}
        result.settings = {**model.summary(), **judge_settings, **origin, **rows.settings}
        result.notes = [self.note_on_judge] if judge and self.note_on_judge else []
        if n_left_out:
            result.notes.append(f"prompts left out, {unfinished.reason_left_out(args.rules)}: {n_left_out:,}")
        result.notes += [*self.notes(judged), *rows.notes]
        unfinished.note_rules(result, args.rules)
        result.failed = failed
        result.contamination = overlap_with_files(rows.prompts, args.train)
        return result

    def _left_out(self, is_unfinished: Mapping[str, Sequence[bool]], bases: Sequence[str], rules: str) -> set[int]:
        """The items, by their place, that leave the comparison of the variants."""
        places = {name: [i for i, flag in enumerate(flags) if flag] for name, flags in is_unfinished.items()}
        return unfinished.left_out(places, bases, rules)

    def _judge(
        self, judge: judge_models.Judge | None, part: str, items: Sequence[Item], texts: Texts, out: Path
    ) -> tuple[Verdicts, dict[str, str]]:
        """(verdict on each text, None where there is no text or no reply; failed items)."""
        pairs = {
            (variant, i): (item, text)
            for variant, column in texts.items()
            for i, (item, text) in enumerate(zip(items, column, strict=True))
            if text is not None
        }
        if judge is None:
            by_pair, failed = {key: self.judge_by_rules(*pair) for key, pair in pairs.items()}, {}
        else:
            conversations = {key: self.judge_messages(*pair) for key, pair in pairs.items()}
            replies, failed = ask_all(judge, conversations, out)
            by_pair = {key: self.parse(reply) for key, reply in replies.items()}
        verdicts = {variant: [by_pair.get((variant, i)) for i in range(len(items))] for variant in texts}
        of_part = f", {part}" if part else ""
        return verdicts, {f"{variant}{of_part}: {items[i].label}": why for (variant, i), why in failed.items()}
