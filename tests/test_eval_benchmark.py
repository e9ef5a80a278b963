"""A new benchmark is one class and one entry in eval.py: a toy one, from its definition to the report."""

import argparse
import json
from pathlib import Path

import pytest

import eval as script
from psysafe.data.rows import read_table
from psysafe.evaluation.benchmark import Benchmark, Item, Judged, Rows
from psysafe.evaluation.comparison import Figure, share
from psysafe.evaluation.result import Table, percent
from tests.mistakes import refused_by
from tests.stub_endpoint import StubEndpoint, reply_by
from tests.test_eval_run import MODEL, run


class Politeness(Benchmark):
    """All that a benchmark has to say of itself."""

    name = "politeness"
    help = "how often an answer is polite"
    title = "Politeness"
    data = ("FILE", "rows with a prompt and a topic")
    rules = "an answer is polite if it says please"
    rules_name = "a search for please"
    note_on_judge = "Politeness is in the eye of the judge."

    def load(self, args: argparse.Namespace, path: Path) -> Rows:
        rows = read_table(path, ["prompt", "topic"])[: args.limit or None]
        items = [Item(f"prompt {number}", row["prompt"], row) for number, row in enumerate(rows, 1)]
        return Rows({"": items}, [item.prompt for item in items])

    def judge_messages(self, item: Item, answer: str) -> list[dict]:
        return [{"role": "user", "content": f"{item.prompt}\n\n{answer}\n\nIs the answer polite? Reply Yes or No."}]

    def parse(self, reply: str) -> bool:
        return reply.strip().lower().startswith("yes")

    def judge_by_rules(self, item: Item, answer: str) -> bool:
        return "please" in answer.lower()

    def tables(self, judged: Judged) -> list[Table]:
        lines = []
        for variant, verdicts in judged.verdicts[""].items():
            known = [polite for polite in verdicts if polite is not None]
            lines.append([variant, len(known), percent(known)])
        return [Table("Polite answers", [("variant", ""), ("n", ","), ("polite %", ".1f")], lines, bars=["polite %"])]

    def figures(self, judged: Judged) -> list[Figure]:
        columns = judged.verdicts[""].items()
        return [share("polite %", {v: {i: p for i, p in enumerate(column) if p is not None} for v, column in columns})]


@pytest.fixture
def politeness(monkeypatch, tmp_path):
    """Its entry in eval.py, and the first words of a command that runs it on three rows."""
    monkeypatch.setattr(script, "EVALUATIONS", [*script.EVALUATIONS, Politeness()])
    rows = [{"prompt": f"question {number}", "topic": "tea"} for number in (1, 2, 3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "Question 2?"}) + "\n")
    words = ["politeness", "--data", str(tmp_path / "rows.jsonl"), "--train", str(tmp_path / "train.jsonl")]
    return [*words, "--model", MODEL, "--device", "cpu", "--max-new-tokens", "3", "--no-thinking",
            "--system", "none,v0"]  # fmt: skip


def test_a_judge_that_fails_once_and_a_second_start(politeness, tmp_path, monkeypatch):
    """Answers of both variants, a failed item by name, notes, overlap, settings; then only what is missing is asked."""
    asked, failing = [], ["question 3"]

    def verdict(text):
        prompt = text.split("\n")[0]
        asked.append(prompt)
        return None if prompt in failing else "Yes" if prompt == "question 1" else "No"

    reply_by(monkeypatch, verdict)
    out = tmp_path / "out"
    with StubEndpoint() as stub:
        words = [*politeness, "--judge-url", stub.url, "--judge-model", "stub", "--out", str(out)]
        assert run(*words) == 1
        result = json.loads((out / "result.json").read_text())
        assert (result["kind"], result["title"]) == ("politeness", "Politeness, judged by stub")
        assert result["tables"][0]["rows"] == [["base, none", 2, 50.0, 0.0], ["base, v0", 2, 50.0, 0.0]]
        intervals, differences = result["tables"][1:]
        assert [row[:4] for row in intervals["rows"]] == [["polite %", v, 2, 50.0] for v in ("base, none", "base, v0")]
        assert [row[:4] + row[-1:] for row in differences["rows"]] == [
            ["polite %", "base, none", "base, v0", 2, "same on every prompt"]]  # fmt: skip
        assert list(result["failed"]) == ["base, none: prompt 3", "base, v0: prompt 3"]
        assert result["notes"] == ["Politeness is in the eye of the judge."]
        assert result["contamination"] == {"prompts": 3, "exact": 0, "normalised": 1}
        assert result["settings"]["judge"] == "stub" and result["settings"]["data"].endswith("rows.jsonl")
        asked.clear()
        failing.clear()
        assert run(*words) == 0
    assert set(asked) == {"question 3"}
    assert json.loads((out / "result.json").read_text())["tables"][0]["rows"][0] == ["base, none", 3, 100 / 3, 0.0]
    assert (out / "answers.jsonl").read_bytes().count(b"\n") == 6
    assert run("report", str(out), "--out", str(tmp_path / "report")) == 0
    assert "Polite answers" in (tmp_path / "report" / "report.md").read_text()


def test_its_rules_and_its_help(politeness, tmp_path, capsys):
    assert run(*politeness, "--judge", "rules", "--out", str(tmp_path / "out")) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["title"] == "Politeness, judged by a search for please" and result["notes"] == []
    assert [row[1] for row in result["tables"][0]["rows"]] == [3, 3]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("politeness", "--help")
    shown = capsys.readouterr().out
    assert "A new benchmark is one class" in shown and "an answer is polite if it says please" in shown


def test_without_data_and_without_a_hub(politeness, tmp_path, capsys):
    assert "--data" in refused_by(script.main, ["politeness", "--judge", "rules", "--out", tmp_path], capsys)
