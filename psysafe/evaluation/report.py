"""eval.py report: several evaluations on one page: tables, charts with intervals, and the answers themselves.

    python eval.py report runs/judged runs/xstest runs/mmlu --out runs/report

Writes report.md, report.html (one file that fetches nothing) and report.json. Of an evaluation that keeps its answers
(judge, selective, turns, xstest, sorry-bench) the page shows every prompt, the answers of all variants side by side,
their reasoning, and what judges said; the Markdown quotes the worst answers and the largest differences.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from psysafe import web_page
from psysafe.cli import out_folder, say
from psysafe.data.languages import html_lang
from psysafe.evaluation import charts, published_results
from psysafe.evaluation.judged_answers import READERS, Item, orders, read
from psysafe.evaluation.report_markdown import answer_lines, list_lines, table_lines
from psysafe.evaluation.result import Result, Table, load
from psysafe.files import write_atomic
from psysafe.printable import counted, in_markdown, plain

NOTICE = "Scores are no proof of safety, and no answer of a model replaces professional care."
LONG = 24  # rows from which a table is folded away in the page


class Part(NamedTuple):
    """An evaluation. rest: versions and time of its result; items: its answers, None where it keeps none."""

    folder: str
    result: Result
    rest: dict
    items: list[Item] | None = None


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="DIR", help="--out folders of finished evaluations")
    parser.add_argument("--out", type=out_folder, required=True, metavar="DIR", help="where the report is written")


def without_effect(args: argparse.Namespace) -> dict[str, str]:
    return {}


def run(args: argparse.Namespace) -> None:
    parts = []
    for folder in args.folders:
        result, rest = load(folder)
        parts.append(Part(folder, result, rest, read(folder, result)))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "report.md", markdown(parts))
    write_atomic(out / "report.html", page(parts))
    content = {"notice": NOTICE, "evaluations": [_as_json(part) for part in parts]}
    write_atomic(out / "report.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    say(f"{counted(len(parts), 'evaluation')} in {out}/report.md, report.html and report.json")


def _as_json(part: Part) -> dict:
    content = {"folder": part.folder, **asdict(part.result), **part.rest}
    if part.items is None:
        return content
    # Places in the list of items, from 0.
    return content | {"items": [_item_as_json(item) for item in part.items], "orders": orders(part.items)}


def _item_as_json(item: Item) -> dict:
    values = [{"value": answer.value} for answer in item.answers]
    answers = [asdict(answer) | value for answer, value in zip(item.answers, values, strict=True)]
    for answer in answers:
        answer["judgements"] = [one._asdict() for one in answer["judgements"]]
        answer |= _lang(answer["text"])
    content = asdict(item) | {"heading": item.heading, "difference": item.difference, "answers": answers}
    return content | _lang(item.prompt)


def _lang(text: str) -> dict[str, str]:
    """In which language a screen reader is to read a text aloud, where that is not the page's."""
    return {"lang": lang} if (lang := html_lang(text)) else {}


def tables_of(result: Result) -> list[Table]:
    """The result's tables, with the published one, if there is one, after the first."""
    published = [published_results.TABLES[result.kind]] if result.kind in published_results.TABLES else []
    return [*result.tables[:1], *published, *result.tables[1:]]


def summary(part: Part) -> dict[str, str]:
    """How a result came about: folder, date, settings, versions."""
    lines = {"folder": part.folder, "finished": part.rest["finished"]}
    lines |= {name: str(value) for name, value in part.result.settings.items() if value not in ("", None)}
    lines["versions"] = ", ".join(f"{name} {version}" for name, version in part.rest["versions"].items() if version)
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


def note_on_answers(part: Part) -> str:
    """Why an evaluation that should have answers shows none; "" for any other."""
    if part.items or (part.items is None and part.result.kind not in READERS):
        return ""
    if part.items is not None:
        return f"No answers to show: {part.folder} holds none that was judged (the failed items say why)."
    return f"No answers to show: {part.folder} holds no items.jsonl of this result (tables of stored scores have none)."


# Markdown


def markdown(parts: Sequence[Part]) -> str:
    lines = ["# Evaluation report", "", NOTICE, ""]
    for part in parts:
        result = part.result
        lines += [f"## {in_markdown(result.title)}", ""]
        for table in tables_of(result):
            note = [in_markdown(table.note), ""] if table.note else []
            lines += [f"### {in_markdown(table.title)}", "", *table_lines(table), "", *note]
        notes = [*result.notes, contamination(result), note_on_answers(part)]
        lines += [*(f"{in_markdown(note)}  " for note in notes if note), ""]
        if result.failed:
            lines += [f"Failed items: {len(result.failed):,}", "", *list_lines(result.failed), ""]
        lines += [*answer_lines(part.items or []), *list_lines(summary(part)), ""]
    return "\n".join(lines)


# HTML


def page(parts: Sequence[Part]) -> str:
    contents = "".join(f'<a href="#part{i}">{_escape(part.result.title)}</a>' for i, part in enumerate(parts))
    sections = "".join(_section(f"part{i}", part) for i, part in enumerate(parts))
    data = [_data(f"part{i}", part.items) for i, part in enumerate(parts) if part.items]
    slots = {"notice": _escape(NOTICE), "contents": contents, "sections": sections}
    return web_page.build("report.html", slots, ["form.css", "report.css"], ["element.js", "report.js"], data)


def _data(anchor: str, items: Sequence[Item]) -> dict:
    """What report.js shows. Without what steers the direction or the screen: a text must not show other words."""
    shown = [_plain({**_item_as_json(item), "id": f"{anchor}-{item.number}"}) for item in items]
    return {"element": f"{anchor}-answers", "items": shown, "orders": orders(items)}


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {plain(key): _plain(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_plain(member) for member in value]
    return plain(value) if isinstance(value, str) else value


_escape = charts.escape


def _section(anchor: str, part: Part) -> str:
    result, tables = part.result, tables_of(part.result)
    readings = charts.readings(tables)
    drawn = {figure for table in tables for figure in charts.bars_with_intervals(table, readings)}
    texts = [f'<section id="{anchor}">\n<h2>{_escape(result.title)}</h2>\n']
    texts += [_table(table, readings, drawn, f"{anchor}-{i}") for i, table in enumerate(tables)]
    notes = filter(None, [*result.notes, contamination(result), note_on_answers(part)])
    texts += [f'<p class="note">{_escape(note)}</p>\n' for note in notes]
    if result.failed:
        items = "".join(f"<li>{_escape(f'{item}: {why}')}</li>" for item, why in result.failed.items())
        head = f"<summary>failed items: {len(result.failed):,}</summary>"
        texts.append(f"<details open>{head}<ul>{items}</ul></details>\n")
    if part.items:
        texts.append(f'<h3>Answers</h3>\n<div id="{anchor}-answers" class="answers"></div>\n')
    rows = "".join(
        f"<tr><th>{_escape(name)}</th><td>{_escape(value)}</td></tr>" for name, value in summary(part).items()
    )
    texts.append(f'<details><summary>settings and versions</summary><table class="facts">{rows}</table></details>\n')
    return "".join(texts) + "</section>\n"


def _table(table: Table, readings: dict, drawn: set[str], anchor: str) -> str:
    """A table under its charts. drawn: figures that have a chart with intervals somewhere, and need no plain bars."""
    kinds = [' class="n"' if form else "" for _, form in table.columns]

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(
            f"<{tag}{kind}>{_escape(c)}</{tag}>" for c, kind in zip(cells, kinds, strict=True)
        ) + "</tr>"  # fmt: skip

    head = line("th", [name for name, _ in table.columns])
    body = "".join(line("td", cells) for cells in table.cells())
    note = f'<p class="note">{_escape(table.note)}</p>\n' if table.note else ""
    whole = f'<table class="result"><thead>{head}</thead><tbody>{body}</tbody></table>'
    # It scrolls on a phone, and by keyboard.
    whole = f'<div class="wide" tabindex="0" role="group" aria-label="{_escape(table.title)}">{whole}</div>\n'
    if len(table.rows) > LONG:
        whole = f"<details><summary>{len(table.rows):,} rows</summary>{whole}</details>\n"
    is_published = table.note == published_results.NOTE
    plain_bars = table.bars if is_published else [column for column in table.bars if column not in drawn]
    drawings = charts.interval_charts(table, readings, anchor) + charts.bars(replace(table, bars=plain_bars))
    whole = f"<h3>{_escape(table.title)}</h3>\n{drawings}{whole}{note}"
    return f'<div class="published">{whole}</div>\n' if is_published else whole
