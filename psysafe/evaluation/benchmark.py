"""What a command of eval.py is (`Evaluation`), and what a benchmark must say of itself (`Benchmark`).

A new benchmark is one file in benchmarks/ and one entry in eval.py. The file says where its rows are, what the judge is
asked about an answer, how its reply is read, and which tables the verdicts make. `Benchmark.run` does the rest: answers
of every variant, judging, failures, overlap with training rows, settings and notes of the result.
"""

import abc
import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from psysafe.evaluation import comparison, datasets, judge_models, models_under_test, stored, unfinished
from psysafe.evaluation.comparison import Figure
from psysafe.evaluation.items import (
    Answered,
    Columns,
    Item,
    Judged,
    Prepared,
    Rows,
    Stage,
    Texts,
    Verdicts,
    item_lines,
    named_items,
    prompts_of_numbers,
    suffix_of,
)
from psysafe.evaluation.judge_models import ask_all
from psysafe.evaluation.models_under_test import BASE, Question, only_rank_0
from psysafe.evaluation.overlap import add_training_argument, overlap_with_files
from psysafe.evaluation.result import Result, Table
from psysafe.files import write_atomic
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
    no_verdict: Any = None  # the verdict that `parse` gives where a reply has none
    scores = "a score as a judge replies it"  # of --scores, for errors
    published_leaves_out = True  # under --rules published a prompt leaves where the base never ended its reasoning

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

    @abc.abstractmethod
    def figures(self, judged: Judged) -> list[Figure]:
        """The tables' figures by prompt, for intervals and paired tests (psysafe/evaluation/comparison.py)."""

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

    def prepare(self, part: str, texts: Texts, args: argparse.Namespace) -> Prepared:
        """The texts as the judge is to see them: for answers that have to be decoded or translated."""
        return Prepared(texts)

    def notes(self, judged: Judged) -> list[str]:
        """What the tables do not say."""
        return []

    # What all benchmarks do alike.

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        datasets.add_arguments(parser, self.repository, *self.data)
        self.more_arguments(parser)
        stored.add_arguments(parser)
        add_training_argument(parser)
        unfinished.add_argument(parser)
        models_under_test.add_arguments(parser, self.max_new_tokens, self.temperature)
        judge_models.add_arguments(parser, self.rules or "not possible here: it takes a model")

    def answers_on_ranks(self, args: argparse.Namespace) -> bool:
        return not stored.given(args)

    def without_effect(self, args: argparse.Namespace) -> dict[str, str]:
        reasons = judge_models.without_effect(args) | models_under_test.without_effect(args)
        return reasons | stored.without_effect(args)

    def run(self, args: argparse.Namespace) -> Result:
        read_again = stored.given(args) in ("--replies", "--scores")
        judge = None if read_again else judge_models.from_arguments(args, temperature=0.0)
        if judge is None and not self.rules and not read_again:
            remedy = "give --judge-url and --judge-model, or --judge-local"
            raise UserError(f"{self.name} has no rule-based judge; {remedy}")
        # Rows before models: a missing file is found in a second, weights take minutes.
        path, origin = datasets.locate(self.needed(args), args)
        rows = self.load(args, path)
        if stored.given(args):
            # Of all rows, also with --limit: a stored file may hold more than those.
            every = argparse.Namespace(**{**vars(args), "limit": 0})
            rows.numbers = prompts_of_numbers(self.load(every, path))
        stage = self._read_again(args, rows) if read_again else self._answered_and_judged(args, rows, judge)
        first, *more = self.tables(stage.judged)
        if stage.unfinished is not None:
            first = unfinished.with_shares(first, stage.unfinished)
        tables = [first, *more, *comparison.tables(self.figures(stage.judged))]
        result = Result(self.name, f"{self.title}, judged by {stage.judged.judge}", tables)
        result.settings = {**stage.settings, **origin, **rows.settings}
        result.notes = [self.note_on_judge] if judge and self.note_on_judge else []
        result.notes += [*stage.notes, *self.notes(stage.judged), *rows.notes]
        if not read_again:
            unfinished.note_rules(result, args.rules)
        result.failed = stage.failed
        result.contamination = overlap_with_files(rows.prompts, args.train)
        return result

    def _answered_and_judged(self, args: argparse.Namespace, rows: Rows, judge: judge_models.Judge | None) -> Stage:
        answered = self._stored(args, rows) if args.answers else self._generated(args, rows)
        out = Path(args.out)
        judged = Judged(rows.parts, {}, {}, judge.name if judge else self.rules_name)
        stage = Stage(judged, answered.settings, {}, answered.notes)
        stage.unfinished = {variant: [] for columns in answered.columns.values() for variant in columns}
        lines, n_left_out = [], 0
        for part, items in rows.parts.items():
            columns = answered.columns[part]
            texts, n_never_ended = self._texts_to_judge(columns, answered.bases, args.rules)
            judged.texts[part], unprepared, notes = self.prepare(part, texts, args)
            judged.verdicts[part], replies, unjudged = self._judge(judge, part, items, judged.texts[part], out)
            stage.failed |= named_items(part, items, unprepared) | named_items(part, items, unjudged)
            stage.notes += notes
            n_left_out += n_never_ended
            for name, column in columns.items():
                stage.unfinished[name] += [row["unfinished_thinking"] for row in column if row is not None]
            lines += item_lines(part, items, columns, judged.verdicts[part], replies)
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / stored.ITEMS, "".join(lines))
        if n_left_out:
            stage.notes.append(f"prompts left out, {unfinished.reason_left_out(args.rules)}: {n_left_out:,}")
        stage.settings |= judge.settings if judge else {"judge": self.rules_name}
        return stage

    def _texts_to_judge(self, columns: Columns, bases: Sequence[str], rules: str) -> tuple[Texts, int]:
        """(of each answer what is judged, None where its prompt leaves; how many leave for reasoning without end)."""
        places = {
            name: [i for i, row in enumerate(column) if row is not None and row["unfinished_thinking"]]
            for name, column in columns.items()
        }
        keeps_all = rules == unfinished.PUBLISHED and not self.published_leaves_out
        never_ended = set() if keeps_all else unfinished.left_out(places, bases, rules)
        left_out = never_ended | {i for column in columns.values() for i, row in enumerate(column) if row is None}
        texts = {
            name: [None if i in left_out else self.answer_text(row, rules) for i, row in enumerate(column)]
            for name, column in columns.items()
        }
        return texts, len(never_ended)

    def _generated(self, args: argparse.Namespace, rows: Rows) -> Answered:
        """What the models answer here."""
        model, variants = models_under_test.from_arguments(args)
        if self.published_leaves_out:
            unfinished.require_base([variant.adapter for variant in variants], args.rules)
        by_part = {}
        for part, items in rows.parts.items():
            # The number seeds an answer's sampling, so it counts all items, whatever is saved already.
            questions = [Question(number, item.prompt) for number, item in enumerate(items, 1)]
            by_part[part] = model.answers(variants, questions, Path(args.out) / f"answers{suffix_of(part)}")
        only_rank_0()
        columns = {
            part: {v.name: [by_part[part][v][number] for number in range(1, len(items) + 1)] for v in variants}
            for part, items in rows.parts.items()
        }
        return Answered(columns, [v.name for v in variants if v.adapter == BASE], model.summary(), [])

    def _stored(self, args: argparse.Namespace, rows: Rows) -> Answered:
        """The answers of files. A prompt that one variant has no answer to leaves for all."""
        stored.refuse_items(args.out, (path for _, path in map(stored.name_and_path, args.answers)))
        answers = stored.read_all(args.answers, prompts=rows.numbers)
        columns = {
            part: {name: [of.rows.get(item.prompt) for item in items] for name, of in answers.items()}
            for part, items in rows.parts.items()
        }
        incomplete = [None in prompt for of_part in columns.values() for prompt in zip(*of_part.values(), strict=True)]
        if all(incomplete):
            raise UserError(
                f"--answers: no prompt of {self.name} is answered by all of {'; '.join(answers)}; expected rows with "
                "the prompts of --data (or their numbers, of one file)"
            )
        notes = [f"prompts left out, without a stored answer of every variant: {sum(incomplete):,}"]
        bases = [name for name, of_variant in answers.items() if of_variant.is_base] or [next(iter(answers))]
        return Answered(columns, bases, {"answers": ", ".join(args.answers)}, notes if any(incomplete) else [])

    def _read_again(self, args: argparse.Namespace, rows: Rows) -> Stage:
        """Verdicts from stored replies or scores, without models and judges."""
        path = args.replies or args.scores
        verdicts: dict[str, dict[tuple, Any]] = {}  # variant -> (part, prompt), or ("", prompt) -> verdict
        for row in stored.read_stored(path, prompts=rows.numbers):
            verdict = self.parse(row.reply) if args.replies else self._score(row)
            verdicts.setdefault(row.variant, {})[row.part, row.prompt] = verdict
        judged = Judged(rows.parts, {}, {}, f"stored {'replies' if args.replies else 'scores'} ({Path(path).name})")
        for part, items in rows.parts.items():
            judged.texts[part] = {}
            judged.verdicts[part] = {
                variant: [of.get((part, item.prompt), of.get(("", item.prompt))) for item in items]
                for variant, of in verdicts.items()
            }
        columns = [column for of_part in judged.verdicts.values() for column in of_part.values()]
        missing = sum(column.count(None) for column in columns)
        if missing == sum(map(len, columns)):
            raise UserError(f"{path}: none of its rows has a prompt of {self.name}; expected the prompts of --data")
        notes = [f"without a row in {Path(path).name}: {missing:,} of {sum(map(len, columns)):,}"] if missing else []
        return Stage(judged, {"judge": judged.judge}, {}, notes)

    def _score(self, row: stored.Stored) -> Any:
        """A stored score, which is read as a reply of a judge is."""
        verdict = self.parse(row.score)
        if verdict == self.no_verdict and row.score != str(self.no_verdict):
            raise UserError(f"{row.row.where}: score is {row.score!r:.60}; expected {self.scores}")
        return verdict

    def _judge(
        self, judge: judge_models.Judge | None, part: str, items: Sequence[Item], texts: Texts, out: Path
    ) -> tuple[Verdicts, dict[tuple[str, int], str], dict[tuple[str, int], str]]:
        """(verdict on each text, None where there is no text or no reply; replies and, of failed items, reasons, both
        by variant and place)."""
        pairs = {
            (variant, i): (item, text)
            for variant, column in texts.items()
            for i, (item, text) in enumerate(zip(items, column, strict=True))
            if text is not None
        }
        if judge is None:
            by_pair, replies, failed = {key: self.judge_by_rules(*pair) for key, pair in pairs.items()}, {}, {}
        else:
            conversations = {key: self.judge_messages(*pair) for key, pair in pairs.items()}
            replies, failed = ask_all(judge, conversations, out / f"replies{suffix_of(part)}")
            by_pair = {key: self.parse(reply) for key, reply in replies.items()}
        verdicts = {variant: [by_pair.get((variant, i)) for i in range(len(items))] for variant in texts}
        return verdicts, replies, failed
