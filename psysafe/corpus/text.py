"""When two texts count as the same, and what texts a file holds."""

import csv
import io
import re
import unicodedata
from pathlib import Path

from psysafe.data.documents import Row, read_unchecked_rows
from psysafe.program import UserError

TEMPLATE_CHARACTERS = 200  # of an answer: beyond its beginning, templates differ in what they were filled with


def normalise(text: str) -> str:
    """Case, accents' encoding, quotation marks, punctuation and white space folded: "I can’t!" = "i can't"."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'").replace("‘", "'")
    return " ".join(re.findall(r"[\w']+", text))


def template(answer: str) -> str:
    """The beginning of an answer, normalised: rows that share it were written from one template."""
    return normalise(answer[:TEMPLATE_CHARACTERS])


def opening(answer: str) -> str:
    """The same beginning without the word that the cut went through: what a quotation of the answer holds whole."""
    cut = template(answer)
    return cut if len(answer) <= TEMPLATE_CHARACTERS else cut.rpartition(" ")[0]


def prompts_of(path: str | Path) -> list[str]:
    """The prompts of any file that a leak is looked for in: rows (JSON, JSONL), a benchmark's CSV with a `prompt` or
    `question` column, or its JSONL with `turns` or `question`."""
    path = Path(path)
    if path.suffix.lower() != ".csv":
        return [prompt for row in read_unchecked_rows(path) if (prompt := prompt_of(row.fields))]
    try:
        table = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: no readable CSV ({error})") from None
    found = [prompt for row in table if (prompt := prompt_of(row))]
    if not found:
        raise UserError(f"{path}: no column named prompt or question")
    return found


def prompt_of(fields: object) -> str:
    """What the person typed, in a row of any of the known shapes; "" where there is nothing of the kind."""
    if not isinstance(fields, dict):
        return ""
    for key in ("prompt", "question", "turns", "messages"):
        value = fields.get(key)
        if key == "messages" and isinstance(value, list):
            users = [m.get("content") for m in value if isinstance(m, dict) and m.get("role") == "user"]
            value = users[0] if users else None
        if key == "turns" and isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value.strip():
            return value
    return ""


def answer_of(row: Row) -> str:
    """The answer of a checked row: its field, or the last assistant message without its thoughts ("" without one)."""
    if "messages" not in row.fields:
        return row.fields["answer"]
    replies = [m.get("content") for m in row.fields["messages"] if isinstance(m, dict) and m.get("role") == "assistant"]
    return replies[-1].rpartition("</think>")[2].strip() if replies and isinstance(replies[-1], str) else ""
