"""eval.py report: the results of several evaluations on one page, with the paper's figures beside them.

    python eval.py report runs/judged runs/xstest runs/mmlu --out runs/report

Writes report.md, report.html (self-contained: no script, nothing is fetched, bars as inline SVG) and report.json.
"""

import argparse
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from psysafe.cli import say
from psysafe.evaluation import published_results
from psysafe.evaluation.result import Result, Table, load, shown
from psysafe.files import ASSETS, write_atomic
from psysafe.printable import counted, in_markdown, plain

NOTICE = "Scores are no proof of safety, and no answer of a model replaces professional care."
STYLE = (ASSETS / "report.css").read_text(encoding="utf-8")
LONG = 24  # rows from which a table is folded away in the page


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="DIR", help="--out folders of finished evaluations")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the report is written")


def run(args: argparse.Namespace) -> None:
    parts = [(folder, *load(folder)) for folder in args.folders]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "report.md", markdown(parts))
    write_atomic(out / "report.html", page(parts))
    content = {"notice": NOTICE, "evaluations": [{"folder": f, **asdict(result), **rest} for f, result, rest in parts]}
    write_atomic(out / "report.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    say(f"{counted(len(parts), 'evaluation')} in {out}/report.md, report.html and report.json")


Part = tuple[str, Result, dict]


def tables_of(result: Result) -> list[Table]:
    """The result's tables, with the published one, if there is one, after the first."""
    published = [published_results.TABLES[result.kind]] if result.kind in published_results.TABLES else []
    return [*result.tables[:1], *published, *result.tables[1:]]


def summary(folder: str, result: Result, rest: dict) -> dict[str, str]:
    """How a result came about: folder, date, settings, versions."""
    lines = {"folder": folder, "finished": rest["finished"]}
    lines |= {name: str(value) for name, value in result.settings.items() if value not in ("", None)}
    lines["versions"] = ", ".join(f"{name} {version}" for name, version in rest["versions"].items() if version)
    return lines


def contamination(result: Result) -> str:
    """The sentence on overlap with training rows."""
    counts = result.contamination
    if result.kind == "agreement":  # asks no prompts of its own
        return ""
    if counts is None:
        return "Overlap with training rows: not measured (give --train FILE)."
    return (f"Overlap with training rows: of {counts['prompts']:,} prompts {counts['exact']:,} stand there word by "
            f"word, {counts['normalised']:,} apart from case and punctuation.")  # fmt: skip


# Markdown


def markdown(parts: Sequence[Part]) -> str:
    lines = ["# Evaluation report", "", NOTICE, ""]
    for folder, result, rest in parts:
        lines += [f"## {in_markdown(result.title)}", ""]
        for table in tables_of(result):
            note = [in_markdown(table.note), ""] if table.note else []
            lines += [f"### {in_markdown(table.title)}", "", *markdown_table(table), "", *note]
        lines += [*(f"{in_markdown(note)}  " for note in result.notes), contamination(result), ""]
        if result.failed:
            lines += [f"Failed items: {len(result.failed):,}", ""]
            lines += [*_markdown_list(result.failed), ""]
        lines += [*_markdown_list(summary(folder, result, rest)), ""]
    return "\n".join(lines)


def markdown_table(table: Table) -> list[str]:
    names, *rows = [list(map(in_markdown, row)) for row in ([name for name, _ in table.columns], *table.cells())]
    rules = ["---:" if form else "---" for _, form in table.columns]
    return ["| " + " | ".join(row) + " |" for row in [names, rules, *rows]]


def _markdown_list(items: Mapping[str, str]) -> list[str]:
    return [f"- {in_markdown(f'{name}: {value}')}" for name, value in items.items()]


# HTML


def page(parts: Sequence[Part]) -> str:
    toc = "".join(f'<a href="#part{i}">{_escape(result.title)}</a>' for i, (_, result, _) in enumerate(parts))
    body = "".join(_section(f"part{i}", *part) for i, part in enumerate(parts))
    # The policy makes the browser itself refuse every request, should a text ever bring one in.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Evaluation report</title>\n<style>\n{STYLE}</style></head>\n<body>\n"
        f'<h1>Evaluation report</h1>\n<p class="soft">{_escape(NOTICE)}</p>\n<nav>{toc}</nav>\n'
        f"{body}</body></html>\n"
    )


def _escape(text: str) -> str:
    return html.escape(plain(text))


def _section(anchor: str, folder: str, result: Result, rest: dict) -> str:
    parts = [f'<section id="{anchor}">\n<h2>{_escape(result.title)}</h2>\n']
    parts += map(_html_table, tables_of(result))
    notes = filter(None, [*result.notes, contamination(result)])
    parts += [f'<p class="note">{_escape(note)}</p>\n' for note in notes]
    if result.failed:
        items = "".join(f"<li>{_escape(f'{item}: {why}')}</li>" for item, why in result.failed.items())
        head = f"<summary>failed items: {len(result.failed):,}</summary>"
        parts.append(f"<details open>{head}<ul>{items}</ul></details>\n")
    rows = "".join(
        f"<tr><th>{_escape(name)}</th><td>{_escape(value)}</td></tr>"
        for name, value in summary(folder, result, rest).items()
    )
    parts.append(f'<details><summary>settings and versions</summary><table class="facts">{rows}</table></details>\n')
    return "".join(parts) + "</section>\n"


def _html_table(table: Table) -> str:
    kinds = [' class="n"' if form else "" for _, form in table.columns]

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(
            f"<{tag}{kind}>{_escape(c)}</{tag}>" for c, kind in zip(cells, kinds, strict=True)
        ) + "</tr>"  # fmt: skip

    head = line("th", [name for name, _ in table.columns])
    body = "".join(line("td", cells) for cells in table.cells())
    note = f'<p class="note">{_escape(table.note)}</p>\n' if table.note else ""
    whole = f'<div class="wide"><table class="result"><thead>{head}</thead><tbody>{body}</tbody></table></div>\n'
    if len(table.rows) > LONG:
        whole = f"<details><summary>{len(table.rows):,} rows</summary>{whole}</details>\n"
    whole = f"<h3>{_escape(table.title)}</h3>\n{bars(table)}{whole}{note}"
    return f'<div class="published">{whole}</div>\n' if table.note == published_results.NOTE else whole


def bars(table: Table) -> str:
    """The table's chosen columns as charts; "" without one."""
    return "".join(_chart(table, column) for column in table.bars)


def _chart(table: Table, column: str) -> str:
    """Horizontal bars, one a row, under the column's name and scale. A negative kappa has no bar."""
    index = [name for name, _ in table.columns].index(column)
    form = table.columns[index][1]
    text_columns = [i for i, (_, column_form) in enumerate(table.columns) if column_form == ""]
    values = [row[index][0] if isinstance(row[index], list) else row[index] for row in table.rows]
    # A share fills the width at 100; anything else at the largest value, but never at less than 1.
    scale_end = 100 if column.endswith("%") else max([1, *(value for value in values if value is not None)])
    left, width, row_height, head = 300, 430, 26, 22  # in SVG units, which are pixels at 100 %
    bottom = head + row_height * len(values)
    drawn = [
        f'<text x="{left - 8}" y="15" text-anchor="end">{_escape(column)}</text>'
        f'<text class="scale" x="{left}" y="15">0</text>'
        f'<text class="scale" x="{left + width}" y="15" text-anchor="middle">{scale_end:g}</text>'
        f'<path class="axis" d="M{left} {head}V{bottom}M{left + width} {head}V{bottom}"/>'
    ]
    for number, (row, value) in enumerate(zip(table.rows, values, strict=True)):
        label = ", ".join(str(row[i]) for i in text_columns)
        label = label if len(label) <= 44 else label[:43] + "…"
        y, length = head + number * row_height, width * max(value or 0, 0) / scale_end
        drawn.append(
            f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{_escape(label)}</text>'
            f'<rect x="{left}" y="{y + 4}" width="{length:.1f}" height="18" rx="2"/>'
            f'<text x="{left + length + 6:.1f}" y="{y + 17}">{_escape(shown(value, form))}</text>'
        )
    size = f'viewBox="0 0 {left + width + 70} {bottom}" width="{left + width + 70}"'
    label = _escape(f"{table.title}: {column}")
    return f'<svg {size} role="img" aria-label="{label}">{"".join(drawn)}</svg>\n'
