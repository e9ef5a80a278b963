"""Answers, judges' replies and scores that are there already, of this program or of another one.

An evaluation has three stages: a model answers, a judge replies, replies become tables. Each may start from a file:

    --answers FILE   rows with a prompt and an answer: the judge is asked
    --replies FILE   rows with a prompt and a judge's reply: the reply is read again
    --scores FILE    rows with a prompt and a score: only the tables are made

Rows stand in JSONL, CSV, a JSON list, or under `results`, `judgments`, `rows` or `paired_responses` of one object.
items.jsonl, which judge and the benchmarks write, is such a file for all three.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from psysafe.data.chat_template import content_text
from psysafe.data.formats import standard
from psysafe.data.rows import CLUSTER, Row, read_table
from psysafe.evaluation import models_under_test
from psysafe.evaluation.models_under_test import BASE, VariantAnswers, conversation, conversation_text
from psysafe.evaluation.replies import REASONING_END, without_reasoning
from psysafe.program import UserError

ITEMS = "items.jsonl"  # in --out: a line for each answer, with the judge's reply and its scores
SCORES = ("score", "verdict", "class")
REPLIES = ("reply", "judgment", "judgement", "judge_reply", "content", "text")
ANSWERS = ("answer", "response", "content")  # fields for what a model wrote; others as in psysafe/data/formats.py
NAMES = ("variant", "model_id")  # fields that name whose answer a row has
IDS = ("question_id", "id")
JUDGE_FLAGS = ("--judge", "--judge-url", "--judge-model", "--judge-key-env", "--judge-param", "--judge-local",
               "--judge-tokens", "--workers", "--deadline", "--rubric", "--judge-answer-chars", "--judge-answer-tokens",
               "--judge-tokenizer")  # fmt: skip
Prompts = Mapping[str, str]  # number of a prompt in the benchmark's file -> the prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("stored material", "in place of answers, replies or scores that are made here")
    add_answers_argument(group)
    group.add_argument("--replies", metavar="FILE", help="a judge's replies, which are read again; no judge is asked")
    group.add_argument("--scores", metavar="FILE", help="scores, of which only the tables are made")


def add_answers_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--answers", action="append", metavar="[NAME=]FILE", default=[],
                        help="answers that are there already (generate.py --out); as often as needed")  # fmt: skip


def given(args: argparse.Namespace) -> str:
    """Which of the three flags is given, "" for none. UserError for several."""
    flags = [flag for flag in ("--answers", "--replies", "--scores") if getattr(args, flag[2:])]
    if len(flags) > 1:
        raise UserError(f"{' and '.join(flags)}: each is a stage to start from; give one of them")
    return flags[0] if flags else ""


def without_effect(args: argparse.Namespace) -> dict[str, str]:
    """Flags that a stage before the one that a file stands for would read."""
    flag = given(args)
    if not flag:
        return {}
    if flag == "--answers":
        return without_models(args)
    reasons = dict.fromkeys(models_under_test.FLAGS, f"with {flag}: the answers are written already")
    reasons |= dict.fromkeys(JUDGE_FLAGS, f"with {flag}: no judge is asked")
    return reasons | {"--rules": f"with {flag}: it does not say which reasoning never ended"}


def without_models(args: argparse.Namespace) -> dict[str, str]:
    """Flags of the models that --answers stands for."""
    reasons = dict.fromkeys(models_under_test.FLAGS, "with --answers: they are written already")
    if args.judge_local:  # the judge runs there
        del reasons["--device"], reasons["--dtype"]
    return reasons


def refuse_items(out: str, paths: Iterable[str]) -> None:
    """UserError where one of the stored files is an items.jsonl that an evaluation writes into `out`, of several judges
    one each."""
    written = [items for items in (Path(out) / ITEMS, *Path(out).glob(f"judges/*/{ITEMS}")) if items.exists()]
    for path in paths:
        if Path(path).exists() and any(items.samefile(path) for items in written):
            raise UserError(f"{path}: a file of --out {out}, and would be overwritten; give another --out")


# Answers


def name_and_path(spec: str) -> tuple[str, str]:
    """`FILE` or `NAME=FILE` -> (NAME, "" where there is none; FILE)."""
    name, equals, path = spec.partition("=")
    return (name, path) if equals else ("", spec)


def read_all(
    specs: Sequence[str], limit: int = 0, prompts: Prompts | None = None, every_turn: bool = False
) -> dict[str, VariantAnswers]:
    """The answers of all --answers files by variant; of each file the first `limit` rows, 0 for all. every_turn: of a
    whole conversation not only the last answer counts, but each, to what stands before it."""
    answers: dict[str, VariantAnswers] = {}
    for spec in specs:
        for name, of_variant in read_answers(spec, limit, prompts, every_turn).items():
            if name in answers:
                raise UserError(f"--answers {spec}: a variant {name!r} is there already; name it: NAME=FILE")
            answers[name] = of_variant
    return answers


def notes_on_repeated(answers: Mapping[str, VariantAnswers]) -> list[str]:
    """Of each variant's answers to one prompt only the first counts."""
    repeated = sum(of_variant.repeated for of_variant in answers.values())
    return [f"{repeated:,} answers to a prompt that stood there before were left out"] if repeated else []


def read_answers(
    spec: str, limit: int = 0, prompts: Prompts | None = None, every_turn: bool = False
) -> dict[str, VariantAnswers]:
    """`FILE` or `NAME=FILE`, rows of any shape that have an answer, as of `generate.py --out` -> answers by variant.
    limit: of rows; 0 for all. prompts: of a benchmark, for rows that have only its number.

    A file with several adapters becomes several variants. The think block of an answer is cut off. The thinking is
    unfinished where the block never closed, where the row is marked `stucked` (the key of the published answer files)
    or `unfinished_thinking`, where nothing stands beside a `reasoning` of its own, and where an answer has no
    `</think>` while others of its variant have one: then the opening tag stood in the prompt.
    """
    name, path = name_and_path(spec)
    by_variant = _by_variant(path, limit, prompts, every_turn)
    variants = {label: _variant_answers(label, rows) for label, rows in by_variant.items()}
    if not name:
        return variants
    return {name if len(variants) == 1 else f"{name}: {label}": answers for label, answers in variants.items()}


class Text(NamedTuple):
    """What a model wrote, reasoning included, and the row it stands in."""

    fields: dict
    cluster: str
    prompt: str
    text: str


def _by_variant(path: str, limit: int, prompts: Prompts | None, every_turn: bool) -> dict[str, list[Text]]:
    texts: dict[str, list[Text]] = {}
    adapters: dict[str, str] = {}  # of each variant
    for number, fields in enumerate(read_table(path, [])[: limit or None], 1):
        row = Row(fields, Path(path), number)
        settings, cluster = fields.get("settings") or {}, cluster_of(row)
        if not isinstance(settings, dict):
            raise UserError(f"{row.where}: settings {settings!r:.40}; expected an object")
        adapter = str(fields.get("adapter") or "")
        label = f"{Path(adapter).name}, {settings.get('system')}" if adapter else _variant(row, Path(path).stem)
        folder = str(Path(adapter)) if adapter else ""
        earlier = adapters.setdefault(label, folder)
        if earlier != folder:  # its answers would pass for repeated ones of the first, and be left out
            both = f"adapter {folder or 'none'}, and in an earlier row {earlier or 'none'}"
            raise UserError(f"{row.where}: {both}; both would be called {label!r}: give a file of each, NAME=FILE")
        for one in _rows_of_turns(row) if every_turn else [row]:
            texts.setdefault(label, []).append(Text(fields, cluster, *_prompt_and_text(one, prompts)))
    return texts


def _rows_of_turns(row: Row) -> list[Row]:
    """A conversation that ends in an answer as a row for each of its answers, with what stands before it; any other row
    as it is.

    Reasoning is cut off here, turn by turn. Chat templates drop it from earlier turns, so that its absence from one of
    several says nothing about whether it ended.
    """
    row = _standard(row)
    messages = row.messages
    has_own_text = {"answer", "response", "content", "choices"}.intersection(row.fields)
    if has_own_text or not messages or not isinstance(messages, list):
        return [row]
    conversation(row)  # checks the turns
    turns = [message | {"content": _spoken(message)} if message["role"] == "assistant" else message
             for message in messages]  # fmt: skip
    places = [i for i, message in enumerate(turns) if message["role"] == "assistant"]
    if not places or places[-1] + 1 < len(turns):
        return [row]
    return [replace(row, fields=row.fields | {"messages": turns[: i + 1]}) for i in places]


def _spoken(message: dict) -> str:
    """An assistant's text without reasoning, but whole where its reasoning never ended, so that this can be seen."""
    text = content_text(message.get("content")) or ""
    answer = without_reasoning(text)
    return text if answer is None else answer.strip()


def _variant_answers(label: str, texts: Sequence[Text]) -> VariantAnswers:
    is_base = any(one.fields.get("adapter") == BASE for one in texts) or label.startswith(f"{BASE}, ")
    answers = VariantAnswers(is_base)
    thinks = any(REASONING_END.search(one.text) for one in texts)
    for one in texts:
        unfinished = _is_unfinished(one, thinks)
        answer = "" if unfinished else without_reasoning(one.text).strip()
        row = {"answer": answer, "unfinished_thinking": unfinished, "cluster": one.cluster, "response": _whole(one)}
        answers.add(one.prompt, row)
    return answers


def _whole(one: Text) -> str:
    """What the model wrote, reasoning included, also where the row has that in a field of its own."""
    wholes = (one.fields.get("response"), one.text, one.fields.get("reasoning"))
    return next((text for text in wholes if isinstance(text, str) and text.strip()), "")


def _is_unfinished(one: Text, thinks: bool) -> bool:
    """thinks: whether any answer of its variant has the end of a think block."""
    marked = any(str(one.fields.get(mark, "")).lower() == "true" for mark in ("stucked", "unfinished_thinking"))
    only_reasoning = not one.text.strip() and bool(one.fields.get("reasoning"))
    never_ended = (thinks and not REASONING_END.search(one.text)) or without_reasoning(one.text) is None
    return marked or only_reasoning or never_ended


def _prompt_and_text(row: Row, prompts: Prompts | None) -> tuple[str, str]:
    """(what was asked, what the model wrote) in a row of stored answers."""
    fields = row.fields
    row = _standard(row)
    # Rows of generate.py name their adapter, and their `answer` is without reasoning; an empty one is an answer, too.
    # Other programs write the reasoning into `response`. items.jsonl and answers.jsonl of eval.py name the variant.
    own = fields.get("adapter") or fields.get("variant")
    text = fields.get("answer") if own or "response" not in fields else fields["response"]
    for other in (row.fields.get("answer"), _choice(fields, row.where), fields.get("content")):
        text = other if text is None else text
    prompt = _prompt(row, prompts)
    if text is None and row.messages is not None and row.messages[-1]["role"] == "assistant":
        text = content_text(row.messages[-1].get("content"))
    named = ", ".join(fields)
    if not isinstance(prompt, str):
        raise UserError(f"{row.where}: no prompt and no messages in it (found: {named:.90}); expected what was asked")
    if text is None:
        where = f"{', '.join(ANSWERS)} or choices, or messages that end in one"
        raise UserError(f"{row.where}: no answer in it (found: {named:.90}); expected one under {where}")
    if not isinstance(text, str):
        name = next((name for name in ANSWERS if fields.get(name) == text), "answer")
        raise UserError(f"{row.where}: {name} is {text!r:.60}; expected a text")
    return prompt, text


def _standard(row: Row) -> Row:
    try:
        return replace(row, fields=standard(row.fields).fields)
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from None


def _prompt(row: Row, prompts: Prompts | None) -> object:
    """What was asked: the row's prompt or conversation, else the benchmark's prompt of the row's number."""
    if row.messages is not None:
        return conversation_text(conversation(row))
    prompt, number = row.fields.get("prompt"), next((row.fields[name] for name in IDS if name in row.fields), None)
    if prompt is not None or prompts is None or number is None:
        return prompt
    if str(number) not in prompts:
        raise UserError(f"{row.where}: number {number!r:.40}, which the benchmark's file does not have")
    return prompts[str(number)]


def _choice(fields: dict, where: str) -> str | None:
    """The first answer of FastChat's `choices`, [{"turns": [text]}], or of an endpoint's, [{"message": ...}]."""
    choices = fields.get("choices")
    if choices is None:
        return None
    choice = choices[0] if isinstance(choices, list) and choices else None
    turns = choice.get("turns") if isinstance(choice, dict) else None
    message = choice.get("message") if isinstance(choice, dict) else None
    text = turns[0] if isinstance(turns, list) and turns else message.get("content") if isinstance(message, dict) else 0
    if not isinstance(text, str):
        raise UserError(f"{where}: choices is {choices!r:.60}; expected a list whose first object has turns, texts")
    return text


def _variant(row: Row, otherwise: str) -> str:
    name = next((row.fields[name] for name in NAMES if row.fields.get(name)), otherwise)
    if not isinstance(name, str):
        raise UserError(f"{row.where}: variant is {name!r:.60}; expected a text")
    return name


def cluster_of(row: Row) -> str:
    """The row's risk cluster, "" where it names none. UserError for what is no text."""
    cluster = row.fields.get(CLUSTER) or row.fields.get("cluster") or ""
    if not isinstance(cluster, str):
        raise UserError(f"{row.where}: {CLUSTER} {cluster!r:.40}; expected a text")
    return cluster


# Replies and scores


class Stored(NamedTuple):
    """A row of stored replies or scores: whose answer to which prompt, and the row itself."""

    variant: str
    part: str  # of a benchmark, such as a mutation; "" where the row names none
    prompt: str
    cluster: str
    row: Row

    @property
    def reply(self) -> str:
        """The judge's text. UserError where there is none."""
        text = next((self.row.fields[name] for name in REPLIES if self.row.fields.get(name) is not None), None)
        if not isinstance(text, str):
            raise UserError(f"{self.row.where}: no reply of a judge in it; expected a text under {', '.join(REPLIES)}")
        return text

    @property
    def score(self) -> str:
        """UserError where there is none."""
        value = next((self.row.fields[name] for name in SCORES if self.row.fields.get(name) is not None), None)
        if not isinstance(value, str | int | float):
            raise UserError(f"{self.row.where}: no score in it; expected one under {', '.join(SCORES)}")
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def read_stored(path: str, limit: int = 0, prompts: Prompts | None = None) -> Iterator[Stored]:
    """Each answer's row; of two for the same answer the second is a UserError. What eval.py wrote of an answer that
    nobody judged, with a score of null, is passed over."""
    numbers: dict[tuple[str, str, str], int] = {}
    for number, fields in enumerate(read_table(path, [])[: limit or None], 1):
        row = Row(fields, Path(path), number)
        prompt, variant, part = _prompt(_standard(row), prompts), _variant(row, Path(path).stem), fields.get("part")
        if not isinstance(prompt, str):
            raise UserError(f"{row.where}: no prompt in it; expected rows with a prompt and a variant (items.jsonl)")
        part = part if isinstance(part, str) else ""
        earlier = numbers.setdefault((variant, part, prompt), number)
        if earlier != number:
            raise UserError(f"{row.where}: the answer of row {earlier} again; expected each answer once")
        if fields.get("score", "") is None and "reply" not in fields:
            continue
        yield Stored(variant, part, prompt, cluster_of(row), row)
