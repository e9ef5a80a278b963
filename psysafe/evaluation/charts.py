"""Charts of a result's tables as inline SVG: bars with their 95 % intervals, and plain bars.

A table with the columns n, from and to has intervals: a chart for each of its figures, a bar for each row, coloured by
variant. Beside a bar stand its value, its interval and n, and what the table of differences says of it against the
first variant. Colours are classes of report.css, so that the page's policy may forbid styles in elements; every bar has
its name in words as well.
"""

import html
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from psysafe.evaluation.comparison import HIGHER, LOWER
from psysafe.evaluation.result import Cell, Table, shown
from psysafe.printable import plain

N_COLOURS = 6  # of report.css
MAX_BARS = 60  # of a chart; more are read in the table
LEFT, WIDTH, RIGHT, ROW, HEAD = 190, 240, 250, 40, 24  # in SVG units, which are pixels at 100 %
SCALES = {"grounding": (1, 5), "relevance": (1, 5)}  # ratings; of other figures `_scale` says it


class Bar(NamedTuple):
    """reading: in words, against the first variant of its group; "" where nothing says it."""

    group: str
    variant: str
    n: int | None
    value: float | None
    low: float | None
    high: float | None
    reading: str = ""


def escape(text: str) -> str:
    return html.escape(plain(text))


# Bars with intervals


def bars_with_intervals(table: Table, differences: Mapping[tuple, str]) -> dict[str, list[Bar]]:
    """Figure -> its bars; none of a table without intervals. differences: of `readings`."""
    names = [name for name, _ in table.columns]
    if not {"n", "from", "to"} <= set(names) or "reading" in names:
        return {}
    value = "value" if "value" in names else names[names.index("from") - 1]
    figures: dict[str, list[Bar]] = {}
    for row in table.rows:
        cells = dict(zip(names, row, strict=True))
        figure, variant = str(cells.get("figure", cells.get("measure", value))), str(cells.get("variant", ""))
        labels = [name for name, form in table.columns if form == "" and name not in ("figure", "measure", "variant")]
        group = ", ".join(str(cells[name]) for name in labels if cells[name] != "")
        reading = differences.get((about(table), figure, group, variant), "")
        numbers = [_number(cells[name]) for name in ("n", value, "from", "to")]
        figures.setdefault(figure, []).append(Bar(group, variant, *numbers, reading))
    return figures


def about(table: Table) -> str:
    """What a table of intervals or of differences is about, as in "per cluster, judged by NAME"."""
    return table.title.partition(", ")[2]


def readings(tables: Sequence[Table]) -> dict[tuple, str]:
    """(about, figure, group, variant) -> the words of the tables of differences on it against the first variant."""
    first_variants: dict[tuple, str] = {}
    words = {}
    for table in tables:
        names = [name for name, _ in table.columns]
        if not {"figure", "A", "B", "reading"} <= set(names):
            continue
        for row in table.rows:
            cells = dict(zip(names, row, strict=True))
            key = about(table), cells["figure"], cells.get("group", "")
            first = first_variants.setdefault(key, cells["A"])  # the first pair begins with the first variant
            if cells["A"] == first:
                versus = {HIGHER: f"higher than {first}", LOWER: f"lower than {first}"}
                words[*key, cells["B"]] = versus.get(cells["reading"], cells["reading"])
    return words


def _number(cell: Cell) -> float | None:
    """A number, the mean of a mean and deviation; None for anything else, such as nan."""
    cell = cell[0] if isinstance(cell, list) and cell else cell
    is_number = isinstance(cell, int | float) and cell == cell and abs(cell) != float("inf")
    return cell if is_number else None


def interval_charts(table: Table, differences: Mapping[tuple, str], anchor: str) -> str:
    """The table's charts; "" for one without intervals. anchor: what ids of this table begin with."""
    charts = bars_with_intervals(table, differences).items()
    return "".join(
        chart_with_intervals(f"{table.title}: {figure}", figure, bars, f"{anchor}-{i}")
        for i, (figure, bars) in enumerate(charts)
        if len(bars) <= MAX_BARS and any(bar.value is not None for bar in bars)
    )


def chart_with_intervals(title: str, figure: str, bars: Sequence[Bar], anchor: str) -> str:
    low, high = _scale(figure, bars)
    colours = {variant: i % N_COLOURS for i, variant in enumerate(dict.fromkeys(bar.variant for bar in bars))}

    def x(value: float) -> float:
        return LEFT + WIDTH * (min(max(value, low), high) - low) / (high - low)

    parts, y = [_axis(figure, low, high)], HEAD
    lines = []
    for group, members in itertools.groupby(bars, key=lambda bar: bar.group):
        if group:
            parts.append(f'<text class="group" x="0" y="{y + 16}">{escape(_short(group, 90))}</text>')
            y += 22
        for bar in members:
            parts.append(_bar(bar, x, y, colours[bar.variant]))
            lines.append(", ".join(filter(None, [bar.group, bar.variant])) + f": {_in_words(bar)}")
            y += ROW
    axis = f'<path class="axis" d="M{x(max(low, 0)):.1f} {HEAD}V{y}M{LEFT + WIDTH} {HEAD}V{y}"/>'
    description = escape("; ".join(lines))
    return (
        f'<div class="chart" tabindex="0" role="group" aria-label="{escape(title)}">'
        f'<svg viewBox="0 0 {LEFT + WIDTH + RIGHT} {y}" width="{LEFT + WIDTH + RIGHT}" role="img" '
        f'aria-labelledby="{anchor}-title" aria-describedby="{anchor}-desc">'
        f'<title id="{anchor}-title">{escape(title)}</title><desc id="{anchor}-desc">{description}</desc>'
        f"{axis}{''.join(parts)}</svg></div>\n"
    )


def _scale(figure: str, bars: Sequence[Bar]) -> tuple[float, float]:
    """Where the axis begins and ends: a share's at 0 and 100, a rating's at 1 and 5, else at 0 and the largest."""
    if figure in SCALES:
        return SCALES[figure]
    numbers = [x for bar in bars for x in (bar.value, bar.low, bar.high) if x is not None]
    if figure.endswith("%"):
        return min(0, *numbers), max(100, *numbers)
    return min(0, *numbers), max(numbers) if max(numbers) > 0 else 1


def _axis(figure: str, low: float, high: float) -> str:
    return (
        f'<text x="0" y="15">{escape(_short(figure, 24))}</text>'
        f'<text class="scale" x="{LEFT}" y="15">{low:.3g}</text>'
        f'<text class="scale" x="{LEFT + WIDTH}" y="15" text-anchor="end">{high:.3g}</text>'
    )


def _bar(bar: Bar, x, y: float, colour: int) -> str:
    """A bar from zero (a rating's from 1), its whisker, and its words. x: value -> place."""
    name = escape(_short(bar.variant, 26))
    words = f'<text x="{LEFT - 8}" y="{y + 21}" text-anchor="end">{name}</text>'
    value, _, reading = _in_words(bar).partition("; ")
    words += f'<text x="{LEFT + WIDTH + 10}" y="{y + 16}">{escape(value)}</text>'
    if reading:
        words += f'<text class="scale" x="{LEFT + WIDTH + 10}" y="{y + 32}">{escape(_short(reading, 38))}</text>'
    if bar.value is None:
        return words
    start, end = sorted((x(0), x(bar.value)))
    drawn = f'<rect class="v{colour}" x="{start:.1f}" y="{y + 6}" width="{end - start:.1f}" height="22"/>'
    if bar.low is not None and bar.high is not None:
        left, right = f"{x(bar.low):.1f}", f"{x(bar.high):.1f}"
        ends = f"M{left} {y + 12}V{y + 22}M{right} {y + 12}V{y + 22}"
        drawn += f'<path class="whisker" d="M{left} {y + 17}H{right}{ends}"/>'
    return drawn + words


def _in_words(bar: Bar) -> str:
    if bar.value is None:
        return "no value"
    ends = "" if bar.low is None or bar.high is None else f" [{bar.low:.3g}, {bar.high:.3g}]"
    n = "" if bar.n is None else f", n {bar.n:,}"
    return f"{bar.value:.3g}{ends}{n}" + (f"; {bar.reading}" if bar.reading else "")


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


# Plain bars


def bars(table: Table) -> str:
    """The table's chosen columns as charts; "" without one."""
    return "".join(_chart(table, column) for column in table.bars)


def _chart(table: Table, column: str) -> str:
    """Horizontal bars, one a row, under the column's name and scale. A negative kappa has no bar."""
    index = [name for name, _ in table.columns].index(column)
    form = table.columns[index][1]
    text_columns = [i for i, (_, column_form) in enumerate(table.columns) if column_form == ""]
    values = [_number(row[index]) for row in table.rows]
    # A share fills the width at 100; anything else at the largest value, but never at less than 1.
    scale_end = 100 if column.endswith("%") else max([1, *(value for value in values if value is not None)])
    left, width, row_height, head = 300, 430, 26, 22  # in SVG units, which are pixels at 100 %
    bottom = head + row_height * len(values)
    drawn = [
        f'<text x="{left - 8}" y="15" text-anchor="end">{escape(column)}</text>'
        f'<text class="scale" x="{left}" y="15">0</text>'
        f'<text class="scale" x="{left + width}" y="15" text-anchor="middle">{scale_end:g}</text>'
        f'<path class="axis" d="M{left} {head}V{bottom}M{left + width} {head}V{bottom}"/>'
    ]
    for number, (row, value) in enumerate(zip(table.rows, values, strict=True)):
        label = _short(", ".join(str(row[i]) for i in text_columns), 44)
        y, length = head + number * row_height, width * max(value or 0, 0) / scale_end
        drawn.append(
            f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{escape(label)}</text>'
            f'<rect x="{left}" y="{y + 4}" width="{length:.1f}" height="18" rx="2"/>'
            f'<text x="{left + length + 6:.1f}" y="{y + 17}">{escape(shown(value, form))}</text>'
        )
    size = f'viewBox="0 0 {left + width + 70} {bottom}" width="{left + width + 70}"'
    label = escape(f"{table.title}: {column}")
    svg = f'<svg {size} role="img" aria-label="{label}">{"".join(drawn)}</svg>'
    return f'<div class="chart" tabindex="0" role="group" aria-label="{label}">{svg}</div>\n'
