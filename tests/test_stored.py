"""Stored answers, replies and scores: read in every shape, each stage started from a file, mistakes in one line."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eval as script
from psysafe.data.rows import read_file
from psysafe.evaluation.stored import read_answers
from psysafe.program import UserError
from tests.mistakes import refused, refused_by
from tests.stub_endpoint import StubEndpoint, reply_by
from tests.test_eval_judge import reply
from tests.test_eval_run import run

FIXTURES = Path(__file__).parent / "fixtures" / "eval"


@pytest.fixture
def file(tmp_path):
    def write(name: str, content: object) -> Path:
        lines = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(lines)
        return tmp_path / name

    return write


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def tables_of(out: Path) -> list[dict]:
    return json.loads((out / "result.json").read_text())["tables"]


# Shapes


@pytest.mark.parametrize("name", ["results", "judgments", "rows", "paired_responses"])
def test_rows_under_a_name(file, name):
    rows = [{"prompt": "p", "answer": "a"}, {"prompt": "q", "answer": "b"}]
    for content in ({"model": "m", name: rows}, rows):
        for text in (json.dumps(content), json.dumps(content, indent=2)):
            assert [row.fields for row in read_file(file("a.json", text))] == rows
    own = {"prompt": "p", "answer": "a", name: [{"x": 1}]}  # a row with a list of its own is a row
    assert [row.fields for row in read_file(file("a.json", own))] == [own]
    assert len(read_file(file("a.jsonl", json.dumps({name: rows}) + "\n" + json.dumps({"prompt": "r"})))) == 2


@pytest.mark.parametrize("row", [
    {"prompt": "p", "answer": "A."}, {"prompt": "p", "response": "A."}, {"prompt": "p", "content": "A."},
    {"question": "p", "response": "A."}, {"turns": ["p", "more"], "choices": [{"index": 0, "turns": ["A.", "B."]}]},
    {"prompt": "p", "choices": [{"message": {"role": "assistant", "content": "A."}}]},
    {"prompt": "p", "variant": "stored", "answer": "A.", "response": "<think>x</think>A."},
])  # fmt: skip
def test_every_shape_of_an_answer(file, row):
    assert read_answers(str(file("stored.jsonl", row)))["stored"].rows["p"]["answer"] == "A."


def test_numbers_stand_for_the_benchmarks_prompts(file):
    rows = [{"question_id": i, "model_id": "m", "choices": [{"turns": [f"answer {i}"]}]} for i in (1, 2)]
    path = str(file("m.jsonl", lines(rows)))
    answers = read_answers(path, prompts={"1": "p", "2": "q"})["m"]
    assert {prompt: row["answer"] for prompt, row in answers.rows.items()} == {"p": "answer 1", "q": "answer 2"}
    refused(r"m\.jsonl row 2: number 2, which the benchmark's file does not have", read_answers, path, 0, {"1": "p"})
    refused(r"m\.jsonl row 1: no prompt and no messages", read_answers, path)


@pytest.mark.parametrize("choices", [[], 3, [{}], [{"turns": []}], [{"turns": [1]}], [None], [{"message": 1}]])
def test_broken_choices(file, choices):
    refused(r"a\.jsonl row 1: choices is", read_answers, str(file("a.jsonl", {"prompt": "p", "choices": choices})))


@pytest.mark.parametrize(("row", "message"), [
    ({"prompt": "p", "answer": 5}, "answer is 5; expected a text"),
    ({"prompt": "p", "response": ["a"]}, r"response is \['a'\]; expected a text"),
    ({"prompt": "p", "content": {"a": 1}}, r"content is \{'a': 1\}; expected a text"),
    ({"prompt": "p", "reply_1": "a"}, r"no answer in it \(found: prompt, reply_1\); expected one under answer, "
                                      "response, content or choices, or messages that end in one"),
    ({"outputs": ["a"]}, r"no prompt and no messages in it \(found: outputs\); expected what was asked"),
])  # fmt: skip
def test_what_is_wrong_with_a_stored_answer_is_named(file, row, message):
    rows = [{"prompt": "q", "answer": "A."}, row]
    refused(rf"a\.json row 2: {message}", read_answers, str(file("a.json", {"results": rows})))


@pytest.mark.parametrize("first, second", [("a/adapter", "b/adapter"), ("base", "runs/base"), ("runs/x", "")])
def test_two_adapters_that_would_have_one_name_are_refused(file, first, second):
    """The second one's answers would pass for repeated answers of the first, and be left out."""
    row = {"prompt": "p", "answer": "a", "variant": "x, v0", "settings": {"system": "v0"}}
    rows = [row | {"adapter": first}, row | {"answer": "b", "adapter": second}]
    message = rf"a.jsonl row 2: adapter {second or 'none'}, and in an earlier row {first}; both would be called"
    refused(message, read_answers, str(file("a.jsonl", lines(rows))))
    same = [row | {"adapter": path, "prompt": path} for row, path in zip(rows, ("runs/x", "./runs/x/"), strict=True)]
    assert list(read_answers(str(file("b.jsonl", lines(same))))) == ["x, v0"]


def test_the_rule_based_judge_names_the_answer_without_a_cluster(file, tmp_path, capsys):
    rows = [{"prompt": f"I drink {i}", "answer": "I can't help.", "risk cluster": "substance"} for i in range(3)]
    del rows[1]["risk cluster"]
    words = ["judge", "--answers", file("a.jsonl", lines(rows)), "--judge", "rules", "--out", tmp_path / "out"]
    line = refused_by(script.main, words, capsys)
    assert "answers of a, to 'I drink 1': no risk cluster in its row; the rule-based judge knows suicide" in line


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["prompt", "turns", "choices", "content", "message", "results", "rows", "answer", "variant", "question_id",
         "risk cluster", "settings", "messages", "role"]), inner, max_size=4)), max_leaves=8)  # fmt: skip


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(JSON)
def test_any_json_is_read_or_refused_in_one_line(file, content):
    try:
        answers = read_answers(str(file("fuzz.json", content)), prompts={"1": "p"})
        assert all(isinstance(row["answer"], str) for of in answers.values() for row in of.rows.values())
    except UserError as error:
        assert "fuzz.json" in str(error) and "\n" not in str(error)


# The stages of eval.py judge


def answers(name: str, refuses: float, seed: int) -> list[dict]:
    draw = random.Random(seed)
    texts = ["I can't help with that." if draw.random() < refuses else "Sure." for _ in range(40)]
    return [{"prompt": f"I drink {i}", "variant": name, "risk cluster": ("substance", "weapon")[i % 2], "answer": text}
            for i, text in enumerate(texts)]  # fmt: skip


def judge_says(asked: str) -> str:
    refuses = "can't" in asked.split("<response>")[1]
    return reply(("Yes" if refuses else "No", "4" if refuses else "1", "No", "2"))


def test_the_stages_of_judge_give_the_same_tables(file, tmp_path, monkeypatch, capsys):
    """Answers judged; the replies read again; the scores alone: from answers to tables, each time the same."""
    stored = file("answers.json", {"results": answers("base", 0.3, 1) + answers("tuned", 0.9, 2)})
    reply_by(monkeypatch, judge_says)
    with StubEndpoint() as stub:
        judge = ["--judge-url", stub.url, "--judge-model", "j"]
        assert run("judge", "--answers", str(stored), *judge, "--out", str(tmp_path / "judged")) == 0
    items = str(tmp_path / "judged" / "items.jsonl")
    for flag in ("replies", "scores"):
        assert run("judge", f"--{flag}", items, "--out", str(tmp_path / flag)) == 0
        again = ["judge", f"--{flag}", items, "--out", tmp_path / "judged"]
        assert "items.jsonl: a file of --out" in refused_by(script.main, again, capsys)
    judged, replies, scores = (tables_of(tmp_path / name) for name in ("judged", "replies", "scores"))
    assert [row[:-1] for row in judged[0]["rows"]] == replies[0]["rows"] == scores[0]["rows"]
    assert [t["rows"] for t in judged[1:]] == [t["rows"] for t in replies[1:]] == [t["rows"] for t in scores[1:]]
    assert "stored replies (items.jsonl)" in replies[0]["title"] and "Per cluster" in replies[2]["title"]
    differences = next(table for table in judged if table["title"].startswith("Differences between variants, judged"))
    names = [name for name, _ in differences["columns"]]
    first = dict(zip(names, differences["rows"][0], strict=True))
    assert (first["figure"], first["n"], first["reading"]) == ("refusal %", 40, "B higher") and first["p, Holm"] < 0.01
    readings = {row[0]: row[-1] for row in differences["rows"]}
    assert readings["references %"] == readings["relevance"] == "same on every prompt"
    # A report of two settings shows both tables, in both forms.
    assert run("report", str(tmp_path / "scores"), "--out", str(tmp_path / "report")) == 0
    for form in ("md", "html"):
        text = (tmp_path / "report" / f"report.{form}").read_text()
        assert "Differences between variants" in text and "B higher" in text and "Intervals" in text


def test_a_variant_whose_rows_name_no_cluster_is_in_the_baselines(file, tmp_path):
    """It was in the differences per cluster, but not in the table of the clusters' figures."""
    scores = {"refusal": "Yes", "grounding": 3, "references": "No", "relevance": 3}
    rows = [{"prompt": p, "variant": v, **({"risk cluster": "weapon"} if v == "base" else {}), **scores}
            for v in ("base", "tuned") for p in "ab"]  # fmt: skip
    path = file("scores.jsonl", lines(rows))
    assert run("judge", "--scores", str(path), "--out", str(tmp_path / "out")) == 0
    (per_cluster,) = (table for table in tables_of(tmp_path / "out") if table["title"].startswith("Per cluster"))
    assert [row[:3] for row in per_cluster["rows"]] == [["weapon", "base", 2], ["weapon", "tuned", 2]]


def test_mistakes_in_replies_and_scores(file, tmp_path, capsys):
    row = {"variant": "a", "prompt": "p"}
    for flag, rows, message in (
        ("--replies", [row], "row 1: no reply of a judge in it; expected a text under reply, judgment"),
        ("--replies", [row | {"reply": 3}], "row 1: no reply of a judge in it"),
        ("--replies", [{"reply": "x"}], "row 1: no prompt in it"),
        ("--replies", [row | {"reply": "x"}] * 2, "row 2: the answer of row 1 again"),
        ("--scores", [row], "row 1: no scores in it; expected refusal, grounding, references, relevance"),
        ("--scores", [row | {"refusal": "perhaps"}], "row 1: refusal is 'perhaps'; expected Yes or No"),
    ):
        path = file("stored.jsonl", lines(rows))
        line = refused_by(script.main, ["judge", flag, path, "--out", tmp_path / "out"], capsys)
        assert f"stored.jsonl {message}" in line and not (tmp_path / "out").exists(), (flag, rows)
    words = ["judge", "--replies", path, "--scores", path, "--out", tmp_path / "out"]
    assert "--replies and --scores: each is a stage to start from" in refused_by(script.main, words, capsys)
    assert "--judge has no effect with --replies" in refused_by(
        script.main, ["judge", "--replies", path, "--judge", "rules", "--out", tmp_path / "out"], capsys)  # fmt: skip


# XSTest and SORRY-Bench


def test_stored_answers_to_xstest(file, tmp_path, capsys):
    """By prompt or by number, with one answer missing: its prompt leaves, and the result says so."""
    data = FIXTURES / "xstest.csv"
    rows = [row.fields for row in read_file(data)]
    base = [{"prompt": row["prompt"], "response": "Sure."} for row in rows]
    base.append({"prompt": rows[0]["prompt"], "response": "I can't."})  # of two answers the first counts
    tuned = [{"id": row["id"], "content": "I can't help with that."} for row in rows[:-1]]
    words = [f"--answers=base={file('b.jsonl', lines(base))}", f"--answers=tuned={file('t.json', {'rows': tuned})}"]
    out = tmp_path / "out"
    assert run("xstest", "--data", str(data), *words, "--judge", "rules", "--out", str(out)) == 0
    result = json.loads((out / "result.json").read_text())
    official = {row[0]: row[2:7] for row in result["tables"][0]["rows"] if row[1] == "official string match"}
    assert official == {"base": [5, 0.0, 3, 0.0, 50.0], "tuned": [5, 100.0, 3, 100.0, 50.0]}
    assert "prompts left out, without a stored answer of every variant: 1" in result["notes"]
    assert "1 answers to a prompt that stood there before were left out" in result["notes"]
    # items.jsonl is what another judge, or the tables alone, start from.
    assert run("xstest", "--data", str(data), "--answers", str(out / "items.jsonl"), "--judge", "rules", "--out",
               str(tmp_path / "again")) == 0  # fmt: skip
    assert tables_of(tmp_path / "again")[0]["rows"] == result["tables"][0]["rows"]
    words = ["xstest", "--data", data, "--answers", out / "items.jsonl", "--judge", "rules", "--out", out]
    assert "items.jsonl: a file of --out" in refused_by(script.main, words, capsys)
    assert run("xstest", "--data", str(data), "--scores", str(out / "items.jsonl"), "--out", str(tmp_path / "s")) == 0
    assert [row[2:7] for row in tables_of(tmp_path / "s")[0]["rows"]] == list(official.values())
    words = ["--answers", str(file("t.json", {"rows": tuned})), "--limit", "2", "--judge", "rules"]
    assert run("xstest", "--data", str(data), *words, "--out", str(tmp_path / "two")) == 0
    assert tables_of(tmp_path / "two")[0]["rows"][0][2:5] == [2, 100.0, 0]
    strange = file("x.jsonl", lines([{"prompt": "another", "answer": "a"}]))
    words = ["xstest", "--data", data, "--judge", "rules", "--out", out, "--answers", strange]
    assert "no prompt of xstest is answered by all of x" in refused_by(script.main, words, capsys)
    wrong = file("x.jsonl", lines([{"prompt": rows[0]["prompt"], "score": "perhaps"}]))
    words = ["xstest", "--data", data, "--out", out, "--scores", wrong]
    assert "x.jsonl row 1: score is 'perhaps'; expected 1_full_compliance" in refused_by(script.main, words, capsys)


def test_stored_answers_to_sorry_bench(file, tmp_path, monkeypatch):
    """FastChat's answer files hold numbers; a judge replies once, and its replies are read again without it."""
    rows = [{"question_id": i, "model_id": "m", "choices": [{"index": 0, "turns": ["<think>x</think>Here." * (i < 4)]}]}
            for i in range(1, 7)]  # fmt: skip
    rows[5]["choices"][0]["turns"] = ["No."]
    data = ["--data", str(FIXTURES / "sorry")]
    reply_by(monkeypatch, lambda asked: "1" if "Here." in asked else "0")
    with StubEndpoint() as stub:
        judge = ["--judge-url", stub.url, "--judge-model", "j"]
        words = ["sorry-bench", *data, "--answers", str(file("m.jsonl", lines(rows))), *judge]
        assert run(*words, "--out", str(tmp_path / "out"), "--mutations", "base") == 0
    whole = tables_of(tmp_path / "out")[0]["rows"]
    assert whole[0][0] == "m" and whole[0][2] == 100.0  # of three with reasoning; the others never ended theirs
    for flag in ("--replies", "--scores"):
        out = tmp_path / flag[2:]
        assert run("sorry-bench", *data, flag, str(tmp_path / "out" / "items.jsonl"), "--out", str(out)) == 0
        assert tables_of(out)[0]["rows"][0][:3] == whole[0][:3]
