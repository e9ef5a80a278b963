"""Multiple choice by log-likelihood, 0-shot, numerically equal to lm-eval 0.4.13: what MMLU and HellaSwag share.

A choice's log-likelihood is that of its text after the question's. acc takes the likeliest choice, acc_norm the
likeliest per character. Equality covers the request strings, the cut between question and choice in tokens, the metrics
and their standard errors (lm-eval: `api/task.py`, `api/model.py`, `tasks/hellaswag/utils.py`, `tasks/mmlu/default`).
"""

import abc
import argparse
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from psysafe.checkpoint.adapter import load_adapter
from psysafe.cli import progress, say
from psysafe.data.prompts import system_text
from psysafe.data.rows import read_table
from psysafe.data.tokenizer import Tokenizer
from psysafe.evaluation import comparison, datasets, models_under_test
from psysafe.evaluation.benchmark import Evaluation
from psysafe.evaluation.benchmarks import log_likelihood
from psysafe.evaluation.comparison import Figure
from psysafe.evaluation.models_under_test import BASE, ModelUnderTest, Variant, variant_identity
from psysafe.evaluation.overlap import add_training_argument, overlap_with_files
from psysafe.evaluation.result import Result, Table
from psysafe.files import expand, parse_json
from psysafe.journal import Journal, key_of
from psysafe.model.lora import detach
from psysafe.program import UserError


class Item(NamedTuple):
    """A question as lm-eval puts it: description + question, then one of the choices."""

    question: str
    choices: list[str]
    gold: int
    subject: str = ""
    description: str = ""


class Metric(NamedTuple):
    """In the order of the columns of a table."""

    n: int
    value: float
    stderr: float | None  # of a single item there is none


COLUMNS = [("variant", ""), ("n", ","), ("acc", ".4f"), ("stderr", ".4f")]


# From rows to requests


def listed(value: str | list) -> list[str]:
    """A list, which a CSV holds as JSON text."""
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


def typed_tokens_note(items: Sequence[Item], tokenizer: Tokenizer) -> str:
    """What to say of questions in which somebody typed control tokens; "" where there are none.

    Everywhere else they are text. Here the rendered conversation is encoded, because lm-eval does so, and they count.
    """
    n_typed = sum(tokenizer.has_typed_tokens([{"role": "user", "content": item.question}]) for item in items)
    typed = f"{n_typed:,} of {len(items):,} questions hold typed control tokens such as <|im_end|>"
    return f"warning: {typed}; they count as control tokens, as in lm-eval" if n_typed else ""


# From log-likelihoods to metrics


def correct(item: Item, log_likelihoods: Sequence[float]) -> dict[str, float]:
    """acc and acc_norm of one item, 0 or 1; of equal choices the first is taken."""
    per_character = [ll / len(choice) for ll, choice in zip(log_likelihoods, item.choices, strict=True)]
    return {"acc": float(_argmax(log_likelihoods) == item.gold), "acc_norm": float(_argmax(per_character) == item.gold)}


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: (values[i], -i))


def mean(values: Sequence[float]) -> Metric:
    """The mean with its standard error: sample standard deviation / sqrt(n)."""
    n = len(values)
    stderr = statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return Metric(n, statistics.fmean(values), stderr)


def pooled(metrics: Sequence[Metric]) -> Metric:
    """The metric of a group of subjects: values weighted by size, standard errors by pooled variance."""
    total, k = sum(m.n for m in metrics), len(metrics)
    value = sum(m.value * m.n for m in metrics) / total
    if any(m.stderr is None for m in metrics) or total <= k:
        return Metric(total, value, None)
    variance = sum((m.n - 1) * m.stderr**2 * m.n for m in metrics) / (total - k)
    return Metric(total, value, math.sqrt(variance / total))


def accuracy(
    scores: dict[str, list[dict[str, float]]], metric: str, members: Iterable[int] | None = None, group: str = ""
) -> Figure:
    """A metric by item, as a share from 0 to 1 as lm-eval prints it. members: the items of a group; None for all."""
    values = {
        variant: {i: by_item[i][metric] for i in (range(len(by_item)) if members is None else members)}
        for variant, by_item in scores.items()
    }
    return Figure(metric, values, share=True, group=group)


# The benchmarks


class MultipleChoice(Evaluation):
    """A benchmark of questions with choices: where its rows are, what they ask, which tables they make."""

    title: str
    repository: datasets.Repository
    fields: tuple[str, ...]  # of a row
    prompt_field: str  # the one that is looked for among the training rows
    data_note = ""  # what else --data may be

    @abc.abstractmethod
    def item(self, row: dict) -> Item:
        """The question of a row. Any ValueError, TypeError or AttributeError means that it is no such row."""

    @abc.abstractmethod
    def tables(self, items: Sequence[Item], scores: dict[str, list[dict[str, float]]]) -> list[Table]:
        """scores: variant -> `correct` of each item."""

    def figures(self, items: Sequence[Item], scores: dict[str, list[dict[str, float]]]) -> list[Figure]:
        """The tables' figures by item, for intervals and paired tests."""
        return [accuracy(scores, "acc")]

    def read(self, path: Path) -> list[dict]:
        return read_table(path, self.fields)

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        meaning = f"rows with {', '.join(self.fields)}{self.data_note}"
        datasets.add_arguments(parser, self.repository, "FILE", meaning)
        parser.add_argument("--chat", action="store_true", help="put the questions into the chat template")
        parser.add_argument("--max-tokens", type=int, default=0, metavar="N",
                            help="where contexts are cut, at their left (the model's own limit)")  # fmt: skip
        parser.add_argument("--batch-tokens", type=int, default=0, metavar="N", help="tokens of a forward pass (auto)")
        add_training_argument(parser)
        models_under_test.add_arguments(parser)

    def without_effect(self, args: argparse.Namespace) -> dict[str, str]:
        thinking = ("--thinking", "--no-thinking")
        return {} if args.chat else dict.fromkeys(thinking, "without --chat: there is no template to open a block")

    def run(self, args: argparse.Namespace) -> Result:
        path, origin = datasets.locate(self.repository, args)
        rows = self.read(path)[: args.limit or None]
        items = [self._checked_item(row, f"{path} row {number}") for number, row in enumerate(rows, 1)]
        model, variants = models_under_test.from_arguments(args)
        if args.chat and args.thinking:
            say("warning: the template ends in <think>, so each choice is scored as the first words of reasoning; "
                "--no-thinking scores it as the answer")  # fmt: skip
        log_likelihoods, speed = self.log_likelihoods(model, variants, items, args)
        scores = {
            variant.name: [correct(item, lls) for item, lls in zip(items, log_likelihoods[variant], strict=True)]
            for variant in variants
        }
        result = Result(self.name, f"{self.title}, 0-shot", self.tables(items, scores))
        result.tables += comparison.tables(self.figures(items, scores))
        result.settings = {**model.weights_summary(), "thinking": args.thinking, "chat template": args.chat, **origin}
        result.notes = [speed] if speed else []
        result.contamination = overlap_with_files((row[self.prompt_field] for row in rows), args.train)
        return result

    def _checked_item(self, row: dict, where: str) -> Item:
        try:
            item = self.item(row)
            if 0 <= item.gold < len(item.choices) and all(item.choices):  # no likelihood per character of an empty one
                return item
        except (ValueError, TypeError, AttributeError, OverflowError):
            pass
        raise UserError(f"{where}: not a row of {self.name}; expected {', '.join(self.fields)}")

    def log_likelihoods(
        self, model: ModelUnderTest, variants: Sequence[Variant], items: Sequence[Item], args: argparse.Namespace
    ) -> tuple[dict[Variant, list[list[float]]], str]:
        """({variant: log-likelihoods of each item's choices}, a line on speed, "" where nothing was computed)."""
        weights_and_dtype = model.identity[:3]  # without the options of generation
        by_variant, speed, loaded = {}, "", None
        with Journal(Path(args.out) / "items.jsonl") as journal:
            for variant in variants:
                adapter, system = variant_identity(variant)
                identity = [self.name, weights_and_dtype, adapter, system, args.chat, args.thinking, args.max_tokens]
                keys = [key_of(*identity, *item) for item in items]
                if any(key not in journal.rows for key in keys):
                    loaded = loaded or model.load(variants)
                    speed = self._compute(*loaded, variant, items, keys, journal, args)
                by_variant[variant] = [journal.rows[key]["log_likelihoods"] for key in keys]
            journal.sync()
        return by_variant, speed

    def _compute(self, model, tokenizer, variant: Variant, items, keys: Sequence[str], journal: Journal, args) -> str:
        """Puts the log-likelihoods that are missing into the journal; a line on speed."""
        limit = args.max_tokens or model.config.max_position_embeddings
        template, system = tokenizer if args.chat else None, system_text(variant.system)
        if template and (note := typed_tokens_note(items, template)):
            say(note)
        requests = [request(item, system, template, args.thinking) for item in items]
        encoded = [log_likelihood.encode(tokenizer, *texts, limit) for texts in requests]
        # Batches are made of all items, and then those with a missing one are run again as they were: in another batch
        # sums are rounded differently, and a restarted run would end in other digits.
        batches = log_likelihood.batches(model, encoded, args.batch_tokens)
        batches = [batch for batch in batches if any(keys[i] not in journal.rows for i in batch)]
        sizes = [sum(log_likelihood.size(encoded[i]) for i in batch) for batch in batches]
        if variant.adapter != BASE:
            load_adapter(model, expand(variant.adapter))
        began = time.monotonic()
        with progress(sum(sizes), variant.name, "tokens") as bar:
            for batch, size in zip(batches, sizes, strict=True):
                for i, lls in zip(batch, log_likelihood.score(model, [encoded[i] for i in batch]), strict=True):
                    if keys[i] not in journal.rows:
                        row = {"variant": variant.name, "item": i, "subject": items[i].subject, "log_likelihoods": lls}
                        journal.append(keys[i], row | correct(items[i], lls))
                bar.update(size)
        detach(model)
        rate = sum(sizes) / max(time.monotonic() - began, 1e-9)
        contexts = [b for batch in batches for i in batch for b in encoded[i]]
        saved = sum(len(b.prefix) * (sum(map(len, b.choices)) - 1) for b in contexts)
        share = saved / (saved + sum(sizes))
        return f"{rate:,.0f} tokens/s; contexts shared by their choices saved {share:.0%} of them"
