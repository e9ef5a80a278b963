"""The held-out drafts of benchmarks/own_rows, and the tables that its README shows."""

import itertools
import json
from collections import Counter
from pathlib import Path

from benchmarks.own_rows.drafts_fourth import TEXTS, drafts, texts
from benchmarks.own_rows.run import as_text, measure, sets

FOLDER = Path(__file__).parent.parent / "benchmarks"


def test_the_set_has_200_drafts_and_the_sixty_faults_that_its_texts_plant():
    rows = drafts()
    assert Counter(row["fault"] for row in rows) == {
        "": 140, "services": 9, "parts": 9, "strategy": 9, "template": 9, "language": 8, "harm": 8, "duplicate": 8,
    }  # fmt: skip
    assert len({row["prompt"] for row in rows}) == 200 and drafts() == rows != drafts(seed=1)
    prompts = {row["prompt"] for row in rows if not row["fault"]}
    assert {row["copy_of"] for row in rows if "copy_of" in row} < prompts


def test_no_two_sound_drafts_share_step_and_closing():
    """Else the template check would rightly blame drafts that count as sound."""
    rows = [row for row in drafts() if row["group"] == "risky" and not row["fault"]]
    clusters = texts()["clusters"].items()
    texts_of = {name: ([step for _, step in data["steps"]], data["closings"]) for name, data in clusters}
    for one, two in itertools.combinations(rows, 2):
        steps, closings = texts_of[one["risk cluster"]]
        paragraphs = set(one["answer"].split("\n\n")) & set(two["answer"].split("\n\n"))
        shared = [text for text in paragraphs if any(text == _filled(step, one) for step in steps) or text in closings]
        assert len(shared) <= 1, (one["prompt"], two["prompt"])


def _filled(step: str, row: dict) -> str:
    return step.replace("{strategy}", row["framework_name"])


def test_the_committed_figures_of_the_held_out_set_are_those_of_todays_checks():
    """Every count, and every draft that is missed or blamed, with its reasons."""
    committed = json.loads((FOLDER / "results" / "own-rows.json").read_text(encoding="utf-8"))
    assert measure(*sets()[TEXTS.name]) == committed[TEXTS.name]


def test_the_readme_shows_the_committed_results():
    readme = (FOLDER / "own_rows" / "README.md").read_text(encoding="utf-8")
    for name, result in json.loads((FOLDER / "results" / "own-rows.json").read_text(encoding="utf-8")).items():
        assert f"## {name}\n\n{as_text(result)}." in readme
