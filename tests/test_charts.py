"""Charts with intervals: bars and whiskers where the numbers say, read from the SVG as a browser would."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from psysafe.evaluation import charts, comparison
from psysafe.evaluation.comparison import Figure, share
from psysafe.evaluation.result import Table

BASE = {i: i < 3 for i in range(12)}  # 25 %
TUNED = {i: i < 9 for i in range(8)} | dict.fromkeys(range(8, 12), False)  # 66.7 %
FIGURES = [
    share("refusal %", {"base": BASE, "tuned": TUNED, "other": BASE}),
    Figure("grounding", {"base": {i: 1 + i % 3 for i in range(12)}, "tuned": dict.fromkeys(range(12), 5)}),
    Figure("KL", {"base": {i: i / 100 for i in range(12)}, "tuned": {i: i / 50 for i in range(12)}}),
]


def drawn(tables: list[Table]) -> dict[str, ElementTree.Element]:
    """Title -> SVG, of all charts of the tables."""
    readings = charts.readings(tables)
    text = "".join(charts.interval_charts(table, readings, f"t{i}") for i, table in enumerate(tables))
    elements = ElementTree.fromstring(f"<all>{text}</all>").iter("svg")
    return {svg.find("title").text: svg for svg in elements}


def marks(svg, low: float, high: float) -> list[tuple[float, float, float]]:
    """(value, from, to) of each bar and its whisker, in the figure's own unit."""
    left, right = charts.LEFT, charts.LEFT + charts.WIDTH

    def number(x: float) -> float:
        return low + (float(x) - left) / (right - left) * (high - low)

    values = [number(float(rect.get("x")) + float(rect.get("width"))) for rect in svg.iter("rect")]
    whiskers = [path.get("d") for path in svg.iter("path") if path.get("class") == "whisker"]
    ends = [re.match(r"M([\d.]+) [\d.]+H([\d.]+)", d).groups() for d in whiskers]
    return [(value, number(a), number(b)) for value, (a, b) in zip(values, ends, strict=True)]


@pytest.mark.parametrize(("figure", "low", "high"), [("refusal %", 0, 100), ("grounding", 1, 5), ("KL", 0, None)])
def test_bars_and_whiskers_stand_where_the_numbers_say(figure, low, high):
    tables = comparison.tables(FIGURES, "judged by x")
    rows = [row for row in tables[0].rows if row[0] == figure]
    high = high or max(row[-1] for row in rows)
    shown = marks(drawn(tables)[f"Intervals, judged by x: {figure}"], low, high)
    expected = [(row[3], row[5], row[6]) for row in rows]
    unit = 0.06 * (high - low) / charts.WIDTH  # places have one decimal
    assert len(shown) == len(expected) >= 2
    for a, b in zip(shown, expected, strict=True):
        assert a == pytest.approx(b, abs=2 * unit, rel=0)


def test_each_bar_has_its_words():
    """Value, interval, n, and what the test says against the first variant; whole for screen readers."""
    svg = drawn(comparison.tables(FIGURES, "judged by x"))["Intervals, judged by x: refusal %"]
    texts = [text.text for text in svg.iter("text")]
    assert "25 [8.89, 53.2], n 12" in texts and "66.7 [39.1, 86.2], n 12" in texts
    assert texts.count("n too small to tell") == 1 and texts.count("same on every prompt") == 1
    words = svg.find("desc").text
    assert words == (
        "base: 25 [8.89, 53.2], n 12; tuned: 66.7 [39.1, 86.2], n 12; n too small to tell; "
        "other: 25 [8.89, 53.2], n 12; same on every prompt"
    )
    assert svg.get("role") == "img" and svg.get("aria-labelledby") == svg.find("title").get("id")
    assert svg.get("aria-describedby") == svg.find("desc").get("id")
    kl = drawn(comparison.tables(FIGURES, ""))["Intervals: KL"]
    assert "higher than base" in kl.find("desc").text


def test_clusters_have_their_own_readings():
    """Two clusters that differ: a reading stands at the cluster that it is of."""
    many = {"base": dict.fromkeys(range(30), False), "tuned": dict.fromkeys(range(30), True)}
    same = {"base": dict.fromkeys(range(30), True), "tuned": dict.fromkeys(range(30), True)}
    figures = [share("refusal %", many, "weapon"), share("refusal %", same, "violence")]
    (svg,) = drawn(comparison.tables(figures, "per cluster")).values()
    words = svg.find("desc").text.split("; ")
    assert words[2] == "higher than base" and words[-1] == "same on every prompt"
    assert words[1].startswith("weapon, tuned: 100") and words[-2].startswith("violence, tuned: 100")
    assert [text.text for text in svg.iter("text") if text.get("class") == "group"] == ["weapon", "violence"]
    assert [rect.get("class") for rect in svg.iter("rect")] == ["v0", "v1"] * 2


def test_other_tables_with_intervals_and_without():
    columns = [("variant", ""), ("n", ","), ("%", ".1f"), ("from", ".1f"), ("to", ".1f"), ("refused %", ".1f")]
    table = Table("First turn", columns, [["a", 4, 50.0, 15.0, 85.0, 75.0], ["b", 0, None, None, None, None]])
    (svg,) = drawn([table]).values()
    assert marks(svg, 0, 100) == [pytest.approx((50, 15, 85), abs=0.05)]
    assert "b: no value" in svg.find("desc").text
    assert drawn([Table("T", [("variant", ""), ("n", ","), ("overall %", ".1f")], [["a", 4, 50.0]])]) == {}
    assert drawn([Table("T", columns, [[f"v{i}", 4, 50.0, 15.0, 85.0, 0.0] for i in range(61)])]) == {}


def test_numbers_that_are_none_and_texts_that_would_be_markup():
    evil = "</desc><script>alert(1)</script> & \u202eevil\x07"
    columns = [("figure", ""), ("variant", ""), ("n", ","), ("value", ".3g"), ("from", ".3g"), ("to", ".3g")]
    nan = float("nan")
    (svg,) = drawn([Table(evil, columns, [[evil, evil, 1, 1.0, nan, nan], [evil, "b", 1, nan, 0, 1]])]).values()
    assert not list(svg.iter("script")) and not list(svg.iter("path"))[1:]  # the axis alone
    assert "</desc><script>alert(1)</script> & evil: 1, n 1" in svg.find("desc").text


def test_plain_bars_name_their_column_and_scale():
    columns = [("variant", ""), ("refused %", ".1f"), ("safe %", ".1f"), ("kappa", ".2f")]
    rows = [["a", 25.0, 50.0, 0.5], ["b", 100.0, float("nan"), -0.2]]
    text = charts.bars(Table("T", columns, rows, bars=["refused %", "safe %", "kappa"]))
    refused, safe, kappa = text.split("</svg>")[:3]
    assert 'aria-label="T: refused %"' in refused and ">refused %</text>" in refused and ">100</text>" in refused
    widths = [float(width) for width in re.findall(r'<rect[^>]* width="([^"]*)"', text)]
    full = widths[1]
    assert widths == [full / 4, full, full / 2, 0, full / 2, 0]
    assert ">1</text>" in kappa and ">-0.20</text>" in kappa and ">–</text>" in safe
