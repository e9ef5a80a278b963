"""Imputing over a faulty endpoint: every row answered once, failures listed, a kill forgets nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from psysafe.corpus import impute
from psysafe.corpus.__main__ import main
from psysafe.data.rows import Row, read_rows
from tests.mistakes import refused_by
from tests.stub_endpoint import Handler, StubEndpoint


@pytest.fixture
def endpoint(monkeypatch):
    """Answers with a trace that names the prompt; each prompt first meets its `troubles`, in order."""
    stub = StubEndpoint()
    stub.troubles, stub.answered, stub.delay, stub.keys = {}, Counter(), 0.0, set()

    def do_POST(self):
        prompt = self.request_body()[1].split("\n")[1]
        stub.keys.add(self.headers.get("Authorization"))
        time.sleep(stub.delay)
        trouble = stub.troubles[prompt].pop(0) if stub.troubles.get(prompt) else ""
        if trouble not in ("", "thoughts"):
            return getattr(self, f"do_{trouble}")(trouble)
        stub.answered[prompt] += 1
        self.answer(f"<think>secret</think>\nWhy {prompt}" if trouble else f"Why {prompt}")

    monkeypatch.setattr(Handler, "do_POST", do_POST)
    with stub:
        yield stub


def rows_file(tmp_path, count):
    rows = [{"prompt": f"p{i}", "answer": f"a{i}", "risk cluster": "weapon", "id": i} for i in range(count)]
    rows[1]["reasoning"] = "own"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(path, out, endpoint):
    return ["impute", str(path), "--out", str(out), "--url", endpoint.url, "--model-name", "m", "--workers", "3"]


def test_a_text_that_is_too_long_to_be_meant_is_refused_before_anything_is_sent(tmp_path, endpoint, capsys):
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    long = {"prompt": "p", "answer": "a" * 20_001}
    rows = [{"prompt": "p1", "answer": "a"}, long | {"reasoning": "own"}, long]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = refused_by(main, flags(path, out, endpoint), capsys)
    assert f"{path} row 3 (line 3): the answer has 20,001 characters, some 5,000 tokens" in line
    assert not endpoint.seen and not endpoint.answered and not out.exists()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    assert main(flags(path, out, endpoint)) == 0  # a row with reasoning is not sent


@pytest.mark.parametrize(("flag", "value"), [("--workers", 0), ("--max-tokens", 0), ("--temperature", "nan")])
def test_numbers_that_cannot_be_meant_are_refused(flag, value, tmp_path, endpoint, capsys):
    path, out = rows_file(tmp_path, 2), tmp_path / "out.jsonl"
    line = refused_by(main, [*flags(path, out, endpoint), flag, value], capsys)
    assert f"{flag}: '{value}' is no" in line and not endpoint.answered and not out.exists()


def test_faults_cost_no_row(tmp_path, endpoint, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_not_for_you")
    path, out = rows_file(tmp_path, 8), tmp_path / "out.jsonl"
    endpoint.troubles = {"p0": ["429", "500"], "p2": ["null"], "p3": ["thoughts"], "p4": ["400"]}
    assert main(flags(path, out, endpoint)) == 1
    got = {row.fields["id"]: row.fields for row in read_rows(out)}
    assert got[0]["reasoning"] == "Why p0" and got[3]["reasoning"] == "Why p3" and got[1]["reasoning"] == "own"
    assert "reasoning" not in got[2] and "reasoning" not in got[4]
    printed = capsys.readouterr().out
    assert "row 3 (line 3): no reasoning: the reply has no content" in printed
    assert "row 5 (line 5): no reasoning: HTTP 400" in printed
    # Started again: only the two that failed are asked, and now they answer.
    assert main(flags(path, out, endpoint)) == 0
    assert [row.fields["id"] for row in read_rows(out)] == list(range(8))
    assert all(row.reasoning for row in read_rows(out))
    assert endpoint.answered == {f"p{i}": 1 for i in range(8) if i != 1}
    assert not any("hf_not_for_you" in str(value) for value in endpoint.keys)


@pytest.mark.parametrize("name", ["ALERT", "SORRY-Bench", "sober", " SOBER", "", None, 3, ["SOBER"]])
def test_only_a_known_strategy_becomes_a_hint(name):
    """In the published rows framework_name is the benchmark that the prompt comes from."""
    fields = {"prompt": "p", "answer": "a", "risk cluster": "substance"}
    without, known, other = (
        impute.messages(Row(fields | more, Path("rows.jsonl"), 1))[1]["content"]
        for more in ({}, {"framework_name": "SOBER"}, {"framework_name": name})
    )
    assert without == other == "Request:\np\n\nAnswer:\na"
    assert known == without + "\n\nThe answer follows this intervention: SOBER"


def test_rows_without_a_known_strategy_are_counted(tmp_path, endpoint, capsys):
    more = [{"framework_name": "ALERT"}, {}, {"framework_name": "SOBER"}, {"reasoning": "own"}]
    lines = [json.dumps({"prompt": f"p{i}", "answer": "a"} | fields) + "\n" for i, fields in enumerate(more)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(lines))
    assert main(flags(path, tmp_path / "out.jsonl", endpoint)) == 0
    assert "2 rows without a known strategy in framework_name: asked without that hint" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_and_started_again_asks_no_row_twice(tmp_path, endpoint):
    path, out = rows_file(tmp_path, 30), tmp_path / "out.jsonl"
    endpoint.delay = 0.2
    command = [sys.executable, "-m", "psysafe.corpus", *flags(path, out, endpoint)]
    process = subprocess.Popen(command, env=os.environ)
    while sum(endpoint.answered.values()) < 8:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    time.sleep(0.5)
    under_way = 3  # replies that the killed process had asked for and could not write down
    assert subprocess.run(command, env=os.environ, check=False).returncode == 0
    assert [row.fields["id"] for row in read_rows(out)] == list(range(30))
    assert all(row.reasoning for row in read_rows(out))
    assert sum(endpoint.answered.values()) <= 29 + 2 * under_way
