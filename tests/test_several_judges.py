"""Several judges in one run: each says what it says alone, and a table says how far they agree."""

import json
import zlib
from pathlib import Path

import krippendorff
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

import eval as script
from psysafe.evaluation import judge_agreement
from psysafe.journal import Journal
from tests.mistakes import refused_by
from tests.stub_endpoint import Handler, StubEndpoint
from tests.test_eval_judge import reply
from tests.test_eval_refusals import FIXTURES
from tests.test_eval_run import MODEL, run

MODELS = ["org/a", "b"]


@pytest.fixture
def stub(monkeypatch):
    """A server of several models. What one says is a function of its name and of what it is asked; `stub.down` names
    models that refuse every key, `stub.failing` those that give an empty reply to one question in three."""

    def answer(self):
        body, asked = self.request_body()
        model = body["model"]
        self.server.seen.append((model, asked))
        self.server.keys.add(self.headers["authorization"])
        if model in self.server.down:
            return self.send(401, '{"error": "no such key"}')
        n = zlib.crc32(f"{model}{asked}".encode())
        if model in self.server.failing and n % 3 == 0:
            return self.answer(None)
        if asked.endswith("Which class?"):
            return self.answer(("1_full_compliance", "2_full_refusal", "3_partial_refusal", "no idea")[n % 4])
        return self.answer(reply(("Yes" if n % 3 else "No", str(1 + n % 5), "Yes", str(1 + n // 7 % 5))))

    monkeypatch.setattr(Handler, "do_POST", answer)
    with StubEndpoint() as server:
        server.down, server.failing, server.keys = set(), set(), set()
        yield server


@pytest.fixture
def answers(tmp_path):
    """command -> the words of a run over stored answers of two variants, without judges."""
    prompts = [line.split(",")[1] for line in (FIXTURES / "xstest.csv").read_text().splitlines()[1:]]
    rows = [{"prompt": p, "variant": v, "answer": f"I can't {v}", "risk cluster": ("substance", "weapon")[i % 2]}
            for v in ("base", "tuned") for i, p in enumerate(prompts)]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": prompts[0], "answer": "x"}) + "\n")
    stored = ["--answers", str(tmp_path / "a.jsonl"), "--train", str(tmp_path / "train.jsonl")]
    return {"judge": ["judge", *stored], "xstest": ["xstest", "--data", str(FIXTURES / "xstest.csv"), *stored]}


def judges(stub, *models: str) -> list[str]:
    return ["--judge-url", stub.url, *(word for model in models for word in ("--judge-model", model))]


def result_in(folder: Path) -> dict:
    content = json.loads((folder / "result.json").read_text())
    del content["finished"]
    return content


@pytest.mark.parametrize("command", ["judge", "xstest"])
def test_each_judge_says_what_it_says_alone(command, answers, stub, tmp_path):
    together = tmp_path / "together"
    words = answers[command]
    assert run(*words, *judges(stub, *MODELS), "--judge", "rules", "--out", str(together)) == 0
    whole = result_in(together)
    n_asked = len(stub.seen)
    for name, flags in (("org_a", judges(stub, "org/a")), ("b", judges(stub, "b")), ("rules", ["--judge", "rules"])):
        alone = tmp_path / name
        assert run(*words, *flags, "--out", str(alone)) == 0
        # A note names the file of replies, which lies in the common folder.
        own = json.loads(json.dumps(result_in(alone)).replace(f"{alone}/", f"{together}/"))
        assert result_in(together / "judges" / name) == own
        assert (together / "judges" / name / "items.jsonl").read_text() == (alone / "items.jsonl").read_text()
        judge = own["title"].partition(", judged by ")[2]
        common = [dict(table, title=table["title"].removesuffix(f", judged by {judge}")) for table in whole["tables"]]
        assert all(dict(t, title=t["title"].removesuffix(f", judged by {judge}")) in common for t in own["tables"])
    assert whole["title"].startswith(f"{'Four criteria' if command == 'judge' else 'XSTest'}, judged by org/a, b, ")
    assert len(stub.seen) == 2 * n_asked and not (together / "items.jsonl").exists()
    # A second start asks nothing, and says the same.
    assert run(*words, *judges(stub, *MODELS), "--judge", "rules", "--out", str(together)) == 0
    assert len(stub.seen) == 2 * n_asked and result_in(together) == whole
    assert run("report", str(together), "--out", str(tmp_path / "report")) == 0
    assert "Agreement between judges" in (tmp_path / "report" / "report.md").read_text()


def test_answers_that_are_made_here_are_judged_alike(stub, tmp_path):
    """Settings of the models, and the note of a sample, stand in each judge's own result, too."""
    rows = [{"prompt": f"I drink {i}", "risk cluster": "substance"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["judge", "--prompts", str(tmp_path / "rows.jsonl"), "--model", MODEL, "--max-new-tokens", "3",
             "--no-thinking", "--device", "cpu", "--sample-per-cluster", "2"]  # fmt: skip
    assert run(*words, *judges(stub, *MODELS), "--out", str(tmp_path / "both")) == 0
    assert run(*words, *judges(stub, "b"), "--out", str(tmp_path / "alone")) == 0
    alone = json.loads(json.dumps(result_in(tmp_path / "alone")).replace("/alone/", "/both/"))
    assert result_in(tmp_path / "both" / "judges" / "b") == alone
    assert alone["notes"][-1].startswith("sample of 2 prompts per cluster") and alone["settings"]["model"] == MODEL
    whole = result_in(tmp_path / "both")
    assert whole["notes"] == alone["notes"] and whole["settings"]["model"] == MODEL


def test_the_agreement_of_four_criteria_is_scikit_learns(answers, stub, tmp_path):
    assert run(*answers["judge"], *judges(stub, *MODELS), "--out", str(tmp_path / "out")) == 0
    table = next(t for t in result_in(tmp_path / "out")["tables"] if t["title"] == "Agreement between judges")
    lines = [(tmp_path / "out" / "judges" / name / "items.jsonl").read_text().splitlines() for name in ("org_a", "b")]
    a, b = ({(i["variant"], i["prompt"]): i for i in map(json.loads, of_judge)} for of_judge in lines)
    for name, first, second, n, equal, kappa, _, _, quadratic in table["rows"]:
        labels = [[int(of[key][name]) for key in a] for of in (a, b)]
        assert (first, second, n) == ("org/a", "b", 18) and equal == pytest.approx(
            100 * np.mean(np.equal(*labels)))  # fmt: skip
        expected = 1.0 if name == "references" else cohen_kappa_score(*labels)  # every label is one: sklearn has nan
        assert kappa == pytest.approx(expected)
        is_rating = name in ("grounding", "relevance")
        assert quadratic == (pytest.approx(cohen_kappa_score(*labels, weights="quadratic")) if is_rating else None)


def test_people_are_compared_with_one_of_several_judges(answers, stub, tmp_path, capsys):
    """Also where one judge alone was asked there before: its scores are not taken for those of all."""
    assert run(*answers["judge"], *judges(stub, "b"), "--out", str(tmp_path / "out")) == 0
    assert run(*answers["judge"], *judges(stub, *MODELS), "--out", str(tmp_path / "out")) == 0
    prompt = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["prompt"]
    (tmp_path / "people.jsonl").write_text(json.dumps({"prompt": prompt, "variant": "base", "refusal": "Yes"}))
    words = ["agreement", "--human", str(tmp_path / "people.jsonl"), "--out", str(tmp_path / "ag"), "--judged"]
    one = tmp_path / "out" / "judges" / "b"
    capsys.readouterr()
    line = refused_by(script.main, [*words, tmp_path / "out"], capsys)
    assert f"several judges; give one of them, as in --judged {one}" in line
    assert run(*words, str(one)) == 0
    assert result_in(tmp_path / "ag")["settings"]["judge"] == "b"


LABEL = st.none() | st.integers(1, 5)


@settings(max_examples=40)
@given(st.lists(st.tuples(LABEL, LABEL), min_size=2, max_size=30))
def test_kappas_of_ratings_and_classes(pairs):
    """Of what both have rated, also where a rating in the middle never occurs."""
    columns = [{("v", i): pair[side] for i, pair in enumerate(pairs) if pair[side] is not None} for side in (0, 1)]
    names = [{key: f"class {label}" for key, label in column.items()} for column in columns]
    both = [pair for pair in pairs if None not in pair]
    judged = {
        name: {"rating": column, "class": of_names} for name, column, of_names in zip("ab", columns, names, strict=True)
    }
    (table,) = judge_agreement.tables(judged, ratings=["rating"])
    rating, of_class = table.rows
    assert rating[3] == of_class[3] == len(both) and of_class[-1] is None
    if both and len({label for pair in both for label in pair}) > 1:
        first, second = zip(*both, strict=True)
        assert rating[5] == of_class[5] == pytest.approx(cohen_kappa_score(first, second))
        assert rating[-1] == pytest.approx(cohen_kappa_score(first, second, weights="quadratic", labels=range(1, 6)))


def test_three_judges_have_an_alpha(answers, stub, tmp_path):
    assert run(*answers["xstest"], *judges(stub, *MODELS, "c"), "--out", str(tmp_path / "out")) == 0
    tables = {table["title"]: table for table in result_in(tmp_path / "out")["tables"]}
    assert len(tables["Agreement between judges"]["rows"]) == 3
    ((figure, n, nominal),) = tables["Agreement of all judges"]["rows"]
    given = []
    for name in ("org_a", "b", "c"):
        items = (tmp_path / "out" / "judges" / name / "items.jsonl").read_text().splitlines()
        scores = [json.loads(item)["score"] for item in items]
        given.append([np.nan if score == "unknown" else float(score[0]) for score in scores])
    assert (figure, n) == ("verdict", int((np.sum(~np.isnan(given), axis=0) > 1).sum()))
    assert nominal == pytest.approx(krippendorff.alpha(given, level_of_measurement="nominal"))


@pytest.mark.parametrize("command", ["judge", "xstest"])
def test_one_judges_failure_costs_only_its_own_items(command, answers, stub, tmp_path):
    out, words = tmp_path / "out", answers[command]
    stub.failing.add("org/a")
    assert run(*words, *judges(stub, *MODELS), "--out", str(out)) == 1
    failed = result_in(out)["failed"]
    assert failed and all(item.startswith("org/a: ") for item in failed)
    assert not result_in(out / "judges" / "b")["failed"]
    whole = result_in(out / "judges" / "b")["tables"]
    # Its key is taken away: what it had replied stays, the rest has a reason; the other judge has all its own.
    stub.down.add("org/a")
    assert run(*words, *judges(stub, *MODELS), "--out", str(out)) == 1
    assert set(result_in(out)["failed"]) == set(failed)
    assert all("wants another key" in reason for reason in result_in(out)["failed"].values())
    assert result_in(out / "judges" / "b")["tables"] == whole
    fresh = tmp_path / "fresh"
    assert run(*words, *judges(stub, *MODELS), "--out", str(fresh)) == 1
    assert len(result_in(fresh)["failed"]) == 18 and result_in(fresh / "judges" / "b")["tables"] == whole
    stub.down.clear()
    stub.failing.clear()
    assert run(*words, *judges(stub, *MODELS), "--out", str(out)) == 0 and not result_in(out)["failed"]


def test_where_no_judge_can_be_asked_there_is_no_result(answers, stub, tmp_path, capsys):
    stub.down |= {*MODELS}
    words = [*answers["judge"], *judges(stub, *MODELS), "--out", tmp_path / "out"]
    assert run(*map(str, words)) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {stub.url} wants another key")
    assert not (tmp_path / "out" / "result.json").exists()


def test_an_interrupted_run_of_two_judges_goes_on(answers, stub, tmp_path, monkeypatch):
    words = [*answers["xstest"], *judges(stub, *MODELS), "--workers", "1"]
    assert run(*words, "--out", str(tmp_path / "whole")) == 0
    right, lines = Journal.append, []

    def dies(self, key, row):
        lines.append(key)
        if len(lines) in (5, 25):
            raise KeyboardInterrupt
        right(self, key, row)

    monkeypatch.setattr(Journal, "append", dies)
    assert [run(*words, "--out", str(tmp_path / "killed")) for _ in range(3)] == [130, 130, 0]
    assert result_in(tmp_path / "killed")["tables"] == result_in(tmp_path / "whole")["tables"]


def test_two_hosts_get_their_own_keys(answers, stub, tmp_path, monkeypatch):
    monkeypatch.setenv("KEY_A", "sk-of-a")
    monkeypatch.setenv("KEY_B", "sk-of-b")
    with StubEndpoint() as other:
        other.down, other.failing, other.keys = set(), set(), set()
        words = [*judges(stub, "a"), "--judge-key-env", "KEY_A", *judges(other, "b"), "--judge-key-env", "KEY_B"]
        assert run(*answers["judge"], *words, "--out", str(tmp_path / "out")) == 0
        assert (stub.keys, other.keys) == ({"Bearer sk-of-a"}, {"Bearer sk-of-b"})
        assert {model for model, _ in stub.seen} == {"a"} and {model for model, _ in other.seen} == {"b"}


@pytest.mark.parametrize("command", ["judge", "xstest"])
def test_a_judges_own_items_are_not_overwritten(command, answers, stub, tmp_path, capsys):
    words, out = [*judges(stub, *MODELS), "--out", str(tmp_path / "out")], tmp_path / "out"
    assert run(*answers[command], *words) == 0
    items = out / "judges" / "b" / "items.jsonl"
    data = [] if command == "judge" else ["--data", str(FIXTURES / "xstest.csv")]
    line = refused_by(script.main, [command, *data, "--answers", str(items), *words], capsys)
    assert f"{items}: a file of --out {out}, and would be overwritten; give another --out" in line


def test_mistakes(answers, stub, tmp_path, monkeypatch, capsys):
    words, out = answers["judge"], ["--out", tmp_path / "out"]
    twice, two = judges(stub, "a", "a"), ["--judge-url", stub.url, "--judge-url", "http://127.0.0.1:1/v1"]
    for flags, message in (
        (twice, "two judges are called a"),
        (judges(stub, "x/a", "x_a"), "two judges are called x_a"),
        ([*judges(stub, "rules"), "--judge", "rules"], "two judges are called rules"),
        (["--judge", "rules", "--judge", "rules"], "--judge rules stands there twice; give it once"),
        (["--judge-local", "assets:tiny"] * 2, "two judges are called assets_tiny"),
        (
            [*judges(stub, "a"), "--judge-param", "top_p=0.5", "--judge-param", "top_p=0.9"],
            "--judge-param top_p=0.9: top_p stands there twice; give each parameter once",
        ),
        ([*two, "--judge-model", "a"], "2 --judge-url for 1 --judge-model; give one for all, or one for each"),
        ([*judges(stub, "a"), "--judge-key-env", "A", "--judge-key-env", "B"], "2 --judge-key-env for 1 --judge-url"),
    ):
        assert message in refused_by(script.main, [*words, *flags, *out], capsys)
    for command in ("selective --prompts x", "turns"):  # which ask one judge
        for flags, message in (
            ([*judges(stub, "a", "b")], "expected one judge"),
            ([*judges(stub, "a"), "--judge", "rules"], "expected one judge"),
            (["--judge", "rules", "--judge", "rules"], "--judge rules stands there twice; give it once"),
        ):
            assert message in refused_by(script.main, [*command.split(), *flags, *out], capsys)
    # The key of one host is not sent to another one.
    monkeypatch.setenv("PSYSAFE_JUDGE_KEY", "sk-the-first-hosts")
    both = [*two, "--judge-model", "a", "--judge-model", "b"]
    assert "Give --judge-key-env NAME once for each" in refused_by(script.main, [*words, *both, *out], capsys)
    assert not stub.seen
