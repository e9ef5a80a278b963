"""Rows from files of every format. Each row knows its file and line, so that an error can name them.

    read_file    any file, nothing checked         read_prompts   rows that a model can answer
    read_rows    training rows                     read_table     rows with the fields that a benchmark needs

A new format is one function and one entry in FORMATS.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from psysafe.data.prompts import with_system
from psysafe.data.tokenizer import THINK, THINK_END, Message
from psysafe.files import MAX_ROWS, expand, parse_json, read_bounded, write_atomic
from psysafe.program import UserError

CLUSTER, CATEGORY = "risk cluster", "risk category"

EXPECTED_FILE = "expected rows as CSV, Parquet, a JSON array or one JSON object a line"
EXPECTED_TRAINING_ROW = "expected an object with prompt and answer (and reasoning), or with messages"
EXPECTED_PROMPT_ROW = "expected an object with a prompt, or with messages"


@dataclass(frozen=True)
class Row:
    """One row of a file with all its fields, also those that training does not read (`risk cluster`, ...)."""

    fields: dict  # as the file has them: `read_file` checks nothing
    file: Path
    number: int  # its place among the rows of the file, from 1
    line: int | None = None  # in formats that have lines, from 1

    @property
    def where(self) -> str:
        return f"{self.file} row {self.number}" + (f" (line {self.line})" if self.line else "")

    @property
    def messages(self) -> list | None:
        """The conversation, in rows that have one. Joined files also have `messages` null beside prompt and answer."""
        return self.fields.get("messages")

    @property
    def tools(self) -> object:
        """What the model may call in the conversation: JSON schemas, as `tokenizer.encode_chat` takes them."""
        return self.fields.get("tools") if self.messages is not None else None

    @property
    def reasoning(self) -> str:
        """The reasoning trace, "" where the row has none. Older files call it `reasoning_language`."""
        return self.fields.get("reasoning") or self.fields.get("reasoning_language") or ""


# A row as its format's reader gives it: the fields, and the line where there is one.
Entry = tuple[object, int | None]


def read_file(path: str | Path) -> list[Row]:
    """The rows of one file as they are, whatever fields they have. UserError where it cannot be read or is empty.

    path: of a file, or assets:NAME for a bundled one.
    """
    path = Path(expand(str(path)))
    entries = FORMATS.get(path.suffix.lower(), _json)(path)
    if not entries:
        raise UserError(f"{path}: no rows in it; {EXPECTED_FILE}")
    return [Row(fields, path, number, line) for number, (fields, line) in enumerate(entries, 1)]


def _text(path: Path) -> str:
    try:
        content = read_bounded(path, MAX_ROWS)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: not UTF-8 at line {line} (byte {error.start}); save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {EXPECTED_FILE}") from None


def _json(path: Path) -> list[Entry]:
    """A JSON array or JSONL. The first character decides, because files of both kinds have any name."""
    text = _text(path)
    if text.lstrip().startswith("["):
        return [(fields, None) for fields in _parsed(text, path, first_line=1)]
    # Not splitlines(): it also cuts at U+2028 and its kind, which JSON allows inside a text.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [(_parsed(line, path, first_line=number), number) for number, line in lines]


def _parsed(text: str, path: Path, first_line: int) -> object:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        line, reason = first_line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except ValueError as error:  # a number of thousands of digits, brackets without end
        line, reason = first_line, str(error)
    raise UserError(f"{path}: malformed JSON at line {line}: {reason}; {EXPECTED_FILE}")


def _csv(path: Path) -> list[Entry]:
    """The first line names the fields; all values are texts."""
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    try:
        return [(fields, reader.line_num) for fields in reader]
    except csv.Error as error:
        raise UserError(f"{path}: malformed CSV at line {reader.line_num} ({error}); {EXPECTED_FILE}") from None


def _parquet(path: Path) -> list[Entry]:
    """The hub has most data sets as Parquet. pyarrow is large and needed for nothing else, hence no requirement."""
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise UserError(f"{path}: Parquet needs pyarrow (pip install pyarrow); or give --data in JSONL") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {EXPECTED_FILE}") from None
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}); {EXPECTED_FILE}") from None
    # Rows are written as JSON again: what JSON lacks (dates, bytes) becomes text here, and not at the end of a run.
    return [(json.loads(json.dumps(fields, default=str)), None) for fields in rows]


FORMATS: dict[str, Callable[[Path], list[Entry]]] = {".csv": _csv, ".parquet": _parquet}  # any other name: JSON


def read_rows(paths: str | Path | Sequence[str | Path]) -> list[Row]:
    """The training rows of the files, in order. UserError names the file and the line or row."""
    paths = [paths] if isinstance(paths, str | Path) else paths
    rows = [row for path in paths for row in read_file(path)]
    return _checked(rows, EXPECTED_TRAINING_ROW, ("prompt", "answer"), ("reasoning", "reasoning_language"))


def read_prompts(path: str | Path) -> list[Row]:
    """Rows with a `prompt`, or a conversation in `messages`. UserError names what is broken."""
    return _checked(read_file(path), EXPECTED_PROMPT_ROW, ("prompt",))


def _checked(rows: list[Row], expected: str, required: Sequence[str], optional: Sequence[str] = ()) -> list[Row]:
    for row in rows:
        problems = schema_problems(row.fields, expected, required, optional)
        if problems:
            raise UserError(f"{row.where}: {problems[0]}")
    return rows


def schema_problems(fields: object, expected: str, required: Sequence[str], optional: Sequence[str] = ()) -> list[str]:
    """What is wrong with the fields of a row, one text for each problem.

    A required field must be a text that is not blank, an optional one a text or None. Of a row with `messages` only
    their type is checked here: the chat template checks the rest.
    """
    if not isinstance(fields, dict):
        return [f"{_shown(fields)}, {expected}"]
    messages = fields.get("messages")
    if messages is not None:
        return [] if isinstance(messages, list) else [f"messages is {_shown(messages)}, expected a list of messages"]
    problems = []
    for key in required:
        if key not in fields:
            problems.append(f"no {key} in it (found: {_names(fields)}); {expected}")
        elif not isinstance(fields[key], str) or not fields[key].strip():
            problems.append(f"{key} is {_shown(fields[key])}, expected a text that is not empty")
    no_texts = [key for key in optional if not isinstance(fields.get(key), str | None)]
    return problems + [f"{key} is {_shown(fields[key])}, expected a text" for key in no_texts]


def _names(fields: dict) -> str:
    return ", ".join(map(str, fields))[:100] or "nothing"


def _shown(value: object) -> str:
    return f"{json.dumps(value):.60} ({type(value).__name__})"


def read_table(path: str | Path, required: Sequence[str]) -> list[dict]:
    """The fields of a file's rows, each with at least the required ones. Values of a CSV are texts.

    Raises UserError of one line: the file, the row or line, what is missing and what was expected.
    """
    expected = f"{EXPECTED_FILE}, with {', '.join(required)}" if required else EXPECTED_FILE
    rows = read_file(path)
    for row in rows:
        fields = row.fields
        if not isinstance(fields, dict) or not isinstance(fields.get("prompt", ""), str):
            raise UserError(f"{row.where}: {fields!a:.100}; expected an object whose prompt is a text")
        missing = [name for name in required if fields.get(name) is None]
        if missing:
            raise UserError(f"{row.where}: no {missing[0]} in it (found: {_names(fields)}); {expected}")
        if re.search("[\ud800-\udfff]", json.dumps(fields, ensure_ascii=False)):
            raise UserError(f"{row.where}: half of a surrogate pair in it; expected whole Unicode characters")
    return [row.fields for row in rows]


def row_messages(row: Row, system: str | None = None) -> list[Message]:
    """The row as a conversation. `system` goes in front unless the row has its own; None sends no system message."""
    messages = row.messages
    if messages is None:
        reasoning, answer = row.reasoning, row.fields["answer"]
        forbidden = (
            ("reasoning", reasoning, THINK),
            ("reasoning", reasoning, THINK_END),
            ("answer", answer, THINK_END),
        )
        for key, text, tag in forbidden:
            # The template splits the content at these tags, and would drop text in silence.
            if tag in text:
                raise UserError(f"{row.where}: {key} holds {tag}, at which the chat template would cut it; remove it")
        content = f"{THINK}\n{reasoning}\n{THINK_END}\n{answer}"
        messages = [{"role": "user", "content": row.fields["prompt"]}, {"role": "assistant", "content": content}]
    return with_system(messages, system)


def prompt_messages(row: Row) -> list[Message]:
    """What of a row a model is asked: its conversation, or its prompt as the user's message."""
    return [{"role": "user", "content": row.fields.get("prompt")}] if row.messages is None else row.messages


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """JSONL with all fields, whole or not at all."""
    write_atomic(path, "".join(json.dumps(row.fields, ensure_ascii=False) + "\n" for row in rows))
