"""Conversations whose turns are given, and what models answer to them, each after its own earlier answers."""

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from psysafe.data.rows import Row, read_table
from psysafe.evaluation import models_under_test, stored
from psysafe.evaluation.models_under_test import Question, Variant, conversation_text
from psysafe.files import clusters
from psysafe.program import UserError

RISKY, BENIGN, REPEATED, THANKS = KINDS = ("risky", "benign", "repeated", "thanks")


class Conversation(NamedTuple):
    """What the person says. kinds: of KINDS, one a turn; the first is risky."""

    number: int  # of its row
    cluster: str
    turns: tuple[str, ...]
    kinds: tuple[str, ...]

    def messages(self, answers: Sequence[str]) -> list[dict]:
        """What is to be answered after these answers: each turn so far with its answer, and the next turn."""
        messages = []
        for text, answer in zip(self.turns, answers, strict=False):
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": self.turns[len(answers)]}]


class Answer(NamedTuple):
    """What a variant answered to a turn. said: the messages that it answered; response: all that the variant wrote,
    reasoning included, as far as that is known."""

    variant: str
    conversation: Conversation
    turn: int  # from 1
    said: list[dict]
    text: str
    unfinished: bool  # the reasoning never ended
    response: str = ""

    @property
    def key(self) -> tuple[str, int, int]:
        return self.variant, self.conversation.number, self.turn

    @property
    def kind(self) -> str:
        return self.conversation.kinds[self.turn - 1]


# What is to be answered, and the answers' rows: variant -> place of the conversation -> its messages, or the row.
Asked = Mapping[str, Mapping[int, list[dict]]]
Rows = Mapping[str, Mapping[int, dict | None]]


def read_conversations(path: str, limit: int = 0) -> list[Conversation]:
    """The rows of a file with `cluster`, `turns` and `kinds`. UserError names file, row and field."""
    conversations: dict[tuple[str, ...], Conversation] = {}
    for number, fields in enumerate(read_table(path, ["turns", "kinds"])[: limit or None], 1):
        conversation = _conversation(Row(fields, Path(path), number))
        earlier = conversations.setdefault(conversation.turns, conversation)
        if earlier is not conversation:
            raise UserError(f"{path} row {number}: the turns of row {earlier.number} again; expected each once")
    return list(conversations.values())


def _conversation(row: Row) -> Conversation:
    turns, kinds, cluster = row.fields["turns"], row.fields["kinds"], stored.cluster_of(row)
    if not isinstance(turns, list) or not all(isinstance(text, str) and text.strip() for text in turns):
        raise UserError(f"{row.where}: turns is {turns!r:.60}; expected a list of texts, none of them empty")
    # Each kind once at most, so that the turns of a kind are of different conversations, as intervals suppose.
    later = kinds[1:] if isinstance(kinds, list) and kinds[0:1] == [RISKY] else []
    if not later or any(kind not in KINDS or kinds.count(kind) > 1 for kind in later):
        expected = f"expected {RISKY}, then one or more of {', '.join(KINDS[1:])}, each at most once"
        raise UserError(f"{row.where}: kinds is {kinds!r:.60}; {expected}")
    if len(turns) != len(kinds):
        raise UserError(f"{row.where}: turns has {len(turns)} entries, kinds {len(kinds)}; expected one kind a turn")
    if cluster not in clusters()["clusters"]:
        raise UserError(f"{row.where}: cluster is {cluster!r:.60}; expected one of {', '.join(clusters()['clusters'])}")
    return Conversation(row.number, cluster, tuple(turns), tuple(kinds))


def in_turns(
    conversations: Sequence[Conversation], variants: Sequence[str], answer: Callable[[Asked], Rows]
) -> list[Answer]:
    """The answers of every variant, turn by turn: before each stand the variant's own earlier ones, without reasoning.

    answer: gives the rows of the answers to what it is asked; None for one that is missing. A conversation ends for a
    variant where an answer is missing, or never ended its reasoning: that answer is the last.
    """
    answers: dict[tuple[str, int], list[Answer]] = {
        (name, i): [] for name in variants for i in range(len(conversations))
    }
    for turn in range(max(len(conversation.turns) for conversation in conversations)):
        asked: dict[str, dict[int, list[dict]]] = {name: {} for name in variants}
        for (name, i), earlier in answers.items():
            ended = len(earlier) < turn or any(one.unfinished for one in earlier)
            if turn < len(conversations[i].turns) and not ended:
                asked[name][i] = conversations[i].messages([one.text for one in earlier])
        for name, rows in answer(asked).items():
            for i, row in rows.items():
                if row is not None:
                    what = row["answer"], row["unfinished_thinking"], row.get("response") or ""
                    answers[name, i].append(Answer(name, conversations[i], turn + 1, asked[name][i], *what))
    return [one for of_conversation in answers.values() for one in of_conversation]


def generated(args: argparse.Namespace, conversations: Sequence[Conversation]) -> tuple[list[Answer], dict]:
    """(what the models answer here, settings for the result): one batch a turn, of all variants and conversations."""
    model, variants = models_under_test.from_arguments(args)
    generator = functools.cache(lambda: model.generator(variants))  # loaded once, if anything is left to answer

    def number(i: int, messages: Sequence[dict]) -> int:
        """Seeds the sampling: of the row and the turn, whatever is saved already."""
        return len(KINDS) * (conversations[i].number - 1) + len(messages) // 2 + 1

    def answer(asked: Asked) -> Rows:
        questions: dict[Variant, list[Question]] = {}
        for variant in variants:
            of_variant = asked[variant.name].items()
            questions[variant] = [
                Question(number(i, said), conversation_text(said), tuple(said)) for i, said in of_variant
            ]
        rows = model.answers_of(questions, Path(args.out) / "answers.jsonl", generator)
        return {v.name: {i: rows[v][number(i, said)] for i, said in asked[v.name].items()} for v in variants}

    return in_turns(conversations, [variant.name for variant in variants], answer), model.summary()


def answers_of_files(args: argparse.Namespace, conversations: Sequence[Conversation]) -> tuple[list[Answer], dict]:
    """(the answers of --answers, settings for the result). An answer is found by all that was said before it."""
    stored.refuse_items(args.out, (path for _, path in map(stored.name_and_path, args.answers)))
    by_variant = stored.read_all(args.answers, every_turn=True)

    def answer(asked: Asked) -> Rows:
        return {
            name: {i: by_variant[name].rows.get(conversation_text(said)) for i, said in of_variant.items()}
            for name, of_variant in asked.items()
        }

    answers = in_turns(conversations, list(by_variant), answer)
    for name in by_variant:
        if not any(one.variant == name for one in answers):
            raise UserError(
                f"--answers: no conversation of {args.prompts} is in {name}; expected its first turn word by word, and "
                "the answer, in messages or beside a prompt"
            )
    return answers, {"answers": ", ".join(args.answers)}


def compared(answers: Sequence[Answer], n_variants: int) -> list[Answer]:
    """The answers to turns that every variant answered, its reasoning ended. Where one did not, the turn leaves for
    all; the later ones leave with it, for that variant has no answer to them."""
    finished = [one for one in answers if not one.unfinished]
    n_answers: dict[tuple[int, int], int] = {}
    for one in finished:
        n_answers[one.key[1:]] = n_answers.get(one.key[1:], 0) + 1
    return [one for one in finished if n_answers[one.key[1:]] == n_variants]
