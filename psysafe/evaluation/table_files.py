"""The tables of a result as files for other programs: CSV with every digit, and LaTeX as they are printed.

tables/01-compliance.csv    mean and standard deviation in a column each, an empty cell where there is no value
tables/01-compliance.tex    a table with its caption; needs \\usepackage{booktabs}
"""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from psysafe.files import write_atomic
from psysafe.printable import one_line

MAX_NAME = 60  # characters of a title in the name of a file
OURS = re.compile(r"\d{2,}-[a-z0-9-]*\.(?:csv|tex)")
# What LaTeX reads as a command, and what its fonts draw as another character.
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "`": r"\textasciigrave{}",
         "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "−": "$-$",
         "–": r"\textendash{}",
         **{mark: f"\\{mark}" for mark in "{}$&#_%"}}  # fmt: skip


def write(tables: Sequence, folder: Path) -> None:
    """Two files of each table in `folder`; those of an earlier result go."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:02}-{file_name(table.title)}" for number, table in enumerate(tables, 1)]
    for path in folder.iterdir():
        if OURS.fullmatch(path.name) and path.stem not in names:
            path.unlink()
    for name, table in zip(names, tables, strict=True):
        write_atomic(folder / f"{name}.csv", as_csv(table))
        write_atomic(folder / f"{name}.tex", as_latex(table))


def file_name(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower())[:MAX_NAME].strip("-")


def as_csv(table) -> str:
    """A column with a standard deviation becomes two, NAME and `NAME, sd`."""
    pairs = [any(isinstance(row[i], list | tuple) for row in table.rows) for i in range(len(table.columns))]
    lines = [[cell for (name, _), pair in zip(table.columns, pairs, strict=True)
              for cell in ([name, f"{name}, sd"] if pair else [name])]]  # fmt: skip
    for row in table.rows:
        cells = zip(row, pairs, strict=True)
        lines.append([part for cell, pair in cells for part in (_two(cell) if pair else [cell])])
    text = io.StringIO()
    csv.writer(text).writerows(lines)  # with "\n" alone at its line ends it would leave a lone "\r" unquoted
    return text.getvalue()


def _two(cell) -> Sequence:
    return cell if isinstance(cell, list | tuple) else [cell, None]


def as_latex(table) -> str:
    names, *rows = [list(map(in_latex, row)) for row in ([name for name, _ in table.columns], *table.cells())]
    sides = "".join("r" if form else "l" for _, form in table.columns)
    lines = ["% needs \\usepackage{booktabs}", "\\begin{table}", "\\centering", f"\\caption{{{in_latex(table.title)}}}",
             f"\\begin{{tabular}}{{{sides}}}", "\\toprule", _line(names), "\\midrule", *map(_line, rows),
             "\\bottomrule", "\\end{tabular}"]  # fmt: skip
    lines += ["", f"\\smallskip\\footnotesize {in_latex(table.note)}"] if table.note else []
    return "\n".join([*lines, "\\end{table}", ""])


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def in_latex(text: str) -> str:
    """The text on one line, as LaTeX shows it."""
    text = re.sub("-(?=-)", "-\0", one_line(text))  # else two hyphens become a dash
    text = "".join(LATEX.get(character, character) for character in text).replace("\0", "{}")
    # Behind the end of a row, \\, LaTeX takes a bracket for a distance and a star for a command.
    return re.sub(r"^[\[*]", lambda match: f"{{{match[0]}}}", text)
