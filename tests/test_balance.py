"""`corpus stats`: what a set of rows has too few of, by the rule that docs/own-rows.md states."""

import json
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from psysafe.corpus.__main__ import main
from psysafe.corpus.balance import CLUSTERS, TABLES, Count, as_text, count_balance
from psysafe.corpus.contacts import known_services
from psysafe.data.rows import read_rows
from tests.mistakes import refused_by
from tests.own_rows import GERMAN, OUT_OF_DOMAIN, PLAIN, violence_row

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "psysafe" / "assets" / "rows"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def balanced(path, rows):
    return count_balance(read_rows(write(path, rows)), known_services())


def thin(found, table):
    return {count.name: count.expected for count in found.tables[table] if count.is_thin}


def of_strategy(name, n):
    return [violence_row(framework_name=name) for _ in range(n)]


@pytest.mark.parametrize(
    ("green", "motivational", "expected"),
    [
        (10, 10, {}),
        (10, 9, {"violence: Motivational Interviewing": 10}),
        (60, 20, {}),  # exactly half of an even share of 40
        (60, 19, {"violence: Motivational Interviewing": 20}),  # 19.75: a whole row more is enough
        (60, 0, {"violence: Motivational Interviewing": 15}),
    ],
)
def test_a_strategy_is_thin_by_number_and_by_share(green, motivational, expected, tmp_path):
    rows = of_strategy("Green Dot Bystander Intervention", green) + of_strategy(
        "Motivational Interviewing", motivational
    )
    found = balanced(tmp_path / "rows.jsonl", rows)
    of_violence = {name: n for name, n in thin(found, "strategies").items() if name.startswith("violence")}
    assert of_violence == expected


def test_clusters_without_rows_are_listed_and_thin(tmp_path):
    found = balanced(tmp_path / "rows.jsonl", [violence_row()] * 100)
    by_name = {count.name: count.rows for count in found.tables[CLUSTERS]}
    assert by_name == {"suicide and selfharm": 0, "substance": 0, "weapon": 0, "violence": 100, "crimes (sexual)": 0}
    assert thin(found, CLUSTERS) == dict.fromkeys(by_name.keys() - {"violence"}, 10)


def test_a_field_that_names_no_strategy_gives_way_to_the_answer(tmp_path):
    rows = [violence_row(framework_name="SORRY-Bench"), violence_row(framework_name="", step="Go for a walk.")]
    found = balanced(tmp_path / "rows.jsonl", rows)
    counts = {count.name: count.rows for count in found.tables["strategies"] if count.rows}
    assert counts == {"violence: Motivational Interviewing": 1, "violence: none": 1}


def test_groups_and_languages(tmp_path):
    short = PLAIN | {"answer": "Four."}
    unknown = PLAIN | {"group": "harmless"}  # no group of the project: no contrast row
    french = PLAIN | {"answer": "Je comprends que la nuit soit longue et que personne ne soit là."}
    rows = [violence_row(language="en-GB"), GERMAN, {**GERMAN, "language": None}, PLAIN, short, french, OUT_OF_DOMAIN,
            unknown]  # fmt: skip
    found = balanced(tmp_path / "rows.jsonl", rows)
    assert {c.name: c.rows for c in found.tables["groups"]} == {"risky": 3, "plain": 3, "scary": 0, "out_of_domain": 1,
                                                                 "harmless": 1}  # fmt: skip
    assert {c.name: c.rows for c in found.tables["languages"]} == {
        "en": 4, "de": 2, "unknown": 1, "in no known language": 1,
    }  # fmt: skip
    assert thin(found, "languages") == {"en": 10, "de": 10}
    assert found.out_of_domain_share == pytest.approx(1 / 4)


def test_what_the_recipes_want_is_read_from_their_files(tmp_path):
    rows = [violence_row()] * 100 + [PLAIN] * 30
    found = balanced(tmp_path / "rows.jsonl", rows)
    for one in found.contrast:
        ratio = tomllib.loads((ROOT / one.recipe).read_text())["contrast_ratio"]
        assert (one.ratio, one.wanted, one.missing) == (ratio, 100 * ratio, max(0, 100 * ratio - 30))
    assert len(found.contrast) == 2 and {one.missing > 0 for one in found.contrast} == {True, False}
    bundled = Counter(json.loads(line)["group"] for line in (ROWS / "contrast.jsonl").read_text().splitlines())
    assert found.bundled_out_of_domain_share == bundled["out_of_domain"] / bundled.total()


def templates(path, tmp_path, *flags) -> int:
    """As stats counts them; as many as check blames."""
    main(["check", path, "--json", str(tmp_path / "issues.jsonl"), *flags])
    issues = [json.loads(line)["issues"] for line in (tmp_path / "issues.jsonl").read_text().splitlines()]
    blamed = sum(any(issue["check"] == "template" for issue in of_row) for of_row in issues)
    assert main(["stats", path, "--json", str(tmp_path / "stats.json"), *flags]) == 0
    numbers = json.loads((tmp_path / "stats.json").read_text())
    assert numbers["answers with more than half of their text in other rows"] == blamed
    return blamed


def test_templates_are_those_that_check_blames(tmp_path):
    assert templates(str(ROWS / "val.jsonl"), tmp_path) > 10


def test_the_services_of_another_country_are_no_template(tmp_path):
    same = "Quiet Line is there for you by day and by night, and whoever answers there will listen to all of it."
    own = ["Your brother has gone and the house is very still.", "The exam on Friday took all your courage away."]
    rows = [{"prompt": text, "answer": f"{text}\n\n{same}\n\nStay."} for text in own]
    path = write(tmp_path / "rows.jsonl", rows)
    assert templates(path, tmp_path) == 2
    assert templates(path, tmp_path, "--services", str(ROOT / "tests" / "fixtures" / "services_zz.toml")) == 0


def test_the_table_says_what_is_thin_and_what_is_missing(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [*of_strategy("Motivational Interviewing", 60), *[OUT_OF_DOMAIN] * 20])
    assert main(["stats", path, "--json", str(tmp_path / "stats.json")]) == 0
    printed = capsys.readouterr().out
    assert "       0    0.0%  violence: Green Dot Bystander Intervention  thin: 15 or more expected\n" in printed
    assert "      60   75.0%  violence: Motivational Interviewing\n" in printed
    assert "configs/tiny-selective.toml: R = 1.5, 90 wanted, 70 missing\n" in printed
    assert "configs/qwen3.5-27b-selective.toml: R = 0.25, 15 wanted\n" in printed
    assert "100% of them out of domain; of the bundled contrast rows 40%" in printed
    content = json.loads((tmp_path / "stats.json").read_text())["balance"]
    assert {"name": "scary", "rows": 0, "expected": 10, "thin": True} in content["groups"]
    assert content["out_of_domain_share"] == 1.0 and content["contrast"][0]["missing"] == 70


def test_large_counts_are_printed_in_full():
    rows = read_rows(ROWS / "val.jsonl")[:1]
    tables = {key: [] for key in TABLES} | {"languages": [Count("de", 19, 2005)]}
    printed = as_text(count_balance(rows, known_services())._replace(tables=tables), 8019)
    assert "     19    0.2%  de  thin: 2,005 or more expected\n" in printed
    assert "less than 50% of an even share" in printed


def test_unchecked_has_no_effect_without_services(capsys):
    for command in (["stats", "rows.jsonl"], ["check", "rows.jsonl"], ["write", "prompts.txt", "--out", "d.jsonl"]):
        line = refused_by(main, [*command, "--unchecked"], capsys)
        assert "--unchecked has no effect without --services" in line


def test_fields_of_any_kind_are_counted(tmp_path, capsys):
    rows = [violence_row(group=["risky"]), violence_row(framework_name=["x"])]
    assert main(["stats", write(tmp_path / "rows.jsonl", rows)]) == 0
    assert '["risky"]' in capsys.readouterr().out
