"""The tables of a result as CSV, read back, and as LaTeX, in which no character is a command by mistake."""

import csv
import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psysafe.evaluation.result import Result, Table
from psysafe.evaluation.table_files import as_csv, as_latex, in_latex

COLUMNS = [("variant", ""), ("n", ","), ("grounding", ".2f"), ("overall %", ".1f")]
ROWS = [['a, "b"\nc', 1234, [3.5, 0.1 + 0.2], 100 / 3], ["=tuned & Co_", None, None, 0.0]]


def test_csv_holds_every_digit():
    lines = list(csv.reader(io.StringIO(as_csv(Table("T", COLUMNS, ROWS)), newline="")))
    assert lines[0] == ["variant", "n", "grounding", "grounding, sd", "overall %"]
    assert lines[1] == ['a, "b"\nc', "1234", "3.5", repr(0.1 + 0.2), repr(100 / 3)]
    assert lines[2] == ["=tuned & Co_", "", "", "", "0.0"]


CELL = st.text(max_size=12) | st.none() | st.integers() | st.floats(allow_nan=False)


@given(st.lists(st.tuples(CELL, CELL), max_size=5))
def test_any_csv_is_read_back(rows):
    lines = list(csv.reader(io.StringIO(as_csv(Table("T", [("a", ""), ("b", "")], rows)), newline="")))
    assert lines == [["a", "b"], *(["" if cell is None else str(cell) for cell in row] for row in rows)]


# What LaTeX makes of its own spellings, written down apart from the program's table.
SHOWN = {
    r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textasciigrave{}": "`",
    r"\textless{}": "<", r"\textgreater{}": ">", r"\textbar{}": "|", r"$\pm$": "±", "$-$": "−", r"\{": "{", r"\}": "}",
    r"\$": "$", r"\&": "&", r"\#": "#", r"\_": "_", r"\%": "%", "{[}": "[", "{*}": "*", "{}": "", r"\textendash{}": "–",
}  # fmt: skip
SPELLING = re.compile("|".join(map(re.escape, sorted(SHOWN, key=len, reverse=True))))


def typeset(text: str) -> str:
    """What a text of LaTeX shows. Every special character has to be part of a known spelling."""
    parts, end = [], 0
    for match in SPELLING.finditer(text):
        assert not set(text[end : match.start()]) & set("\\{}$&#_%~^`<>|"), text
        parts += [text[end : match.start()], SHOWN[match[0]]]
        end = match.end()
    assert not set(text[end:]) & set("\\{}$&#_%~^`<>|"), text
    return "".join([*parts, text[end:]])


@given(st.text(alphabet="ab \\{}$&#_%~^`<>|±–−[]*-'\"é", max_size=20))
def test_every_special_character_is_shown_as_it_is(text):
    line = " ".join(text.split())
    assert typeset(in_latex(text)) == line
    assert not in_latex(text).startswith(("[", "*"))
    assert "--" not in in_latex(text)  # a dash


def test_a_latex_table():
    text = as_latex(Table("50 % of A_B", COLUMNS, [*ROWS, ["[x]", 1, [4.0, 0.0], None]], "n < 10"))
    assert text.splitlines() == [
        r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering", r"\caption{50 \% of A\_B}",
        r"\begin{tabular}{lrrr}", r"\toprule", r"variant & n & grounding & overall \% \\", r"\midrule",
        r"""a, "b" c & 1,234 & 3.50 $\pm$ 0.30 & 33.3 \\""", r"=tuned \& Co\_ & \textendash{} & \textendash{} & 0.0 \\",
        r"{[}x] & 1 & 4.00 $\pm$ 0.00 & \textendash{} \\", r"\bottomrule", r"\end{tabular}", "",
        r"\smallskip\footnotesize n \textless{} 10", r"\end{table}"]  # fmt: skip


def test_the_files_beside_a_result(tmp_path):
    tables = [Table("Compliance", COLUMNS, ROWS), Table("Per file: <A/B>", COLUMNS[:1], [["ü"]]), Table("é", [], [])]
    Result("mmlu", "M", tables).save(tmp_path)
    (tmp_path / "tables" / "mine.csv").write_text("x")
    names = {"01-compliance", "02-per-file-a-b", "03-"}
    files = {f"{name}.{kind}" for name in names for kind in ("csv", "tex")}
    assert {path.name for path in (tmp_path / "tables").iterdir()} == files | {"mine.csv"}
    assert Path(tmp_path / "tables" / "02-per-file-a-b.csv").read_text() == "variant\nü\n"
    # Those of a table that is no more go; what is not ours stays.
    Result("mmlu", "M", tables[:1]).save(tmp_path)
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {
        "01-compliance.csv", "01-compliance.tex", "mine.csv"}  # fmt: skip


@pytest.mark.parametrize("cell", ["--judge", "a---b", "\x1b[31mred\x1b[0m", "two\nlines"])
def test_options_and_control_characters(cell):
    assert "--" not in in_latex(cell) and "\x1b" not in in_latex(cell) and "\n" not in in_latex(cell)
