"""A finished evaluation: tables with their settings, saved as result.json, shown as plain text.

Cells are numbers, texts, None, or [mean, standard deviation]; how a column is printed stands beside it, so that the
JSON keeps every digit.
"""

import json
import sys
import time
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from psysafe.files import parse_json, write_atomic
from psysafe.program import UserError
from psysafe.runtime import versions

FILE = "result.json"


Cell = str | int | float | None | list[int | float | None]


@dataclass
class Table:
    """columns: (name, format) pairs; format is "" for text, else as in format(): ".1f", ",". bars: columns to draw."""

    title: str
    columns: list[tuple[str, str]]
    rows: list[list[Cell]]
    note: str = ""
    bars: list[str] = field(default_factory=list)

    def cells(self) -> list[list[str]]:
        return [[shown(cell, form) for cell, (_, form) in zip(row, self.columns, strict=True)] for row in self.rows]

    def as_text(self) -> str:
        names = [name for name, _ in self.columns]
        table = [names, *self.cells()]
        widths = [max(len(row[i]) for row in table) for i in range(len(names))]
        right = [False] + [form != "" for _, form in self.columns[1:]]

        def line(row: Sequence[str]) -> str:
            return "  ".join(
                c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)
            ).rstrip()

        return "\n".join(
            [self.title, line(names), "  ".join("-" * w for w in widths), *map(line, table[1:])]
            + ([self.note] if self.note else [])
        )


@dataclass
class Result:
    """What one evaluation found. failed: item -> why it has no result; they are tried again at the next start."""

    kind: str
    title: str
    tables: list[Table]
    settings: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    contamination: dict[str, int] | None = None

    def as_text(self) -> str:
        parts = [self.title, *(table.as_text() for table in self.tables), *self.notes]
        if self.failed:
            shown = [f"  {item}: {reason}" for item, reason in list(self.failed.items())[:10]]
            more = [f"  and {len(self.failed) - 10} more"] if len(self.failed) > 10 else []
            parts.append("\n".join([f"{len(self.failed)} items failed; start again to retry them:", *shown, *more]))
        return "\n\n".join(parts)

    def save(self, folder: str | Path) -> Path:
        content = {**asdict(self), "versions": versions(), "finished": time.strftime("%Y-%m-%d %H:%M:%S")}
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return path


def load(folder: str | Path) -> tuple[Result, dict]:
    """(result, {"versions", "finished"}) of a folder. UserError names the file that is no result."""
    path = Path(folder) / FILE
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        rest = {name: content.pop(name) for name in ("versions", "finished")}
        tables = [Table(**{**t, "columns": [tuple(c) for c in t["columns"]]}) for t in content.pop("tables")]
        result = Result(tables=tables, **content)
        _check(result, rest)
        return result, rest
    except FileNotFoundError:
        raise UserError(f"{folder}: no {FILE} in it; expected the --out folder of a finished evaluation") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no result of an evaluation ({error}); run it again") from None


def _check(result: Result, rest: dict) -> None:
    """Raises UserError where a field is not of the type that it is annotated with, or a table cannot be shown."""
    typed = [(result, Result), *((table, Table) for table in result.tables)]
    fields = [(name, getattr(x, name), kind) for x, cls in typed for name, kind in typing.get_type_hints(cls).items()]
    fields += [("versions", rest["versions"], dict[str, str]), ("finished", rest["finished"], str)]
    for name, value, kind in fields:
        if not _is_of(value, kind):
            raise UserError(f"{name} is {value!r:.60}")
    for table in result.tables:
        names = [name for name, _ in table.columns]
        if any(len(row) != len(names) for row in table.rows) or set(table.bars) - set(names):
            raise UserError(f"the rows of {table.title!r:.60} do not fit its columns")
        table.cells()
    if result.contamination is not None and result.contamination.keys() != {"prompts", "exact", "normalised"}:
        raise UserError(f"contamination counts {list(result.contamination)!r:.60}")


def _is_of(value, kind) -> bool:
    kinds, parts = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kinds is types.UnionType:
        return any(_is_of(value, part) for part in parts)
    if not isinstance(value, kinds):
        return False
    if kinds is tuple:
        return len(value) == len(parts) and all(map(_is_of, value, parts))
    if kinds is dict:
        return not parts or all(_is_of(k, parts[0]) and _is_of(v, parts[1]) for k, v in value.items())
    return kinds is not list or not parts or all(_is_of(x, parts[0]) for x in value)


def shown(cell, form: str) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, list | tuple):
        return "–" if cell[0] is None else " ± ".join(format(x, form) for x in cell)
    return format(cell, form) if form and not isinstance(cell, str) else str(cell)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
