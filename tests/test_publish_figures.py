"""Which of an evaluation's figures the card takes: whoever stands first, whoever judged, whatever was compared."""

from pathlib import Path

import pytest

from psysafe.evaluation import comparison, word_list_judge
from psysafe.evaluation.comparison import Figure, share
from psysafe.evaluation.result import Result, Table
from psysafe.evaluation.several_judges import one_result
from psysafe.publish.__main__ import arguments, prepare
from psysafe.publish.figures import COSTS, judges_by_rules, measured
from psysafe.publish.run import read_run
from tests.published_run import write_run, xstest

XSTEST, _, RELEVANCE = COSTS


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "small")


def four_criteria(judge: str, base: float, tuned: float) -> Result:
    """Ratings of relevance, ten by one judge."""
    values = {name: dict.fromkeys(range(10), rating) for name, rating in (("base, v0", base), ("small, v0", tuned))}
    first = Table(f"Scores, judged by {judge}", [("variant", "")], [["base, v0"], ["small, v0"]])
    tables = [first, *comparison.tables([Figure("relevance", values)])]
    return Result("judge", f"Four criteria, judged by {judge}", tables, {"judge": judge})


class Judge:
    unusable = ""

    def __init__(self, name: str):
        self.name = name


def of_several_judges(folder: Path) -> Result:
    """Word lists first, which give 2 -> 5; then a model, which gives 4 -> 3."""
    results = {word_list_judge.NAME: four_criteria(word_list_judge.NAME, 2, 5), "org/a": four_criteria("org/a", 4, 3)}
    return one_result("Four criteria", results, [None, Judge("org/a")], [], folder)


def card(run: Path, folder: Path, *results: Result) -> str:
    words = []
    for number, result in enumerate(results):
        result.save(folder / str(number))
        words += [str(folder / str(number))]
    args = arguments().parse_args([str(run), "--repo", "a/b", "--results", *words])
    return prepare(args, read_run(run))[0].content.decode()


def test_the_change_is_from_base_to_adapter_whichever_was_named_first():
    values = {"base, none": {i: i < 14 for i in range(20)}, "small, none": {i: i < 4 for i in range(20)}}
    in_order, reversed_ = (
        Result("xstest", "XSTest", comparison.tables([share("safety %", dict(pairs))]), {"judge": "org/a"})
        for pairs in (values.items(), reversed(values.items()))
    )
    (line,), (same,) = measured(XSTEST, [in_order], "small"), measured(XSTEST, [reversed_], "small")
    assert line.startswith("70 → 20 (system prompt none, n 20; difference -50, 95 % from -")
    assert same.startswith("70 → 20 (system prompt none, n 20; difference -50, 95 % from -")
    low, high = (float(word) for word in same.rstrip(")").partition("from ")[2].split(" to "))
    assert low < -50 < high


def test_of_several_judges_a_models_figure_comes_before_the_word_lists(tmp_path):
    (line,) = measured(RELEVANCE, [of_several_judges(tmp_path)], "small")
    assert line.startswith("4 → 3 (system prompt v0, n 10; ")
    (line,) = measured(RELEVANCE, [four_criteria(word_list_judge.NAME, 2, 5)], "small")
    assert line.startswith("2 → 5 (by word lists, system prompt v0, n 10; ")


def test_word_lists_among_several_judges_are_named_as_such(small, tmp_path):
    whole = of_several_judges(tmp_path / "judges")
    assert judges_by_rules(whole) == [word_list_judge.NAME]
    text = card(small, tmp_path, whole)
    assert "Judge: rule-based judge (word lists), org/a." in text
    assert "**Judged by word lists in the tables of rule-based judge (word lists),**" in text
    assert judges_by_rules(four_criteria("org/a", 4, 3)) == []
    assert "**Judged by word lists" not in card(small, tmp_path / "one", four_criteria("org/a", 4, 3))


def not_evaluated(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("Not evaluated: ")]
    return line


def test_what_nobody_evaluated(small, tmp_path):
    line = not_evaluated(card(small, tmp_path / "xstest", xstest("small", "org/a", 14, 4)))
    assert "second turns after a refusal" in line and "the four criteria" in line
    turns, miniature = (Result(kind, kind, [], {"judge": word_list_judge.NAME}) for kind in ("turns", "miniature"))
    assert "second turns" not in not_evaluated(card(small, tmp_path / "turns", turns))
    assert "the four criteria" not in not_evaluated(card(small, tmp_path / "miniature", miniature))


def test_people_compared_with_each_other_say_nothing_of_a_judge(small, tmp_path):
    people = Result("agreement", "Agreement of people", [], {"judged": "", "judge": ""})
    text = card(small, tmp_path / "people", people)
    assert "agreement between judge and people" in not_evaluated(text)
    assert "How far a judge agrees with people was not measured" in text
    text = card(small, tmp_path / "judge", Result("agreement", "Agreement", [], {"judged": "x", "judge": "org/a"}))
    assert "agreement between judge and people" not in not_evaluated(text)
    assert "How far a judge agrees with people was not measured" not in text
