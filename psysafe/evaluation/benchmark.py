"""What a command of eval.py is (`Evaluation`), and what a benchmark must say of itself (`Benchmark`).

A new benchmark is one file in benchmarks/ and one entry in eval.py. The file says where its rows are, what the judge is
asked about an answer, how its reply is read, and which tables the verdicts make. `Benchmark.run` does the rest: answers
of every variant, judging, failures, overlap with training rows, settings and notes of the result.
"""

import abc
import argparse
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from psysafe.evaluation import (
    answer_language,
    comparison,
    datasets,
    judge_agreement,
    judge_input,
    judge_models,
    models_under_test,
    several_judges,
    stored,
    transcript,
    unfinished,
)
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
    ToJudge,
    Verdicts,
    named_items,
    prompts_of_numbers,
    suffix_of,
    write_items,
)
from psysafe.evaluation.judge_input import OWN_WORDING, Instructions, JudgeInput
from psysafe.evaluation.judge_models import Judge, ask_all, ask_apart
from psysafe.evaluation.models_under_test import Question, only_rank_0
from psysafe.evaluation.overlap import add_training_argument, overlap_with_files
from psysafe.evaluation.result import Result, Table, nothing_measured
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
    instructions: Instructions | None = None  # of the judge; where they are set, --rubric FILE gives others
    shown_chars = 0  # characters of an answer that the judge is shown without a flag; 0 for all
    note_on_judge = ""  # a note of every result that a model judged by this project's wording
    no_verdict: Any = None  # the verdict that `parse` gives where a reply has none
    scores = "a score as a judge replies it"  # of --scores, for errors

    # What a benchmark defines.

    @abc.abstractmethod
    def load(self, args: argparse.Namespace, path: Path) -> Rows:
        """The items to ask. path: the file or folder of --data, or what was fetched from the hub."""

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

    def asked(self, item: Item) -> str:
        """What stands as {prompt} in the judge's instructions."""
        return item.prompt

    def judge_messages(self, item: Item, answer: str) -> list[dict]:
        """What the judge is shown and asked; a benchmark without `instructions` defines it."""
        raise NotImplementedError

    def judge_by_rules(self, item: Item, answer: str) -> Any:
        """The verdict of --judge rules; a benchmark that sets `rules` defines it."""
        raise NotImplementedError

    def answer_text(self, answer: dict, rules: str) -> str:
        """What of an answer's row is judged. rules: on unfinished reasoning (psysafe/evaluation/unfinished.py)."""
        return answer["answer"]

    def noted(self, judged: Judged, tables: list[Table]) -> list[Table]:
        """The tables of a result, and what the rules that judged for them are worth."""
        return tables

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
        unfinished.add_argument(parser, published="none")
        models_under_test.add_arguments(parser, self.max_new_tokens, self.temperature)
        judge_models.add_arguments(parser, self.rules or "not possible here: it takes a model", several=True)
        judge_input.add_arguments(parser, self.instructions is not None, self.shown_chars)

    def answers_on_ranks(self, args: argparse.Namespace) -> bool:
        return not stored.given(args)

    def without_effect(self, args: argparse.Namespace) -> dict[str, str]:
        reasons = judge_models.without_effect(args) | models_under_test.without_effect(args)
        reasons |= judge_input.without_effect(args)
        return reasons | stored.without_effect(args)

    def run(self, args: argparse.Namespace) -> Result:
        read_again = stored.given(args) in ("--replies", "--scores")
        judges = [] if read_again else judge_models.every_from_arguments(args, temperature=0.0)
        if None in judges and not self.rules:
            remedy = "give --judge-url and --judge-model, or --judge-local"
            raise UserError(f"{self.name} has no rule-based judge; {remedy}")
        own = self.instructions or Instructions("", "")
        inputs = [judge and judge_input.from_arguments(args, judge, own, self.shown_chars) for judge in judges]
        # Rows before models: a missing file is found in a second, weights take minutes.
        path, origin = datasets.locate(self.needed(args), args)
        rows = self.load(args, path)
        if stored.given(args):
            # Of all rows, also with --limit: a stored file may hold more than those.
            every = argparse.Namespace(**{**vars(args), "limit": 0})
            rows.numbers = prompts_of_numbers(self.load(every, path))
        rows.settings = {**origin, **rows.settings}
        if not read_again:
            return self._judged_by_all(args, rows, judges, inputs)
        result = self._result(self._read_again(args, rows), rows)
        result.contamination = overlap_with_files(rows.prompts, args.train)
        return result

    def _judged_by_all(
        self, args: argparse.Namespace, rows: Rows, judges: Sequence[Judge | None], inputs: Sequence[JudgeInput | None]
    ) -> Result:
        if None in judges:  # rules are lists of English words
            answer_language.require_english(rows.prompts)
        answered, out = self._stored(args, rows) if args.answers else self._generated(args, rows), Path(args.out)
        texts = self._texts(args, rows, answered)
        if None in judges:
            of_variants = {v: [text for column in (of[v] for of in texts.by_part.values()) for text in column if text]
                           for v in texts.unfinished}  # fmt: skip
            answer_language.require_english(answers=of_variants)
            unread = answer_language.unread_note(rows.prompts, of_variants)
        stages = {}
        for judge, shown in zip(judges, inputs, strict=True):
            stage = self._judged(rows, answered, texts, judge, shown, out, ask_all if len(judges) == 1 else ask_apart)
            stage.notes += unread if judge is None else []
            stages[stage.judged.judge] = stage
            write_items(several_judges.folder_of(judge, judges, out) / stored.ITEMS, stage, answered.columns)
        of_models = {judge.name: shown for judge, shown in zip(judges, inputs, strict=True) if judge and shown}
        entries = transcript.of_benchmark(rows.parts, answered.columns, texts.by_part, stages, of_models)
        transcript.write(out, f"{self.title}, judged by {', '.join(stages)}", entries)
        results = {name: self._result(stage, rows, args.rules) for name, stage in stages.items()}
        contamination = overlap_with_files(rows.prompts, args.train)
        for result in results.values():
            result.contamination = contamination
        labels = {name: self._labels(stage.judged) for name, stage in stages.items()}
        return several_judges.one_result(self.title, results, judges, judge_agreement.tables(labels), out)

    def _result(self, stage: Stage, rows: Rows, rules: str = "") -> Result:
        """rules: on unfinished reasoning; "" where nobody knows which was unfinished."""
        first, *more = self.tables(stage.judged)
        first = first.with_note(stage.note_on_input)
        if stage.unfinished is not None:
            first = unfinished.with_shares(first, stage.unfinished)
        tables = self.noted(stage.judged, [first, *more, *comparison.tables(self.figures(stage.judged))])
        result = Result(self.name, f"{self.title}, judged by {stage.judged.judge}", tables)
        result.settings = {**stage.settings, **rows.settings}
        result.notes = [*stage.notes, *self.notes(stage.judged), *rows.notes]
        if rules:
            unfinished.note_rules(result, rules)
        result.failed = stage.failed
        if stage.judged.judge != self.rules_name:
            of_variants = [of for by_variant in stage.judged.verdicts.values() for of in by_variant.values()]
            scored = [verdict != self.no_verdict for of in of_variants for verdict in of if verdict is not None]
            result.unscored = nothing_measured(scored, stage.judged.judge, "another judge, or another --rubric")
        return result

    def _labels(self, judged: Judged) -> judge_agreement.Labels:
        """A judge's verdicts, for its agreement with others."""
        verdicts = {
            (variant, (part, i)): verdict
            for part, by_variant in judged.verdicts.items()
            for variant, column in by_variant.items()
            for i, verdict in enumerate(column)
        }
        return {"verdict": {key: v for key, v in verdicts.items() if v is not None and v != self.no_verdict}}

    def _texts(self, args: argparse.Namespace, rows: Rows, answered: Answered) -> ToJudge:
        """What every judge is shown: decoded, translated, without what leaves the comparison."""
        texts, n_left_out = ToJudge({name: [] for columns in answered.columns.values() for name in columns}), 0
        for part, items in rows.parts.items():
            columns = answered.columns[part]
            of_part, n_never_ended = self._texts_to_judge(columns, args.rules)
            texts.by_part[part], failed, notes = self.prepare(part, of_part, args)
            texts.failed |= named_items(part, items, failed)
            texts.notes += notes
            n_left_out += n_never_ended
            for name, column in columns.items():
                texts.unfinished[name] += [row["unfinished_thinking"] for row in column if row is not None]
        if n_left_out:
            texts.notes.append(f"prompts left out, {unfinished.reason_left_out(args.rules)}: {n_left_out:,}")
        return texts

    def _judged(
        self, rows: Rows, answered: Answered, texts: ToJudge, judge: Judge | None, shown: JudgeInput | None, out: Path,
        ask: Callable,
    ) -> Stage:  # fmt: skip
        """shown: how a judge is asked, None with the rules; ask: `ask_all` or `ask_apart`."""
        judged = Judged(rows.parts, texts.by_part, {}, judge.name if judge else self.rules_name)
        settings = answered.settings | (judge.settings | shown.settings if judge else {"judge": judged.judge})
        stage = Stage(judged, settings, dict(texts.failed), [*answered.notes, *texts.notes], texts.unfinished)
        n, n_cut = 0, 0
        for part, items in rows.parts.items():
            columns = texts.by_part[part]
            whole = {(v, i): text for v, column in columns.items() for i, text in enumerate(column) if text is not None}
            if judge is None:
                verdicts = {(v, i): self.judge_by_rules(items[i], text) for (v, i), text in whole.items()}
            else:
                cut = {key: shown.cut(text) for key, text in whole.items()}
                asked = {(v, i): self._messages(shown, items[i], text) for (v, i), text in cut.items()}
                stage.replies[part], failed = ask(judge, asked, out / f"replies{suffix_of(part)}")
                verdicts = {key: self.parse(reply) for key, reply in stage.replies[part].items()}
                stage.failed |= named_items(part, items, failed)
                n, n_cut = n + len(cut), n_cut + sum(cut[key] != text for key, text in whole.items())
            of_part: Verdicts = {v: [verdicts.get((v, i)) for i in range(len(items))] for v in columns}
            judged.verdicts[part] = of_part
        if judge is not None:
            stage.note_on_input = shown.note(n_cut, n)
            own_note = self.note_on_judge if shown.instructions.source == OWN_WORDING else ""
            stage.notes = [*filter(None, [own_note]), *stage.notes]
        return stage

    def _messages(self, shown: JudgeInput, item: Item, answer: str) -> list[dict]:
        if self.instructions is None:
            return self.judge_messages(item, answer)
        return shown.instructions.messages(self.asked(item), answer)

    def _texts_to_judge(self, columns: Columns, rules: str) -> tuple[Texts, int]:
        """(of each answer what is judged, None where its prompt leaves; how many leave for reasoning without end)."""
        rows = [(i, row) for column in columns.values() for i, row in enumerate(column)]
        never_ended = {i for i, row in rows if row is not None and row["unfinished_thinking"]}
        if rules == unfinished.PUBLISHED:  # a benchmark's published figures are over all of its prompts
            never_ended = set()
        left_out = never_ended | {i for i, row in rows if row is None}
        texts = {
            name: [None if i in left_out else self.answer_text(row, rules) for i, row in enumerate(column)]
            for name, column in columns.items()
        }
        return texts, len(never_ended)

    def _generated(self, args: argparse.Namespace, rows: Rows) -> Answered:
        """What the models answer here."""
        model, variants = models_under_test.from_arguments(args)
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
        return Answered(columns, model.summary(), [])

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
        notes = stored.notes_on_repeated(answers)
        if any(incomplete):
            notes.append(f"prompts left out, without a stored answer of every variant: {sum(incomplete):,}")
        return Answered(columns, {"answers": ", ".join(args.answers)}, notes)

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
