"""Rows from files of every format. Each row knows its file and line, so that an error can name them.

    read_file    any file, nothing checked         read_prompts   rows that a model can answer
    read_rows    training rows                     read_table     rows with the fields that a benchmark needs

A new type of file is one function and one entry in FILE_TYPES. The shapes of rows are in formats.py.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from psysafe.data.formats import standard
from psysafe.data.prompts import with_system
from psysafe.data.tokenizer import THINK, THINK_END, Message
from psysafe.files import MAX_ROWS_BYTES, decode_text, expand, parse_json, read_bounded, write_atomic
from psysafe.hub import DataSet, find_data_set
from psysafe.program import UserError

CLUSTER, CATEGORY = "risk cluster", "risk category"
BENIGN = "benign"  # the cluster of rows that nobody should refuse, in files without a group, as in assets/rows

EXPECTED_FILE = "expected rows as CSV, TSV, Parquet, a JSON array or one JSON object a line"
EXPECTED_TRAINING_ROW = (
    "expected an object with prompt and answer (and reasoning), or with messages (docs/recipe.md has all shapes)"
)
EXPECTED_PROMPT_ROW = "expected an object with a prompt, or with messages (docs/recipe.md has all shapes)"
# Where other programs keep their rows in a file that is one JSON object.
CONTAINERS = ("results", "judgments", "rows", "paired_responses")
ZIP = b"PK\x03\x04"  # what files of spreadsheets and word processors begin with
GZIP = b"\x1f\x8b"  # what a compressed file begins with; no text and no Parquet file does


@dataclass(frozen=True)
class Row:
    """One row of a file with all its fields, also those that training does not read (`risk cluster`, ...)."""

    fields: dict  # as the file has them: `read_file` checks nothing
    file: Path
    number: int  # its place among the rows of the file, from 1
    line: int | None = None  # in formats that have lines, from 1; of one file, so not in a data set of several

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

    path: of a file, assets:NAME for a bundled one, or a data set of the hub (`hub.DATA_SET`).
    """
    name = expand(str(path))
    # A .txt is a file here: a data set has its README and licence in such, and never its rows.
    data_set = None if _is_txt(name) else find_data_set(name, tuple(FILE_TYPES))
    data_set = data_set or DataSet(name, [Path(name)])
    entries = [entry for file in data_set.files for entry in _entries(file)]
    if len(data_set.files) > 1:  # a line of which of them?
        entries = [(fields, None) for fields, _ in entries]
    if not entries:
        expected = "no prompts in it; expected one a line, as in every .txt" if _is_txt(name) else ""
        raise UserError(f"{name}: {expected or f'no rows in it; {EXPECTED_FILE}'}")
    return [Row(fields, Path(data_set.name), number, line) for number, (fields, line) in enumerate(entries, 1)]


def pinned(path: str) -> str:
    """The name of a data set of the hub with the commit that it has now; any other path as it is."""
    data_set = find_data_set(expand(path), tuple(FILE_TYPES))
    return data_set.name if data_set else path


def _entries(path: Path) -> list[Entry]:
    try:
        content = read_bounded(path, MAX_ROWS_BYTES)
        if content.startswith(GZIP):
            content = unpacked(content, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip ({error}); {EXPECTED_FILE}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {EXPECTED_FILE}") from None
    if content.startswith(ZIP):
        raise UserError(f"{path}: a spreadsheet, a document or another ZIP file; save it as CSV in UTF-8, or as .txt")
    if _is_txt(path.name):
        return _txt(content, path)
    return FILE_TYPES.get(Path(path.name.removesuffix(".gz")).suffix.lower(), _json)(content, path)


def _is_txt(name: str) -> bool:
    return name.lower().removesuffix(".gz").endswith(".txt")


def _txt(content: bytes, path: Path) -> list[Entry]:
    """Prompts, one a line, or JSON where the text begins as such rows do. As training rows they lack their answers."""
    text = decode_text(content, path).replace("\r", "\n")
    if re.match(r'\s*(?:\{\s*"|\[\s*\{)', text):
        return _json(content, path)
    return [({"prompt": line.strip()}, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def unpacked(content: bytes, path: Path) -> bytes:
    """What a gzip file holds. A few bytes of it can stand for terabytes, so at most MAX_ROWS_BYTES are taken."""
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        text = file.read(MAX_ROWS_BYTES + 1)
    if len(text) > MAX_ROWS_BYTES:
        raise UserError(f"{path}: more than {MAX_ROWS_BYTES:,} bytes in it; expected a smaller file")
    return text


def _json(content: bytes, path: Path) -> list[Entry]:
    """A JSON array, one object with the rows in it, or JSONL. The text decides: files of all kinds have any name."""
    text = decode_text(content, path)
    if (contained := _contained(text)) is not None:
        return [(fields, None) for fields in contained]
    if text.lstrip().startswith("["):
        return [(fields, None) for fields in _parsed(text, path, first_line=1)]
    # Not splitlines(): it also cuts at U+2028 and its kind, which JSON allows inside a text.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [(_parsed(line, path, first_line=number), number) for number, line in lines]


def _contained(text: str) -> list | None:
    """The rows of a text that is one object with a list of objects under a name of CONTAINERS; None for another.

    An object with a prompt or a conversation of its own is a row itself, whatever lists it has.
    """
    if not text.lstrip().startswith("{"):
        return None
    try:
        whole = parse_json(text)
    except ValueError:  # JSONL, or damaged: both are read line by line
        return None
    if not isinstance(whole, dict) or {"prompt", "question", "messages", "conversations"} & whole.keys():
        return None
    lists = (whole.get(name) for name in CONTAINERS)
    return next((rows for rows in lists if isinstance(rows, list) and rows and isinstance(rows[0], dict)), None)


def _parsed(text: str, path: Path, first_line: int) -> object:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        line, reason = first_line + error.lineno - 1, f"{error.msg.removesuffix(' at')} at column {error.colno}"
    except ValueError as error:  # a number of thousands of digits, brackets without end
        line, reason = first_line, str(error)
    prompts = "" if text.lstrip()[:1] in ("{", "[") else "; prompts, one a line, are read from a .txt"
    raise UserError(f"{path}: malformed JSON at line {line}: {reason}; {EXPECTED_FILE}{prompts}")


def _csv(content: bytes, path: Path, dialect: str = "excel") -> list[Entry]:
    """The first line names the fields; all values are texts. A row's line is the one that it begins in.

    A .csv has semicolons where its first line has them and no comma: so spreadsheets write it in half of Europe.
    """
    text, separator = decode_text(content, path), csv.get_dialect(dialect).delimiter
    header = text.lstrip("\n").partition("\n")[0]  # empty lines before it count for nothing, as between rows
    if separator == "," and "," not in header and ";" in header:
        separator = ";"
    if separator not in header and (other := next((mark for mark in ",;\t|" if mark in header), None)):
        separator_text = f"{other!r} between the names in line 1, expected {separator!r}"
        raise UserError(f"{path}: {separator_text}; save it with this separator (a .tsv has '\\t', a .csv ',' or ';')")
    # strict: else a quotation mark that is never closed would make one cell of the whole rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), dialect=dialect, delimiter=separator, strict=True)
    csv.field_size_limit(2**31 - 1)
    rows, line = [], 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):  # spreadsheets write empty rows, with their separators
                rows.append((cells, line))
            line = reader.line_num + 1  # a cell may have several lines
    except csv.Error as error:
        raise UserError(f"{path}: malformed CSV at line {line} ({error}); {EXPECTED_FILE}") from None
    names = rows[0][0] if rows else []
    if repeated := [name for name in names if name and names.count(name) > 1]:
        twice = f"{repeated[0]!r:.60} names more than one column in line {rows[0][1]}"
        raise UserError(f"{path}: {twice}, and a row can have one of them; rename or remove the other")
    for cells, line in rows:
        if any(cells[len(names) :]):
            more = f"more cells at line {line} than the first line has names"
            raise UserError(f"{path}: {more}; put a text that holds the separator in quotation marks")
    return [(dict(zip_longest(names, cells[: len(names)])), line) for cells, line in rows[1:]]


def _tsv(content: bytes, path: Path) -> list[Entry]:
    return _csv(content, path, "excel-tab")


def _parquet(content: bytes, path: Path) -> list[Entry]:
    """The hub has most data sets as Parquet. pyarrow is large and needed for nothing else, hence no requirement."""
    try:
        from pyarrow import ArrowException, BufferReader, parquet
    except ModuleNotFoundError:
        raise UserError(f"{path}: Parquet needs pyarrow (pip install pyarrow); or give --data in JSONL") from None
    try:
        rows = parquet.read_table(BufferReader(content)).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}); {EXPECTED_FILE}") from None
    # Rows are written as JSON again: what JSON lacks (dates, bytes) becomes text here, and not at the end of a run.
    return [(_without_nulls(json.loads(json.dumps(fields, default=str))), None) for fields in rows]


def _without_nulls(fields: dict) -> dict:
    """Without null in what lies inside a field. In a column all objects have the keys of all: the arguments of a tool's
    call have those of every other tool, and as null they would be trained as arguments."""

    def cleaned(value: object) -> object:
        if isinstance(value, dict):
            return {key: cleaned(item) for key, item in value.items() if item is not None}
        return [cleaned(item) for item in value] if isinstance(value, list) else value

    return {key: cleaned(value) for key, value in fields.items()}


FILE_TYPES: dict[str, Callable[[bytes, Path], list[Entry]]] = {
    **{".csv": _csv, ".tsv": _tsv, ".parquet": _parquet},
    **{".json": _json, ".jsonl": _json},  # as is any other name
}


def read_rows(paths: str | Path | Sequence[str | Path]) -> list[Row]:
    """The training rows of the files, in order, under our names. UserError names the file and the line or row."""
    paths = [paths] if isinstance(paths, str | Path) else paths
    return training_rows(row for path in paths for row in read_file(path))


def training_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows of `read_file` as training rows, under our names. UserError for the first that is none."""
    return _all_sound(map(as_training_row, rows))


def read_prompts(path: str | Path) -> list[Row]:
    """Rows with a `prompt`, or a conversation in `messages`. UserError names what is broken."""
    return _all_sound(_standard_row(row, EXPECTED_PROMPT_ROW, ["prompt"], ["system"]) for row in read_file(path))


def _all_sound(rows: Iterable[tuple[Row, list[str]]]) -> list[Row]:
    checked_rows = []
    for row, problems in rows:
        if problems:
            raise UserError(f"{row.where}: {problems[0]}")
        checked_rows.append(row)
    return checked_rows


def as_training_row(row: Row) -> tuple[Row, list[str]]:
    """(the row under our names, everything that is wrong with its fields, a text for each problem)."""
    optional = ["reasoning", "reasoning_language", "system"]
    return _standard_row(row, EXPECTED_TRAINING_ROW, ["prompt", "answer"], optional)


def _standard_row(row: Row, expected: str, required: list[str], optional: list[str]) -> tuple[Row, list[str]]:
    """A required field must be a text that is not blank, an optional one a text or None.

    Of a row with `messages` only their type is checked here: the chat template checks the rest.
    """
    if not isinstance(row.fields, dict):
        return row, [f"{_in_json(row.fields)}, {expected}"]
    try:
        fields, names = standard(row.fields)
    except UserError as error:
        return row, [str(error)]
    problems = []
    if "messages" in fields:
        required, optional = [], []
        if not isinstance(fields["messages"], list):
            name = names.get("messages", "messages")
            problems = [f"{name} is {_in_json(fields['messages'])}, expected a list of messages"]
    for key in required:
        if key not in fields:
            problems.append(f"no {key} in it (found: {_names(row.fields)}); {expected}")
        elif not isinstance(fields[key], str) or not fields[key].strip():
            problems.append(f"{names.get(key, key)} is {_in_json(fields[key])}, expected a text that is not empty")
    optional = [*optional, "language"]  # which every tool reads the words of a row by, a conversation's, too
    for key in optional:
        if not isinstance(fields.get(key), str | None):
            problems.append(f"{names.get(key, key)} is {_in_json(fields[key])}, expected a text")
    return replace(row, fields=fields), problems


def _names(fields: dict) -> str:
    return ", ".join(map(str, fields))[:100] or "nothing"


def _in_json(value: object) -> str:
    """A value as a file of rows has it: null, not None."""
    return f"{json.dumps(value):.60} ({type(value).__name__})"


def read_table(path: str | Path, required: Sequence[str]) -> list[dict]:
    """The fields of a file's rows, each with at least the required ones. Values of a CSV are texts.

    Raises UserError of one line: the file, the row or line, what is missing and what was expected.
    """
    expected = f"{EXPECTED_FILE}, with {', '.join(required)}" if required else EXPECTED_FILE
    rows = read_file(path)
    for row in rows:
        fields = row.fields
        # A prompt that is not asked for may be anything: joined tables have the columns of all, null where unused.
        prompt = fields.get("prompt") if "prompt" in required and isinstance(fields, dict) else None
        if not isinstance(fields, dict) or not isinstance(prompt, str | None):
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
        messages = [*prompt_messages(row), {"role": "assistant", "content": content}]
    return with_system(messages, system)


def prompt_messages(row: Row) -> list[Message]:
    """What of a row a model is asked: its conversation without a last answer, or its prompt as the user's message."""
    if row.messages is None:
        return with_system([{"role": "user", "content": row.fields.get("prompt")}], row.fields.get("system") or None)
    last = len(row.messages)
    while last and isinstance(row.messages[last - 1], dict) and row.messages[last - 1].get("role") == "assistant":
        last -= 1
    return row.messages[:last]


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """JSONL with all fields, whole or not at all."""
    write_atomic(path, b"".join(map(json_line, rows)))


def json_line(row: Row) -> bytes:
    """All fields of a row as a line of JSONL. Half a surrogate pair, which UTF-8 has no bytes for, is JSON's escape."""
    return f"{json.dumps(row.fields, ensure_ascii=False)}\n".encode(errors="backslashreplace")
