"""The texts of a row: prompt, answer, and what of an answer is compared."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from psysafe.data.chat_template import THINK_END, content_text
from psysafe.data.formats import user_texts
from psysafe.data.rows import Row, read_file
from psysafe.data.text import normalise
from psysafe.printable import counted
from psysafe.program import UserError

RUN = 5  # words in a row that two prompts, or an answer and a template, have in common
SIMILARITY = 0.8  # shared words / all words of two prompts (Jaccard), from which on they count as near duplicates
MAX_SENT = 20_000  # characters of a prompt or an answer that a model is sent: more than a row of 4,096 tokens can hold
CHARACTERS_A_TOKEN = 4  # of English; other scripts have fewer
TEMPLATE_CHARACTERS = 200  # of an answer: beyond its beginning, templates differ in what they were filled with


def template(answer: str) -> str:
    """The beginning of an answer, normalised: rows that share it were written from one template."""
    return normalise(answer[:TEMPLATE_CHARACTERS])


def whole_words(answer: str) -> str:
    """`template` without its last word where the cut went through it: a quotation of the answer has all these words."""
    words = template(answer)
    return words if len(answer) <= TEMPLATE_CHARACTERS else words.rpartition(" ")[0]


def prompts_of(path: str | Path) -> list[str]:
    """The prompts of any file that a leak is looked for in, training rows or a benchmark. UserError without one."""
    prompts = []
    for row in read_file(path):
        try:
            prompts.append(first_user_text(row.fields))
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None
    prompts = list(filter(None, prompts))
    if not prompts:  # a search for leaks in no prompts would find none, and be believed
        raise UserError(f"{path}: no prompt in any row; expected rows in a shape that docs/recipe.md lists")
    return prompts


def first_user_text(fields: object) -> str:
    """What the person typed first, in a row of any of the known shapes; "" where there is nothing of the kind."""
    return next(iter(user_texts(fields)), "") if isinstance(fields, dict) else ""


def answer_of(row: Row) -> str:
    """The answer of a checked row: its field, or the last assistant message without its thoughts ("" without one)."""
    if row.messages is None:
        return row.fields["answer"]
    replies = [m.get("content") for m in row.messages if isinstance(m, dict) and m.get("role") == "assistant"]
    text = (content_text(replies[-1]) if replies else None) or ""
    return text.rpartition(THINK_END)[2].strip()


def refuse_long(rows: Sequence[Row], *names: str) -> None:
    """UserError for a prompt or an answer that is too long to be meant, before a model is asked and paid for it.

    names: of the fields that it is sent.
    """
    lengths = [(row, name, len(row.fields[name])) for row in rows for name in names]
    long = [one for one in lengths if one[2] > MAX_SENT]
    if not long:
        return
    row, name, length = long[0]
    size = f"{length:,} characters, some {length // CHARACTERS_A_TOKEN:,} tokens"
    others = counted(len(long) - 1, "more text")
    more = f"; {others} {'is' if len(long) == 2 else 'are'} too long" if len(long) > 1 else ""
    raise UserError(f"{row.where}: the {name} has {size}, expected at most {MAX_SENT:,} characters; "
                    f"nothing was sent: shorten it or leave the row out{more}")  # fmt: skip


def word_runs(prompts: Iterable[str]) -> set[str]:
    """Every run of RUN words of the normalised prompts; a shorter prompt is a run of its own."""
    runs = set()
    for words in (normalise(prompt).split() for prompt in prompts):
        runs |= {" ".join(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))}
    return runs


def near_duplicates(rows: Sequence[Row]) -> dict[int, int]:
    """Place of each row whose prompt shares SIMILARITY of its words, or more, with that of an earlier row of its group
    -> the place of that row, which is no near duplicate itself.

    Two sets as similar as that share a word among the rarest (1 - SIMILARITY) of each (prefix filtering), so only rows
    with such a word in common are compared.
    """
    sets = [frozenset(normalise(row.fields["prompt"]).split()) for row in rows]
    count = Counter(word for words in sets for word in words)
    by_word: dict[tuple[str, str], list[int]] = {}
    duplicates = {}
    for i, (row, words) in enumerate(zip(rows, sets, strict=True)):
        rarest = sorted(words, key=lambda word: (count[word], word))
        # - 1e-9: a product that rounding put above a whole number would make the prefix one word too short.
        prefix = rarest[: len(words) - math.ceil(SIMILARITY * len(words) - 1e-9) + 1]
        earlier = [other for word in prefix for other in by_word.get((row.fields["group"], word), [])]
        same = (other for other in earlier if len(words & sets[other]) >= SIMILARITY * len(words | sets[other]))
        if (first := next(same, None)) is not None:
            duplicates[i] = first
            continue
        for word in prefix:
            by_word.setdefault((row.fields["group"], word), []).append(i)
    return duplicates
