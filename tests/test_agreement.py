"""People against people and against a judge: labels from every kind of file, what they come to, and mistakes."""

import json
import math
import random
from pathlib import Path

import pytest

import eval as script
from psysafe.evaluation import comparison, labels, published_results
from psysafe.evaluation.benchmarks import agreement, preferences
from psysafe.evaluation.criteria import CRITERIA
from psysafe.evaluation.labels import Preference, labels_of_rows, read_csv, read_ratings
from tests.mistakes import refused, refused_by
from tests.test_eval_run import run

# 50 answers x 4 criteria, made up so that every kappa is the published one: (person, judge) -> answers.
MADE_UP = {
    "refusal": {(1, 1): 28, (0, 0): 17, (0, 1): 3, (1, 0): 2},
    "grounding": {(2, 2): 4, (2, 4): 2, (3, 1): 2, (3, 2): 2, (3, 3): 15, (3, 4): 4, (3, 5): 7, (4, 1): 1, (4, 3): 1,
                  (5, 1): 3, (5, 3): 2, (5, 4): 2, (5, 5): 5},
    "references": {(1, 1): 46, (0, 0): 4},
    "relevance": {(1, 1): 1, (1, 2): 1, (1, 4): 2, (2, 1): 2, (2, 2): 17, (2, 3): 4, (2, 4): 12, (2, 5): 3, (3, 3): 2,
                  (3, 4): 2, (4, 4): 1, (4, 5): 1, (5, 4): 1, (5, 5): 1},
}  # fmt: skip
PAIRS = {name: [pair for pair, n in counts.items() for _ in range(n)] for name, counts in MADE_UP.items()}


def write_csv(path: Path, rows: list[list], names: str) -> str:
    path.write_text("\n".join([names, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return str(path)


def tables_of(out: Path) -> dict[str, dict]:
    return {table["title"]: table for table in json.loads((out / "result.json").read_text())["tables"]}


def test_published_kappas_from_two_files_of_numbers(tmp_path, capsys):
    """As published: a row an answer, Yes as 1 and No as 0, 200 labels of a person and of the judge."""
    files = []
    for i, who in enumerate(("person", "judge")):
        rows = [[f"p{n}", *(PAIRS[name][n][i] for name in CRITERIA)] for n in range(50)]
        files.append(write_csv(tmp_path / f"{who}.csv", rows, f"prompt,{','.join(CRITERIA)}"))
    words = ["--human", files[0], "--judged", files[1], "--out", str(tmp_path / "out")]
    assert run("agreement", *words) == 0
    kappas = {row[0]: round(row[3], 3) for row in tables_of(tmp_path / "out")["By criterion"]["rows"]}
    expected = {"refusal": 0.79, "grounding": 0.263, "references": 1.0, "relevance": 0.193, "pooled": 0.611}
    assert kappas == expected
    published = dict(published_results.TABLES["agreement"].rows)
    assert {name: round(value, 2) for name, value in kappas.items()} == published
    # With 50 prompts relevance is barely told from chance: what the interval is for.
    intervals = {(row[1], row[2]): row[3:] for row in tables_of(tmp_path / "out")["Intervals"]["rows"]}
    n, value, low, high = intervals["relevance", "Cohen's kappa"]
    assert n == 50 and low < value < high and 0 < low < 0.1 and 0.3 < high < 0.45
    assert intervals["references", "Cohen's kappa"][1:] == [1.0, 1.0, 1.0]


def test_a_kappa_without_a_value_is_told_from_a_good_one(tmp_path, capsys):
    """One answer and two people who say the same: 1.000 [1.000, 1.000], and every table says what that is worth."""
    rows = [["p", rater, "Yes", 4] for rater in "XY"]
    people = write_csv(tmp_path / "people.csv", rows, "prompt,rater,refusal,grounding")
    assert run("agreement", "--human", people, "--out", str(tmp_path / "out")) == 0
    tables = tables_of(tmp_path / "out")
    assert list(tables) == ["Rater against rater", "All raters", "Intervals"]
    assert all(agreement.ONE_LABEL in table["note"] for table in tables.values())
    assert tables["Rater against rater"]["rows"][0][4] == 1.0


# One answer counts once


def rows(*lines: str, names="variant,prompt,refusal,grounding,references,relevance") -> list[dict]:
    return [dict(zip(names.split(","), line.split(","), strict=True)) for line in lines]


def judged(*variants: str) -> labels.Labels:
    return {(v, p): {"refusal": 1, "grounding": 4, "references": 0, "relevance": 2} for v in variants for p in "abcde"}


def read(lines: list[dict], *variants: str) -> labels.Labels:
    return labels_of_rows(lines, "l.csv", variants).get(labels.ANONYMOUS, {})


def test_a_repeated_label_is_refused():
    people = rows(*(f"base,{p},Yes,4,No,3" for p in "abcde"))
    assert len(read(people, "base")) == 5
    message = r"l\.csv row 6: labels the answer of row 3 again; expected one row for each answer \(of several people"
    refused(message, read, [*people, people[2]], "base")
    by_raters = [row | {"rater": rater} for rater in ("Anna", "Ben") for row in people]
    assert {rater: len(of_rater) for rater, of_rater in labels_of_rows(by_raters, "l.csv").items()} == {
        "Anna": 5, "Ben": 5}  # fmt: skip
    refused(r"row 11: Ben labels the answer of row 8 again", labels_of_rows, [*by_raters, by_raters[7]], "l.csv")
    refused(r"row 3: no rater", labels_of_rows, [*by_raters[:2], people[3] | {"rater": " "}], "l.csv")


def test_variants_are_told_apart():
    people = rows(*(f"{v},{p},Yes,4,No,3" for v in ("base", "tuned") for p in "abcde"))
    table = agreement.label_tables(read(people, "tuned"), judged("tuned"))
    assert sum(map(len, table.values())) == 5 * 5
    assert agreement.require_match({"people": read(people)}, judged("tuned"), "l.csv") == 5
    refused("variants as in tuned", agreement.require_match, {"people": read(people[:5])}, judged("tuned"), "l.csv")
    without = rows(*(f",{p},Yes,4,No,3" for p in "abcde"))
    assert set(read(without, "tuned")) == {("tuned", p) for p in "abcde"}
    refused("row 1: no variant", read, without, "base", "tuned")


def test_labels_as_pandas_writes_them():
    people = rows("base,a,True,4.0,0.0,2.0", "base,b,False,nan,,<NA>", "base,c,1.0,5.0,FALSE,1")
    assert list(read(people).values()) == [{"refusal": 1, "grounding": 4, "references": 0, "relevance": 2},
                                           {"refusal": 0},
                                           {"refusal": 1, "grounding": 5, "references": 0, "relevance": 1}]  # fmt: skip
    for name, wrong in (("grounding", "True"), ("grounding", "4.5"), ("refusal", "2"), ("relevance", "0.0")):
        refused(f"{name} is '{wrong}'", read, [rows("base,a,,,,")[0] | {name: wrong}])


def test_an_empty_line_of_a_spreadsheet_is_none_of_the_labels():
    assert len(read(rows("base,a,Yes,,,", ",,,,,", "tuned,b,Yes,,,"), "base", "tuned")) == 2
    broken = rows("base,a,Yes,,,", ",,,,,", "tuned,b,maybe,,,")
    refused(r"l\.csv row 3: refusal is 'maybe'", read, broken, "base", "tuned")


# Several raters


def test_the_majority_is_what_more_raters_say():
    def of(*values):
        return [{("base", "a"): {"grounding": value}} for value in values]

    for given, expected in (((3, 3, 5), 3), ((3, 5), None), ((1, 2, 3), None), ((2, 2, 5, 5), None), ((4,), 4)):
        assert agreement.majority(of(*given)).get(("base", "a"), {}).get("grounding") == expected, given


def test_three_raters_and_a_judge_from_the_command_line(tmp_path, capsys):
    """Each rater follows the truth more or less: who follows it less agrees less with everybody."""
    draw = random.Random(1)
    truth = {f"p{i}": draw.randint(1, 5) for i in range(80)}

    def seen(care: float) -> dict[str, int]:
        return {p: value if draw.random() < care else draw.randint(1, 5) for p, value in truth.items()}

    people = {"Anna": seen(0.95), "Ben": seen(0.9), "Cleo": seen(0.2)}
    lines = [[rater, p, value] for rater, given in people.items() for p, value in given.items()]
    human = write_csv(tmp_path / "people.csv", lines, "rater,prompt,grounding")
    judge = write_csv(tmp_path / "judge.csv", list(truth.items()), "prompt,grounding")
    assert run("agreement", "--human", human, "--judged", judge, "--out", str(tmp_path / "out")) == 0
    tables = tables_of(tmp_path / "out")
    each = {row[0]: row[4] for row in tables["Judge against each rater"]["rows"] if row[1] == "grounding"}
    assert each["judge, Anna"] > each["judge, Ben"] > 0.7 and each["judge, Cleo"] < 0.4
    pairs = {row[0]: row[4] for row in tables["Rater against rater"]["rows"] if row[1] == "grounding"}
    assert pairs["Anna, Ben"] > 0.7 > max(pairs["Anna, Cleo"], pairs["Ben, Cleo"])
    whole = {row[0]: row for row in tables["By criterion, judge against the majority"]["rows"]}
    assert whole["grounding"][1] < 80 and whole["grounding"][3] > 0.9  # three labels that differ have no majority
    alpha = {row[0]: row[1:] for row in tables["All raters"]["rows"]}["grounding"]
    assert alpha[0] == 80 and 0.2 < alpha[2] < alpha[1] < alpha[3] < 0.8
    assert "Krippendorff" in capsys.readouterr().out
    # Without a judge people are compared all the same.
    assert run("agreement", "--human", human, "--out", str(tmp_path / "alone")) == 0
    assert list(tables_of(tmp_path / "alone")) == ["Rater against rater", "All raters", "Intervals"]


def test_prompts_are_drawn_not_answers():
    """Two answers to a prompt with equal labels are no more evidence than one: the interval stays."""
    draw = random.Random(0)
    first = {("base", f"p{i}"): {"grounding": draw.randint(1, 5)} for i in range(40)}
    second = {answer: {"grounding": draw.choice([label["grounding"], 3])} for answer, label in first.items()}

    def interval(variants):
        a, b = ({(v, p): label for v in variants for (_, p), label in of.items()} for of in (first, second))
        return agreement.resampled_intervals(agreement.label_tables(a, b)["grounding"], agreement.kappa.OF_TWO)

    assert interval(["base"])["Cohen's kappa"] == pytest.approx(interval(["base", "tuned"])["Cohen's kappa"])


# A rating page's files

KEY = {"page": "d1", "items": {"1": {"prompt": "p1", "left": "base, v0", "right": "tuned, v0"},
                               "2": {"prompt": "p2", "left": "tuned, v0", "right": "base, v0"}}}  # fmt: skip


def rated(item: str, side: str, criterion: str, value) -> dict:
    return {"item": item, "side": side, "criterion": criterion, "value": value}


ANNA = {"page": "d1", "rater": "Anna", "swapped": ["2"],
        "ratings": [rated("1", "left", "refusal", "Yes"), rated("1", "right", "grounding", 5),
                    rated("2", "left", "grounding", 1), rated("2", "right", "relevance", None)],
        "preferences": [{"item": "1", "value": "right"}, {"item": "2", "value": "right"}]}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    def write(name: str, content: object) -> str:
        (tmp_path / name).write_text(json.dumps(content))
        return str(tmp_path / name)

    return write


def test_the_key_names_what_stood_on_a_side(files):
    """Item 2 was swapped for Anna: on her left stood what the key has on the right."""
    ratings = read_ratings([files("anna.json", ANNA)], files("key.json", KEY))
    assert ratings.labels == {"Anna": {("base, v0", "p1"): {"refusal": 1}, ("tuned, v0", "p1"): {"grounding": 5},
                                       ("base, v0", "p2"): {"grounding": 1}}}  # fmt: skip
    assert ratings.preferences == [Preference("Anna", "p1", "base, v0", "tuned, v0", "right"),
                                   Preference("Anna", "p2", "base, v0", "tuned, v0", "right")]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [
    ({"page": "d2"}, r"anna\.json: of page 'd2', and .*key\.json of page 'd1'; expected the key of the same page"),
    ({"swapped": ["02"]}, r"anna\.json: swapped 1: item is '02', which the key does not have"),
    ({"swapped": ["1", ["2"]]}, r"swapped 2: item is \['2'\], which the key does not have"),
    ({"rater": ""}, r"anna\.json: rater is ''; expected a name"),
    ({"ratings": 3}, r"anna\.json: ratings is 3; expected a list"),
    ({"ratings": [3]}, r"anna\.json: ratings 1: item is None, which the key does not have"),
    ({"ratings": [rated("9", "left", "refusal", "Yes")]}, "ratings 1: item is '9', which the key does not have"),
    ({"ratings": [rated("1", "top", "refusal", "Yes")]}, "ratings 1: side is 'top'; expected left, right"),
    ({"ratings": [rated("1", "left", "hope", "Yes")]}, "ratings 1: criterion is 'hope'; expected refusal, grounding"),
    ({"ratings": [rated("1", "left", ["x"], "Yes")]}, "ratings 1: criterion is"),
    ({"ratings": [rated("1", "left", "grounding", 6)]}, "ratings 1: grounding is 6; expected 1 to 5"),
    ({"ratings": ANNA["ratings"] + ANNA["ratings"][:1]}, r"ratings 5: Anna has said that already, in .*ratings 1"),
    ({"preferences": [{"item": "1", "value": "both"}]}, "preferences 1: value is 'both'; expected left, right, tie"),
    ({"preferences": ANNA["preferences"] * 2}, "preferences 3: Anna has said that already"),
])  # fmt: skip
def test_mistakes_in_rating_files(files, change, message):
    refused(message, read_ratings, [files("anna.json", ANNA | change)], files("key.json", KEY))


@pytest.mark.parametrize("first, second", [
    ("Anna", "anna"), ("Anna", "Anna "), ("Anna B", "Anna  B"), ("Zo\u00eb", "Zoe\u0308")])  # fmt: skip
def test_one_person_under_two_spellings_is_refused(files, first, second):
    """They would count as two raters who agree with each other in all."""
    message = r"rater .*, earlier .*; expected one spelling of a name"
    paths = [files(f"{i}.json", ANNA | {"rater": rater}) for i, rater in enumerate((first, second))]
    refused(r"1\.json: " + message, read_ratings, paths, files("key.json", KEY))
    rows = [{"prompt": "p", "rater": rater, "refusal": "Yes"} for rater in (first, second)]
    if first != second.strip():  # of a CSV names are read without the spaces around them
        refused("l.csv row 2: " + message, labels_of_rows, rows, "l.csv")
    paths[1] = files("1.json", ANNA | {"rater": f"{first}e"})
    assert len(read_ratings(paths, files("key.json", KEY)).labels) == 2


def test_mistakes_in_keys_and_between_files(files):
    anna = files("anna.json", ANNA)
    refused("ratings 1: Anna has said that already", read_ratings, [anna, files("b.json", ANNA)], files("k.json", KEY))
    for items, message in (([], "items is "), ({}, "items is "), ({"1": {"prompt": "p"}}, "item 1: .*expected an obj")):
        refused(message, read_ratings, [anna], files("key.json", KEY | {"items": items}))
    refused("expected a JSON object", read_ratings, [anna], files("key.json", [1]))
    nameless = {"items": KEY["items"]}
    refused("page is None; expected the name of the rating page", read_ratings, [anna], files("key.json", nameless))


def test_rows_of_jsonl_may_each_label_something_else(tmp_path, capsys):
    path, judged = tmp_path / "people.jsonl", tmp_path / "judged.csv"
    path.write_text('{"prompt": "p0"}\n{"prompt": "p1", "refusal": "Yes"}\n{"prompt": "p2", "grounding": 3}\n')
    assert read_csv(path) == {labels.ANONYMOUS: {("", "p1"): {"refusal": 1}, ("", "p2"): {"grounding": 3}}}
    judged.write_text("prompt,refusal\np1,\n")
    words = ["agreement", "--human", path, "--judged", judged, "--out", tmp_path / "out"]
    assert "judged.csv: labels of 0 raters; expected those of one judge" in refused_by(script.main, words, capsys)


def test_preferences_by_hand():
    """Nine prompts, two raters: six for B by both, one split, one for A by one and tied by the other, one tied."""
    votes = [("right", "right")] * 6 + [("left", "right"), ("left", "tie"), ("tie", "tie")]
    all_votes = [Preference(rater, f"p{i}", "A", "B", both[r]) for i, both in enumerate(votes)
                 for r, rater in enumerate(("Anna", "Ben"))]  # fmt: skip
    shares, sides = preferences.tables(all_votes)
    row = shares.rows[0]
    assert row[:4] == ["all raters", "A", "B", 18]
    assert row[4:8] == pytest.approx([100 * 2 / 18, 100 * 13 / 18, 100 * 3 / 18, 100 * 2 / 15])
    assert row[10:] == [1, 6, 2 * 8 / 2**7, comparison.TOO_SMALL]  # prompts: 1 for A, 6 for B
    # Wilson's interval of 2 in 15, as wide as one of the 8 prompts that have a vote for either.
    z2 = 1.959964**2
    middle, half = (2 / 15 + z2 / 16) / (1 + z2 / 8), math.sqrt(z2 * (2 / 15 * 13 / 15 / 8 + z2 / 256)) / (1 + z2 / 8)
    assert row[8:10] == pytest.approx([100 * (middle - half), 100 * (middle + half)], abs=1e-4)
    assert [row[0] for row in shares.rows] == ["all raters", "Anna", "Ben"]
    assert sides.rows[0][:4] == ["all raters", 2, 13, pytest.approx(100 * 2 / 15)] and sides.rows[0][-1] < 0.01


@pytest.mark.parametrize(("n", "low", "reading"), [(4, 51.0, comparison.TOO_SMALL), (6, 61.0, "B preferred")])
def test_all_votes_for_one_answer_are_no_certainty(n, low, reading):
    """A second and a third rater who say the same make the interval no narrower."""
    for raters in (("Anna",), ("Anna", "Ben", "Cleo")):
        votes = [Preference(rater, f"p{i}", "A", "B", "right") for i in range(n) for rater in raters]
        row = preferences.tables(votes)[0].rows[0]
        assert row[7:9] == [0.0, 0.0] and row[9] == pytest.approx(100 - low, abs=0.1) and row[-1] == reading
    other = [vote._replace(choice="left") for vote in votes]
    assert preferences.tables(other)[0].rows[0][-1] == reading.replace("B pref", "A pref")


def test_the_side_is_not_the_variant():
    """A rater who always takes the left one, with sides in turn: no preference, and a bias that is seen."""
    votes = [Preference("Anna", f"p{i}", *(("A", "B") if i % 2 else ("B", "A")), "left") for i in range(20)]
    (shares,), (sides,) = (table.rows for table in preferences.tables(votes))
    assert shares[7] == 50.0 and shares[-2:] == [1.0, comparison.TOO_SMALL]
    assert sides[1:4] == [20, 0, 100.0] and sides[-1] == pytest.approx(2 / 2**20)
    tied = [vote._replace(choice="tie") for vote in votes]
    no_share, no_side = (table.rows[0] for table in preferences.tables(tied))
    assert no_share[-2:] == [1.0, "no vote for either"] and no_side[-1] == 1.0 and preferences.tables([]) == []


def test_ratings_from_the_command_line(files, tmp_path, capsys):
    key, anna, out = files("key.json", KEY), files("anna.json", ANNA), str(tmp_path / "out")
    ben = files("ben.json", ANNA | {"rater": "Ben", "swapped": []})
    assert run("agreement", "--ratings", anna, ben, "--key", key, "--out", out) == 0
    tables = tables_of(tmp_path / "out")
    assert {"Rater against rater", "Preference", "Position: answers preferred by their side"} <= tables.keys()
    assert [row[0] for row in tables["Preference"]["rows"]] == ["all raters", "Anna", "Ben"]
    for words, message in (
        (["--ratings", anna], "--ratings needs --key FILE"),
        (["--key", key], "--key has no effect"),
        ([], "expected one of --human CSV and --ratings FILE"),
        (["--human", write_csv(tmp_path / "p.csv", [["a", "Yes"]], "prompt,refusal")], "labels of one person"),
    ):
        assert message in refused_by(script.main, ["agreement", *words, "--out", out], capsys), words
