"""Intervals and paired tests of an evaluation's figures: by hand, against the references, and as users read them."""

import random

import numpy as np
import pytest

from psysafe.evaluation import comparison
from psysafe.evaluation.comparison import HIGHER, LOWER, SAME, TOO_SMALL, Figure, mean_of_shares, share, tables


def named(table, row: int) -> dict:
    return dict(zip([name for name, _ in table.columns], table.rows[row], strict=True))


def flags(text: str) -> dict[int, bool]:
    return {i: c == "1" for i, c in enumerate(text)}


def test_a_share_with_its_interval_and_its_test_by_hand():
    """Of 20 prompts A holds on 2, B on 10: on 9 alone, and A on 1 alone. McNemar: 2 (1 + 10) / 2^10."""
    figure = share("refusal %", {"A": flags("11" + "0" * 18), "B": flags("10" + "1" * 9 + "0" * 9)})
    intervals, differences = tables([figure])
    row = named(intervals, 0)
    assert (row["figure"], row["variant"], row["n"], row["value"], row["sd"]) == (
        "refusal %", "A", 20, 10.0, pytest.approx(30.0))  # fmt: skip
    # Wilson: (0.1 + z2/40 ± z sqrt(0.1 x 0.9 / 20 + z2/1600)) / (1 + z2/20)
    assert (named(intervals, 0)["from"], named(intervals, 0)["to"]) == pytest.approx((2.786, 30.103), abs=1e-3)
    row = named(differences, 0)
    assert (row["A"], row["B"], row["n"], row["of A"], row["of B"]) == ("A", "B", 20, 10.0, 50.0)
    assert (row["B - A"], row["relative %"]) == (pytest.approx(40.0), pytest.approx(400.0))
    assert row["from"] < 40 < row["to"] and row["p"] == pytest.approx(22 / 1024)
    assert row["p, Holm"] == row["p"] and row["reading"] == HIGHER


def test_all_pairs_are_tested_as_one_family():
    draw = random.Random(0)
    ratings = {name: {i: draw.randint(1, 5) - low for i in range(200)} for name, low in (("a", 0), ("b", 0), ("c", 1))}
    _, differences = tables([Figure("grounding", ratings), Figure("relevance", ratings)])
    assert [row[1:3] for row in differences.rows] == [["a", "b"], ["a", "c"], ["b", "c"]] * 2
    rows = [named(differences, i) for i in range(6)]
    assert [row["reading"] for row in rows] == [TOO_SMALL, LOWER, LOWER] * 2
    # Six tests: of the smallest p six times as much counts.
    assert rows[1]["p, Holm"] == pytest.approx(6 * rows[1]["p"]) and rows[0]["p, Holm"] >= rows[0]["p"]


def test_only_prompts_in_both_are_compared_and_none_is_invented():
    figure = Figure("relevance", {"a": {"p": 1, "q": 2, "r": 5}, "b": {"q": 2, "r": 5, "s": 1}, "c": {"z": 1}, "d": {}})
    intervals, differences = tables([figure])
    assert [(row[1], row[2], row[3]) for row in intervals.rows] == [
        ("a", 3, pytest.approx(8 / 3)), ("b", 3, pytest.approx(8 / 3)), ("c", 1, 1.0), ("d", 0, None)]  # fmt: skip
    assert [(row[1:4], row[-1]) for row in differences.rows] == [(["a", "b", 2], SAME)]
    assert tables([]) == [] and len(tables([Figure("f", {"a": {"p": 1}})])) == 1


def test_nothing_is_divided_by_zero():
    figure = share("references %", {"a": dict.fromkeys(range(9), 0), "b": dict.fromkeys(range(9), 1)})
    row = named(tables([figure])[1], 0)
    assert row["relative %"] is None and row["B - A"] == 100.0 and row["reading"] == HIGHER
    assert 50 < row["from"] < 70 and row["to"] == pytest.approx(100)  # nine prompts are no proof of 100


def test_groups_have_a_column_where_there_are_any():
    of_group = [share("refusal %", {"a": flags("10"), "b": flags("11")}, group) for group in ("weapon", "violence")]
    intervals, differences = tables(of_group, "per cluster")
    assert intervals.title == "Intervals, per cluster" and intervals.columns[1] == ("group", "")
    assert [row[1] for row in differences.rows] == ["weapon", "violence"]
    assert "group" not in dict(tables([share("refusal %", {"a": flags("10")})])[0].columns)


def test_a_mean_of_shares_is_the_mean_of_the_shares():
    """Parts of unlike size, with prompts in common: the figure itself, and the interval of a bootstrap that draws
    prompts and computes the figure anew."""
    draw = np.random.default_rng(0)
    parts = {name: {int(i): int(draw.random() < p) for i in draw.permutation(100)[:n]}
             for name, n, p in (("slang", 100, 0.3), ("morse", 60, 0.1), ("caesar", 80, 0.6))}  # fmt: skip
    figure = mean_of_shares("average %", {"base": parts, "none": {"slang": {}}})
    row = named(tables([figure])[0], 0)
    assert row["value"] == pytest.approx(100 * np.mean([np.mean(list(of_part.values())) for of_part in parts.values()]))
    resampled = []
    for _ in range(3000):
        drawn = draw.integers(0, 100, 100)
        shares = [[of_part[i] for i in drawn if i in of_part] for of_part in parts.values()]
        resampled.append(100 * np.mean([np.mean(values) for values in shares]))
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert (row["from"], row["to"]) == pytest.approx((low, high), abs=0.1 * (high - low))
    assert row["sd"] is None and named(tables([figure])[0], 1)["value"] is None


def right(safe: str, unsafe: str) -> dict[str, dict[int, bool]]:
    return {"safe": flags(safe), "unsafe": {100 + key: flag for key, flag in flags(unsafe).items()}}


def test_a_mean_of_shares_stays_between_0_and_100():
    """As of nine prompts of XSTest: an interval once ended at 106."""
    values = {"base": right("11111", "1110"), "tuned": right("11111", "0001"), "never": right("00000", "0000")}
    intervals, differences = tables([mean_of_shares("balanced %", values)])
    assert [row[3] for row in intervals.rows] == [87.5, 62.5, 0.0] and [row[2] for row in intervals.rows] == [9] * 3
    assert all(0 <= row[5] <= row[3] <= row[6] <= 100 for row in intervals.rows) and intervals.rows[0][6] == 100
    rows = [named(differences, i) for i in range(3)]
    assert [row["B - A"] for row in rows] == pytest.approx([-25, -87.5, -62.5])
    assert all(-100 <= row["from"] <= row["B - A"] <= row["to"] <= 100 for row in rows)


def test_a_mean_of_shares_is_compared_over_the_prompts_that_both_have():
    """What is compared is again the mean of the parts, and of the same parts."""
    first, second = right("1100", "10"), right("11", "11")
    values = {"first": first, "second": second, "safe only": {"safe": flags("11")}}
    _, differences = tables([mean_of_shares("balanced %", values)])
    assert [row[1:3] for row in differences.rows] == [["first", "second"]]
    row = named(differences, 0)
    assert (row["n"], row["of A"], row["of B"], row["B - A"]) == (4, 75.0, 100.0, 25.0)


def test_what_is_said_in_words():
    both = comparison.compare(Figure("f", {"a": {1: 1, 2: 3}, "b": {1: 3, 2: 1}}), "a", "b")
    assert both.difference.value == 0 and comparison.reading(both, 1.0) == TOO_SMALL  # they differ, in both directions
    assert comparison.reading(both._replace(n_differing=0), 1.0) == SAME
