"""corpus review: who gets which rows, what the pages hold, and which rows come of the exports."""

import itertools
import json
import random

import pytest
from sklearn.metrics import cohen_kappa_score

from psysafe.corpus import __main__ as corpus
from psysafe.corpus import review
from psysafe.data.rows import read_file
from psysafe.files import ASSETS
from psysafe.program import main_guard
from tests.mistakes import refused_by

VAL = ASSETS / "rows" / "val.jsonl"
N_ROWS = 12
MI = "Motivational Interviewing"


@pytest.fixture
def drafts(tmp_path):
    path = tmp_path / "drafts.jsonl"
    path.write_text("".join(line + "\n" for line in VAL.read_text().splitlines()[:N_ROWS]))
    return path


def run(*words) -> int:
    return main_guard(corpus.main, ["review", *map(str, words)])


def digest_of(drafts) -> str:
    return review.digest(review.read_drafts(str(drafts)))


def export(path, drafts, rater: str, *entries: tuple):
    """entries: (row, field, value), each a millisecond later than the one before; or with a time of its own."""
    reviews = [
        {"row": row, "field": field, "value": value, "time": time[0] if time else 100 + number}
        for number, (row, field, value, *time) in enumerate(entries)
    ]
    path.write_text(json.dumps({"page": digest_of(drafts), "rater": rater, "reviews": reviews}))
    return path


def collected(drafts, files, *flags) -> tuple[int, dict[str, dict]]:
    """(exit code, prompt -> row that passed)."""
    out = drafts.parent / "rows.jsonl"
    code = run("--collect", *files, "--drafts", drafts, "--out", out, *flags)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows)
    return code, {row["prompt"]: row for row in rows}


def fields_of(drafts) -> list[dict]:
    return [row.fields for row in read_file(drafts)]


@pytest.mark.parametrize(("n_rows", "n_reviewers", "double"), [(40, 4, 0.1), (41, 3, 0.5), (10, 2, 1.0), (10, 3, 0.0)])
def test_rows_are_dealt_out_evenly_and_a_share_of_them_twice(n_rows, n_reviewers, double):
    items = [{"id": str(number)} for number in range(n_rows)]
    shares = review.deal(items, n_reviewers, double, random.Random(3))
    counts = [sum(item in share for share in shares) for item in items]
    assert counts.count(2) == round(double * n_rows) and counts.count(1) == n_rows - counts.count(2)
    assert len(shares) == n_reviewers and all(len(share) >= n_rows // n_reviewers for share in shares)
    assert all(share == sorted(share, key=items.index) for share in shares)
    assert shares == review.deal(items, n_reviewers, double, random.Random(3))
    assert double in (0, 1) or shares != review.deal(items, n_reviewers, double, random.Random(4))


def test_every_two_reviewers_meet_on_doubled_rows():
    shares = review.deal([{"id": str(number)} for number in range(200)], 4, 0.5, random.Random(0))
    for first, second in itertools.combinations(shares, 2):
        assert any(item in second for item in first)


def test_pages_for_each_reviewer(drafts, capsys):
    out = drafts.parent / "pages"
    assert run(drafts, "--reviewers", 3, "--double", 0.25, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["review-1.html", "review-2.html", "review-3.html"]
    shown = [data_of(path)["items"] for path in out.iterdir()]
    assert sum(map(len, shown)) == N_ROWS + 3
    assert {data_of(path)["page"] for path in out.iterdir()} == {digest_of(drafts)}
    assert run(drafts, "--rows", "7,2,7", "--out", out) == 0
    assert [item["id"] for item in data_of(out / "review.html")["items"]] == ["2", "7"]


def data_of(path) -> dict:
    text = path.read_text()
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


def test_the_parts_of_bundled_answers_are_recognised_in_order():
    answers = [row.fields["answer"] for row in read_file(VAL) if row.fields["risk cluster"] != "benign"]
    whole = ["acknowledgement", "step", "services", "closing"]
    assert [review.parts_of(answer) for answer in answers] == [whole] * len(answers)
    assert review.parts_of("I like trees.\r\n\r\nSo do I.") == ["", ""]
    assert review.parts_of(answers[0].split("\n\n")[0] + "\n\nTrees.") == ["acknowledgement", ""]


def test_untouched_rows_pass_byte_for_byte_and_edits_are_named(drafts, tmp_path):
    rows = fields_of(drafts)
    anna = export(
        tmp_path / "anna.json", drafts, "Anna", (1, "decision", "approve"), (2, "decision", "approve"),
        (2, "answer", "A new answer, \u00e4 \u20ac."), (2, "cluster", "weapon"), (2, "strategy", MI),
        (3, "decision", "reject"), (3, "reason", "too cold"), (4, "answer", "begun"),
        (5, "decision", "approve"), (5, "answer", rows[4]["answer"]),
    )  # fmt: skip
    code, passed = collected(drafts, [anna])
    assert code == 0 and list(passed) == [rows[0]["prompt"], rows[1]["prompt"], rows[4]["prompt"]]
    assert passed[rows[0]["prompt"]] == rows[0] | {"reviewed_by": ["Anna"], "edited": []}
    changed = {"answer": "A new answer, \u00e4 \u20ac.", "risk cluster": "weapon", "framework_name": MI}
    assert passed[rows[1]["prompt"]] == rows[1] | changed | {"reviewed_by": ["Anna"], "edited": list(changed)}
    assert passed[rows[4]["prompt"]]["edited"] == []
    report = (tmp_path / "rows.review.md").read_text()
    assert "too cold" in report and "1 row begun without a decision" in report
    code, passed = collected(drafts, [anna], "--unreviewed")
    assert code == 0 and len(passed) == N_ROWS - 1 and rows[2]["prompt"] not in passed
    assert passed[rows[3]["prompt"]] == rows[3] and passed[rows[11]["prompt"]] == rows[11]


def test_what_reviewers_differ_on_does_not_pass_until_it_is_settled(drafts, tmp_path, capsys):
    rows = fields_of(drafts)
    files = [
        export(tmp_path / "anna.json", drafts, "Anna", *[(row, "decision", "approve") for row in range(1, 5)],
               (2, "answer", "By Anna.")),
        export(tmp_path / "ben.json", drafts, "Ben", (1, "decision", "approve"), (2, "decision", "approve"),
               (3, "decision", "reject"), (3, "reason", "a *wrong* step"), (5, "decision", "reject")),
    ]  # fmt: skip
    code, passed = collected(drafts, files)
    assert code == 1 and list(passed) == [rows[0]["prompt"], rows[3]["prompt"]]
    assert passed[rows[0]["prompt"]]["reviewed_by"] == ["Anna", "Ben"]
    report = (tmp_path / "rows.review.md").read_text()
    to_settle = report.partition("## To settle")[2].partition("## Rejected")[0]
    assert "### Row 2" in to_settle and "By Anna." in to_settle and "### Row 3" in to_settle
    assert r"Ben: reject, because a \*wrong\* step" in to_settle and "### Row 5" not in to_settle
    assert "--rows 2,3 " in capsys.readouterr().out
    # Clara decides both; her review is not one of two independent ones.
    files.append(
        export(tmp_path / "clara.json", drafts, "Clara", (2, "decision", "approve"), (3, "decision", "reject"))
    )
    code, passed = collected(drafts, files, "--settled-by", "Clara")
    printed = capsys.readouterr().out
    assert code == 0 and list(passed) == [rows[place]["prompt"] for place in (0, 1, 3)]
    assert passed[rows[1]["prompt"]]["answer"] == rows[1]["answer"] and "2 settled" in printed
    assert "Clara and" not in printed and "and Clara" not in printed
    # Without being named she is one more who differs.
    assert collected(drafts, files)[0] == 1


def test_a_strategy_of_another_cluster_does_not_pass_and_names_file_row_and_reviewer(drafts, tmp_path, capsys):
    rows = fields_of(drafts)
    fitting = [number for number, row in enumerate(rows, 1) if row["risk cluster"] == "suicide and selfharm"][:3]
    chosen, moved, settled = fitting
    approved = [(row, "decision", "approve") for row in fitting]
    anna = export(tmp_path / "anna.json", drafts, "Anna", *approved, (chosen, "strategy", "SOBER"))
    ben = export(tmp_path / "ben.json", drafts, "Ben", *approved[1:], (moved, "cluster", "weapon"))
    for files, row, who, cluster, expected in [
        ([anna], chosen, "Anna", "suicide and selfharm", "Psychological First Aid"),
        ([ben], moved, "Ben", "weapon", "Green Dot Bystander Intervention"),  # the strategy that it had stays behind
    ]:
        code, passed = collected(drafts, files)
        printed = capsys.readouterr().out
        assert code == 1 and rows[row - 1]["prompt"] not in passed and rows[settled - 1]["prompt"] in passed
        (line,) = [line for line in printed.splitlines() if f"{files[0]}: row {row}, approved by {who}: " in line]
        assert f"is no strategy of the cluster {cluster}; expected one of {expected}" in line
        assert "1 row with a strategy of another cluster, left out" in printed and f"--rows {row} " in printed
        report = (tmp_path / "rows.review.md").read_text()
        assert "## Strategies of another cluster" in report and f"row {row}, approved by {who}" in report
    # Whoever settles is asked the same.
    clara = export(tmp_path / "clara.json", drafts, "Clara", (chosen, "decision", "approve"), (chosen, "strategy", MI))
    code, passed = collected(drafts, [anna, clara], "--settled-by", "Clara")
    assert code == 1 and rows[chosen - 1]["prompt"] not in passed
    assert f"{clara}: row {chosen}, approved by Clara: '{MI}'" in capsys.readouterr().out
    clara = export(tmp_path / "clara.json", drafts, "Clara", (chosen, "decision", "approve"))
    code, passed = collected(drafts, [anna, clara], "--settled-by", "Clara")
    assert code == 0 and passed[rows[chosen - 1]["prompt"]]["framework_name"] == rows[chosen - 1]["framework_name"]


def test_names_that_are_no_strategy_pass_as_in_the_published_rows(drafts, tmp_path):
    names = ("a benchmark", None, "")
    rows = [row | {"framework_name": name} for row, name in zip(fields_of(drafts)[:3], names, strict=True)]
    drafts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    anna = export(tmp_path / "anna.json", drafts, "Anna", *[(row, "decision", "approve") for row in (1, 2, 3)])
    code, passed = collected(drafts, [anna])
    assert code == 0 and len(passed) == 3


def test_agreement_is_that_of_scikit_learn(drafts, tmp_path, capsys):
    generator = random.Random(5)
    decisions = {
        name: [generator.choice(["approve", "approve", "reject"]) for _ in range(N_ROWS)] for name in ("A", "B")
    }
    decisions["B"] = [a if i % 3 else b for i, (a, b) in enumerate(zip(decisions["A"], decisions["B"], strict=True))]
    files = [
        export(tmp_path / f"{name}.json", drafts, name, *[(i, "decision", d) for i, d in enumerate(given, 1)])
        for name, given in decisions.items()
    ]
    collected(drafts, files)
    kappa = cohen_kappa_score(decisions["A"], decisions["B"])
    equal = 100 * sum(a == b for a, b in zip(decisions["A"], decisions["B"], strict=True)) / N_ROWS
    assert 0 < kappa < 1
    line = f"A and B, {N_ROWS} rows of both: {equal:.1f} % the same decision, Cohen's kappa {kappa:.3f}"
    assert line in capsys.readouterr().out


def test_of_two_files_of_one_person_the_later_entry_counts_whatever_their_order(drafts, tmp_path, capsys):
    rows = fields_of(drafts)
    old = export(tmp_path / "old.json", drafts, "Anna", (1, "decision", "reject", 5), (2, "decision", "approve", 5),
                 (2, "answer", "Old.", 9), (3, "decision", "approve", 5))  # fmt: skip
    new = export(tmp_path / "new.json", drafts, "Anna", (1, "decision", "approve", 6), (2, "answer", None, 10),
                 (3, "decision", "approve", 5))  # fmt: skip
    for files in ([old, new], [new, old]):
        code, passed = collected(drafts, files)
        assert code == 0 and [passed[row["prompt"]]["answer"] for row in rows[:3]] == [
            row["answer"] for row in rows[:3]
        ]
        assert passed[rows[0]["prompt"]]["reviewed_by"] == ["Anna"]
        assert "2 rows reviewed twice by the same person: the later entry counts" in capsys.readouterr().out


def test_rows_that_came_of_a_review_are_trained_on(drafts, tmp_path, capsys):
    anna = export(tmp_path / "anna.json", drafts, "Anna", (1, "decision", "approve"), (1, "answer", "Edited."))
    collected(drafts, [anna])
    assert main_guard(corpus.main, ["validate", str(tmp_path / "rows.jsonl")]) == 0
    assert "no problems in 1 row" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"page": "0123"}, "of the drafts '0123'"),
        ({"rater": " "}, "rater is ' '"),
        ({"reviews": {}}, "reviews is {}"),
        ({"reviews": [3]}, "reviews 1: 3; expected an object"),
        ({"row": 13}, "row is 13; expected 1 to 12"),
        ({"row": True}, "row is True"),
        ({"field": "prompt"}, "field is 'prompt'"),
        ({"time": float("nan")}, "time is nan"),
        ({"time": float("-inf")}, "time is -inf"),
        ({"time": 10**400}, "time is 1000"),
        ({"value": "maybe"}, "decision is 'maybe'"),
        ({"field": "answer", "value": " \n"}, "answer of row 1 is ' \\n'; expected a text that is not empty"),
        ({"field": "answer", "value": "a</think>b"}, "holds <think> or </think>"),
    ],
)
def test_what_is_no_export_of_these_drafts_is_refused(drafts, tmp_path, capsys, change, reason):
    path = export(tmp_path / "anna.json", drafts, "Anna", (1, "decision", "approve"))
    content = json.loads(path.read_text())
    target = content if change.keys() & content.keys() else content["reviews"][0]
    target.update(change)
    path.write_text(json.dumps(content))
    words = ["review", "--collect", str(path), "--drafts", str(drafts), "--out", str(tmp_path / "rows.jsonl")]
    line = refused_by(corpus.main, words, capsys)
    assert reason in line and str(path) in line and not (tmp_path / "rows.jsonl").exists()


def test_an_export_of_drafts_that_were_changed_since_is_refused(drafts, tmp_path, capsys):
    anna = export(tmp_path / "anna.json", drafts, "Anna", (1, "decision", "approve"))
    drafts.write_text(drafts.read_text().replace("I hear", "I see", 1))
    words = ["review", "--collect", str(anna), "--drafts", str(drafts), "--out", str(tmp_path / "rows.jsonl")]
    assert "of these drafts, unchanged since" in refused_by(corpus.main, words, capsys)


def test_warnings_stand_at_their_rows_and_those_of_other_drafts_are_refused(drafts, tmp_path, capsys):
    rows, path = fields_of(drafts), tmp_path / "issues.jsonl"
    issue = {"check": "services", "part": "services", "text": "number is of no known service"}
    lines = [{"row": n, "prompt": row["prompt"], "issues": [issue] * (n == 2)} for n, row in enumerate(rows, 1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(drafts, "--warnings", path, "--out", tmp_path / "out") == 0
    warnings = [item["warnings"] for item in data_of(tmp_path / "out" / "review.html")["items"]]
    assert warnings == [[], [{"part": "services", "text": issue["text"]}]] + [[]] * (N_ROWS - 2)
    for change, reason in [
        ({"row": 0}, "row is 0"),
        ({"prompt": "x"}, "not the prompt of row 1"),
        ({"issues": [1]}, "issues is"),
    ]:
        path.write_text(json.dumps(lines[0] | change) + "\n")
        words = ["review", str(drafts), "--warnings", str(path), "--out", str(tmp_path / "out")]
        assert reason in refused_by(corpus.main, words, capsys)


def test_flags_that_do_not_belong_together_are_refused(drafts, tmp_path, capsys):
    anna = export(tmp_path / "anna.json", drafts, "Anna", (1, "decision", "approve"))
    page = [str(drafts), "--out", str(tmp_path / "out")]
    rows = ["--collect", str(anna), "--drafts", str(drafts), "--out", str(tmp_path / "rows.jsonl")]
    for words, reason in [
        ([*page, "--double", "0.5"], "--double has no effect without --reviewers"),
        ([*page, "--unreviewed"], "--unreviewed has no effect without --collect"),
        ([*rows, "--reviewers", "2"], "--reviewers has no effect with --collect"),
        ([*rows, "--settled-by", "Zoe"], "no export of that name (found: Anna)"),
        ([str(drafts), *rows], "expected --drafts DRAFTS"),
        (["--out", "x"], "0 files of drafts; expected one"),
        ([*page, "--rows", "0"], "--rows 0: expected numbers of rows, 1 to 12"),
        ([*page, "--reviewers", "13"], "only 12 rows"),
        ([*rows[:-1], str(anna)], "that is a file of --collect"),
    ]:
        assert reason in refused_by(corpus.main, ["review", *words], capsys)
    turns = tmp_path / "turns.jsonl"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    turns.write_text(json.dumps({"messages": messages}))
    assert "a conversation" in refused_by(corpus.main, ["review", str(turns), "--out", str(tmp_path / "x")], capsys)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("cluster", "rage", "cluster of row 1 is 'rage'; expected one of"),
        ("strategy", "Shouting", "strategy of row 1 is 'Shouting'; expected one of"),
        ("answer", "half \ud83d", "answer of row 1 holds half of a surrogate pair"),
        ("note", "half \udc00", "note of row 1 holds half of a surrogate pair"),
    ],
)
def test_what_later_steps_would_refuse_is_refused_here(field, value, words, drafts, tmp_path, capsys):
    file = export(tmp_path / "a.json", drafts, "Anna", (1, "decision", "approve"), (1, field, value))
    out = tmp_path / "rows.jsonl"
    line = refused_by(corpus.main, ["review", "--collect", file, "--drafts", drafts, "--out", out], capsys)
    assert str(file) in line and words in line and not out.exists()


def test_where_no_row_passes_no_file_of_rows_is_written(drafts, tmp_path, capsys):
    """train.py, validate and stats would refuse an empty one."""
    file, out = export(tmp_path / "a.json", drafts, "Anna", (1, "decision", "reject")), tmp_path / "rows.jsonl"
    assert run("--collect", file, "--drafts", drafts, "--out", out) == 1
    assert f"no row passed, and {out} was not written" in capsys.readouterr().out and not out.exists()
    assert (tmp_path / "rows.review.md").exists()


def test_an_export_without_reviews_makes_no_file(drafts, tmp_path, capsys):
    file, out = export(tmp_path / "a.json", drafts, "Anna"), tmp_path / "rows.jsonl"
    line = refused_by(corpus.main, ["review", "--collect", file, "--drafts", drafts, "--out", out], capsys)
    assert "a.json: no reviews in it" in line and not out.exists()


def test_one_person_is_one_reviewer_however_the_name_is_typed(drafts, tmp_path, capsys):
    names = ["J\u00f6rg", " Jo\u0308rg ", "Jo\u0308rg"]  # an umlaut of one character, and of two
    files = []
    for row, name in enumerate(names, 1):
        files.append(export(tmp_path / f"{row}.json", drafts, name, (row, "decision", "approve")))
    code, rows = collected(drafts, files, "--settled-by", "Jo\u0308rg ")
    assert code == 0 and len(rows) == 3 and {tuple(row["reviewed_by"]) for row in rows.values()} == {(names[0],)}


def test_warnings_of_another_draft_of_the_same_prompt_are_refused(tmp_path, capsys):
    first, second, issues = tmp_path / "1.jsonl", tmp_path / "2.jsonl", tmp_path / "issues.jsonl"
    for path, answer in ((first, "One."), (second, "Two.")):
        path.write_text(json.dumps({"prompt": "p", "answer": answer}) + "\n")
    assert main_guard(corpus.main, ["check", str(first), "--json", str(issues)]) == 1
    words = ["--warnings", issues, "--out", tmp_path / "pages"]
    assert run(first, *words) == 0
    assert "of another draft of row 1" in refused_by(corpus.main, ["review", second, *words], capsys)
    line = {name: value for name, value in json.loads(issues.read_text()).items() if name != "draft"}
    issues.write_text(json.dumps(line) + "\n")  # as another program writes it
    assert run(second, *words) == 0
    page = tmp_path / "pages" / "review.html"
    page.write_text(issues.read_text())
    words = ["review", second, "--warnings", page, "--out", tmp_path / "pages"]
    assert "a file of --warnings" in refused_by(corpus.main, words, capsys)
