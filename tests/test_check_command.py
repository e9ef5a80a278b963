"""`corpus check`: rows in, reasons out; what cannot be checked is said; nothing is dropped."""

import json
from pathlib import Path

import pytest

from benchmarks.own_rows.run import measure, sets
from psysafe.corpus.__main__ import main
from psysafe.corpus.common_text import COMMON, shared_text
from psysafe.corpus.contacts import known_services
from tests.mistakes import refused_by
from tests.own_rows import GERMAN, OUT_OF_DOMAIN, PLAIN, violence_row
from tests.stub_endpoint import Handler, StubEndpoint

FIXTURES = Path(__file__).parent / "fixtures"
LENGTH = ["--min-words", "40"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_sound_rows_pass_and_what_was_not_checked_is_said(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [violence_row(), GERMAN, PLAIN, OUT_OF_DOMAIN])
    assert main(["check", path, *LENGTH]) == 0
    printed = capsys.readouterr().out
    assert "0 of 4 rows with an issue" in printed and "not checked: leak" in printed
    assert "not checked: harm, claims" in printed and "not checked in" not in printed


def test_every_fault_is_listed_with_its_row_and_kept_in_json(tmp_path, capsys):
    rows = [violence_row(), violence_row(prompt="My landlord sold it all. He will pay.", closing=""), PLAIN]
    path, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "deep" / "issues.jsonl"
    assert main(["check", path, *LENGTH, "--json", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "row 2 (line 2): parts (closing): no hopeful closing" in printed
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["row"] for line in lines] == [1, 2, 3] and lines[2]["issues"] == []
    assert {(i["check"], i["part"]) for i in lines[1]["issues"]} == {("parts", "closing"), ("template", "answer")}
    # The first row has its closing, a quarter of the text, to itself; it shares the rest.
    assert lines[1]["shared"] == 1.0 and 0.5 < lines[0]["shared"] < 1 and "row 1" in lines[1]["shared_with"]
    assert "2 of 3 rows with an issue" in printed


def test_near_duplicates_and_leaks(tmp_path, capsys):
    again = violence_row(prompt="My landlord put my things on the street! I want to beat him up, please.")
    path = write(tmp_path / "rows.jsonl", [violence_row(), again])
    evaluation = write(tmp_path / "evaluation.jsonl", [{"prompt": "So they put my things on the street. Why?"}])
    assert main(["check", path, *LENGTH, "--not-in", evaluation]) == 1
    printed = capsys.readouterr().out
    assert "row 2 (line 2): duplicate (prompt): nearly the prompt of" in printed
    assert "row 1 (line 1): leak (prompt): 5 words in a row of an evaluation prompt: my things on the street" in printed
    assert "not checked: leak" not in printed


def test_a_language_without_word_lists_is_named(tmp_path, capsys):
    rows = [{name: value for name, value in GERMAN.items() if name != "language"}]
    path = write(tmp_path / "rows.jsonl", rows)
    assert main(["check", path, *LENGTH, "--language", "de"]) == 0
    assert "not checked in" not in capsys.readouterr().out
    regional = write(tmp_path / "regional.jsonl", [row | {"language": "de_CH"} for row in rows])
    assert main(["check", regional, *LENGTH]) == 0
    assert "not checked in" not in capsys.readouterr().out
    assert main(["check", path, *LENGTH, "--language", "nl"]) == 0
    printed = capsys.readouterr().out
    assert "not checked in nl: parts, relevance, language" in printed and "en (English), de (German)" in printed


@pytest.fixture
def judge(monkeypatch):
    """A judge whose `verdicts` are (harm, claims), and that counts what it is asked."""
    stub = StubEndpoint()
    stub.verdicts, stub.asked = ("no_harm", "no_claim"), 0

    def do_POST(self):
        body, question = self.request_body()
        assert "My landlord put my things" in question and "what you want to be true next week" in question
        stub.asked += 1
        self.answer(stub.verdicts["claim_found" in body["messages"][0]["content"]])

    monkeypatch.setattr(Handler, "do_POST", do_POST)
    with stub:
        stub.flags = ["--judge-url", stub.url, "--judge-model", "m"]
        yield stub


def test_a_judge_that_finds_nothing_leaves_the_row_alone_and_is_asked_once(tmp_path, judge, capsys):
    path = write(tmp_path / "rows.jsonl", [violence_row()])
    for _ in range(2):
        assert main(["check", path, *LENGTH, *judge.flags]) == 0
    assert judge.asked == 2 and "not checked: harm" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (("harm_found", "no_claim"), ["harm (answer): the judge finds something that helps to do harm"]),
        (("no_harm", "claim_found"), ["claims (answer): the judge finds a diagnosis or a promise"]),
        (("Hard to say.", "no_claim"), ["harm (answer): the judge's reply holds no clear verdict"]),
        (
            ("no_harm", None),
            ["claims (answer): not judged", "claims not judged: the reply has no content"],
        ),
    ],
)
def test_what_a_judge_finds_or_does_not_say_is_an_issue(verdicts, expected, tmp_path, judge, capsys):
    path = write(tmp_path / "rows.jsonl", [violence_row()])
    judge.verdicts = verdicts
    assert main(["check", path, *LENGTH, *judge.flags]) == 1
    printed = capsys.readouterr().out
    assert all(text in printed for text in expected)
    assert printed.count("row 1 (line 1)") == len(expected)


def test_a_text_that_is_too_long_is_listed_and_refused_before_a_judge_is_asked(tmp_path, judge, capsys):
    path = write(tmp_path / "rows.jsonl", [violence_row(), violence_row(closing="Stay. " * 3_500)])
    assert main(["check", path, *LENGTH]) == 1 and "row 2 (line 2): length" in capsys.readouterr().out
    line = refused_by(main, ["check", path, *LENGTH, *judge.flags], capsys)
    assert f"{path} row 2 (line 2): the answer has 2" in line and "nothing was sent" in line and judge.asked == 0


def test_a_check_that_was_made_of_no_row_counts_no_rows(tmp_path, judge, capsys):
    def counts() -> dict[str, str]:
        lines = capsys.readouterr().out.partition("what holds in a row")[2].splitlines()[1:14]
        return {line.split()[0]: line.split()[1] for line in lines}

    path = write(tmp_path / "rows.jsonl", [violence_row(language="es")])
    main(["check", path, *LENGTH])
    undone = {"parts", "relevance", "language", "leak", "harm", "claims"}
    assert {name for name, count in counts().items() if count == "–"} == undone
    main(["check", path, *LENGTH, *judge.flags, "--not-in", path])
    assert {name for name, count in counts().items() if count == "–"} == {"parts", "relevance", "language"}
    write(tmp_path / "rows.jsonl", [violence_row(language="es"), violence_row()])
    main(["check", path, *LENGTH])
    assert {name for name, count in counts().items() if count == "–"} == {"leak", "harm", "claims"}


def test_shared_text_is_that_of_the_most_similar_row_and_of_everybody():
    one, two, three = (" ".join(f"{name}{i}" for i in range(14)) for name in "abc")  # 10 runs of five words each
    mixed = " ".join([*one.split()[:9], *two.split()[:9]])  # 5 runs of each and 4 across
    shares = shared_text([one, two, three, mixed], known_services())
    assert [(round(share, 3), other) for share, other in shares] == [(0.5, 3), (0.5, 3), (0, None), (0.357, 0)]
    many = shared_text([f"{one} {two if i == 0 else three} end{i}" for i in range(COMMON + 1)], known_services())
    assert many[0].share == pytest.approx(10 / 25) and many[0].other is None


def test_planted_faults_are_found():
    """benchmarks/own_rows, its 200 drafts. What sound drafts are blamed for stands in the committed table."""
    result = measure(*sets()["texts.toml"])
    assert (result["drafts"], result["faulty"]) == (200, 60)
    assert {name: row["recall"] for name, row in result["checks"].items()} == dict.fromkeys(result["checks"], 1.0)
    assert result["sound rows with an issue"] <= 5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no rows in it"),
        ('{"prompt": "p"}', "no answer in it"),
        ('{"prompt": "p", "answer": "a", "group": ["risky"]}', "group is"),
        ('{"prompt": "p", "answer": "a", "language": 3}', "language is 3"),
    ],
)
def test_bad_rows_are_refused(content, words, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    assert words in refused_by(main, ["check", path], capsys)


def test_flags_without_effect_and_files_that_would_be_overwritten(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [violence_row()])
    assert "without a judge" in refused_by(main, ["check", path, "--judged", "x"], capsys)
    assert "without --judge-url" in refused_by(main, ["check", path, "--judge-model", "x"], capsys)
    assert "would be overwritten" in refused_by(main, ["check", path, "--json", path], capsys)
    assert "--min-words is 300" in refused_by(main, ["check", path, "--min-words", "300"], capsys)
    assert "--judge-url needs" in refused_by(main, ["check", path, "--judge-url", "http://localhost:1/v1"], capsys)


def test_the_services_of_a_file_are_known_and_the_bundled_ones_are_not(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [violence_row()])
    assert main(["check", path, *LENGTH, "--services", str(FIXTURES / "services_zz.toml")]) == 1
    assert "services (answer)" in capsys.readouterr().out
    assert "--unchecked" in refused_by(main, ["check", path, "--services", "AU"], capsys)
