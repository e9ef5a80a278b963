"""What an evaluation ends in: `Result`, tables with how they came about, saved as result.json or shown as plain text.

A cell is a number, a text, None, or [mean, standard deviation]. The JSON keeps every digit; how a column is printed
stands beside its name.
"""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from psysafe.evaluation import table_files
from psysafe.files import parse_json, read_json, read_text, write_atomic
from psysafe.printable import one_line
from psysafe.program import UserError
from psysafe.runtime import versions

FILE, TABLES = "result.json", "tables"
Cell = str | int | float | None | list[int | float | None]


@dataclass
class Table:
    """columns: (name, format) pairs; format is "" for text, else as in format(): ".1f", ",". bars: columns to draw.
    of_answers: the table is about the answers alone, and the same whoever judges them."""

    title: str
    columns: list[tuple[str, str]]
    rows: list[list[Cell]]
    note: str = ""
    bars: list[str] = field(default_factory=list)
    of_answers: bool = False  # last, and False in a result.json without it: older ones have no such table

    def with_note(self, text: str) -> "Table":
        """The table with one more sentence in its note."""
        note = f"{self.note.rstrip('.')}. {text}" if self.note and text else self.note or text
        return replace(self, note=note)

    def cells(self) -> list[list[str]]:
        return [[shown(cell, form) for cell, (_, form) in zip(row, self.columns, strict=True)] for row in self.rows]

    def as_text(self) -> str:
        names = [one_line(name) for name, _ in self.columns]
        table = [names, *self.cells()]
        widths = [max(len(row[i]) for row in table) for i in range(len(names))]
        right = [False] + [form != "" for _, form in self.columns[1:]]

        def line(row: Sequence[str]) -> str:
            return "  ".join(
                c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)
            ).rstrip()

        return "\n".join(
            [one_line(self.title), line(names), "  ".join("-" * w for w in widths), *map(line, table[1:])]
            + ([one_line(self.note)] if self.note else [])
        )


def nothing_measured(scored: Iterable[bool], replies: str | Path, remedy: str = "another judge") -> str:
    """For `Result.unscored`: a text where there are replies and not one has a score. scored: of each reply whether it
    has; replies: where they stand."""
    scored = list(scored)
    if not scored or any(scored):
        return ""
    return f"none of {len(scored):,} replies has any score ({replies}); read some, and give {remedy}"


@dataclass
class Result:
    """The outcome of one evaluation."""

    kind: str  # the command of eval.py
    title: str
    tables: list[Table]
    settings: dict = field(default_factory=dict)  # model, judge, data: what the tables depend on
    notes: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # item -> reason; tried again at the next start
    unscored: str = ""  # why nothing was measured, though the judge replied: asking again would not help
    contamination: dict[str, int] | None = None  # of `overlap`; None where no training rows were given

    def as_text(self) -> str:
        parts = [one_line(self.title), *(table.as_text() for table in self.tables), *map(one_line, self.notes)]
        if self.failed:
            lines = [f"{len(self.failed)} items failed; start again to retry them:"]
            lines += [f"  {one_line(f'{item}: {reason}')}" for item, reason in list(self.failed.items())[:10]]
            lines += [f"  and {len(self.failed) - 10} more"] if len(self.failed) > 10 else []
            parts.append("\n".join(lines))
        return "\n\n".join(parts)

    def save(self, folder: str | Path) -> Path:
        content = {**asdict(self), "versions": versions(), "finished": time.strftime("%Y-%m-%d %H:%M:%S")}
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        table_files.write(self.tables, path.parent / TABLES)
        return path


def load(folder: str | Path) -> tuple[Result, dict]:
    """(result, {"versions", "finished"}) of a folder. UserError names the file that is no result."""
    path = Path(folder) / FILE
    try:
        content = parse_json(read_text(path))
        rest = {name: content.pop(name) for name in ("versions", "finished")}
        tables = [Table(**{**t, "columns": [tuple(c) for c in t["columns"]]}) for t in content.pop("tables")]
        result = Result(tables=tables, **content)
        _check(result, rest)
        return result, rest
    except FileNotFoundError:
        raise UserError(f"{folder}: no {FILE} in it; expected the --out folder of a finished evaluation") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no result of an evaluation ({error}); run it again") from None


def check_folder(folder: str | Path, kind: str) -> None:
    """Raises UserError where the folder holds the result of another evaluation than `kind`, which `save` would replace.

    A damaged file is no obstacle: `load` asks to run the evaluation again, and the new result takes its place. Beside a
    page for raters no result is written: it names the variants, and the folder may be handed on.
    """
    if (page := Path(folder) / "rate.html").exists():
        raise UserError(f"{page}: a page for blind raters, and the result would name the variants; give another --out")
    path = Path(folder) / FILE
    try:
        content = read_json(path)
    except UserError:
        return
    if content.get("kind") != kind:
        raise UserError(f"{path}: the result of {shown(content.get('kind'), '')}, not of {kind}; give another --out")


def _check(result: Result, rest: dict) -> None:
    """Raises an error of one of the kinds that `load` turns into a UserError where the report could not be written.

    JSON says nothing of types: what is a text in a Result may be any value in the file.
    """
    texts = [result.kind, result.title, rest["finished"], *result.notes, *result.failed, *result.failed.values()]
    texts += [result.unscored, *rest["versions"], *rest["versions"].values(), *result.settings.keys()]
    for table in result.tables:
        names = [name for name, _ in table.columns]
        texts += [table.title, table.note, *table.bars, *names, *(form for _, form in table.columns)]
        for row in table.rows:
            cells = dict(zip(names, row, strict=True))
            drawn = [cells[column][0] if isinstance(cells[column], list) else cells[column] for column in table.bars]
            if not all(isinstance(value, int | float | None) for value in drawn):
                raise UserError(f"a row of {table.title!r:.60} cannot be drawn")
        table.cells()
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{text!r:.60} where a text is expected")
    if result.contamination is not None:
        counts = {name: int(result.contamination[name]) for name in ("prompts", "exact", "normalised")}
        if counts != result.contamination:
            raise UserError(f"contamination counts {result.contamination!r:.60}")


def shown(cell: Cell, form: str) -> str:
    """The cell as a text, in the format of its column; a dash for nothing."""
    if cell is None:
        return "–"
    if isinstance(cell, list | tuple):
        return "–" if cell[0] is None else " ± ".join(format(x, form) for x in cell)
    return format(cell, form) if form and not isinstance(cell, str) else one_line(str(cell))


def percent(values: Iterable[float]) -> float | None:
    """The mean of shares from 0 to 1, or of truth values, in percent; None without any."""
    values = list(values)
    return 100 * sum(values) / len(values) if values else None
