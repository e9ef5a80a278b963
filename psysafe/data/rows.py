"""Rows of benchmarks and answers from CSV, JSON, JSONL or Parquet files, with the line to name when one is broken."""

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

from psysafe.files import parse_json
from psysafe.program import UserError


def read_table(path: str | Path, required: Sequence[str]) -> list[dict]:
    """The rows of a file, each with at least the required fields. Values of a CSV are texts.

    Raises UserError of one line: the file, the line, what is missing and what was expected.
    """
    path = Path(path)
    fields = f" with {', '.join(required)}" if required else ""
    expected = f"expected CSV, JSON, JSONL or Parquet rows{fields}"
    rows = _parquet(path, expected) if path.suffix.lower() == ".parquet" else _text(path, expected)
    for where, row in rows:
        missing = [name for name in required if not isinstance(row, dict) or row.get(name) is None]
        if missing:
            found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{path} {where}: no {missing[0]} in it (found: {found:.100}); {expected}")
        if not isinstance(row, dict) or not isinstance(row.get("prompt", ""), str):
            raise UserError(f"{path} {where}: {row!a:.100}; expected an object whose prompt is a text")
        if re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False, default=str)):
            raise UserError(f"{path} {where}: half of a surrogate pair in it; expected whole Unicode characters")
    if not rows:
        raise UserError(f"{path}: no rows in it; {expected}")
    return [row for _, row in rows]


def _text(path: Path, expected: str) -> list[tuple[str, dict]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; {expected}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {expected}") from None
    return _csv(text, path, expected) if path.suffix.lower() == ".csv" else _json(text, path, expected)


def _parquet(path: Path, expected: str) -> list[tuple[str, dict]]:
    """The hub keeps most data sets so. pyarrow is large and needed for nothing else, hence not among requirements."""
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise UserError(f"{path}: Parquet needs pyarrow (pip install pyarrow); or give --data in JSONL") from None
    try:
        return [(f"row {n}", row) for n, row in enumerate(parquet.read_table(path).to_pylist(), 1)]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {expected}") from None
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}); {expected}") from None


def _csv(text: str, path: Path, expected: str) -> list[tuple[str, dict]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        return [(f"line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: malformed CSV ({error}); {expected}") from None


def _json(text: str, path: Path, expected: str) -> list[tuple[str, dict]]:
    if text.lstrip().startswith("["):
        pieces = [("", text)]
    else:  # not splitlines(): it also cuts at U+2028, which JSON allows inside a text
        pieces = [(f"line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = []
    for where, piece in pieces:
        try:
            value = parse_json(piece)
        except ValueError as error:
            raise UserError(f"{path} {where}: malformed JSON ({error}); {expected}".replace(" :", ":")) from None
        rows += [(f"row {n}", row) for n, row in enumerate(value, 1)] if isinstance(value, list) else [(where, value)]
    return rows
