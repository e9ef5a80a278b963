"""The texts of a row: prompt, answer, and what of an answer is compared."""

from pathlib import Path

from psysafe.data.chat_template import THINK_END, content_text
from psysafe.data.formats import user_texts
from psysafe.data.rows import Row, read_file
from psysafe.data.text import normalise
from psysafe.program import UserError

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
