"""Benchmark rows from the hub: which files, at which commit, and one line of help where there is no hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

import eval as script
from psysafe.data.rows import read_table
from tests.mistakes import error_line, refused, refused_by
from tests.stub_endpoint import StubEndpoint, reply_by
from tests.test_eval_run import MODEL, run

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures" / "eval"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub's cache in a folder: what each (repository, file) is made of stands in `holds`; what was asked, in
    `asked`."""

    class Hub:
        asked: list[tuple] = []  # noqa: RUF012
        holds: dict[tuple, Path | list | Exception] = {}  # noqa: RUF012

    hub = Hub()
    hub.asked, hub.holds = [], {}

    def download(repository, file, repo_type=None, revision=None):
        hub.asked.append((repository, file, repo_type, revision))
        content = hub.holds[repository, file]
        if isinstance(content, Exception):
            raise content
        path = tmp_path / "hub" / f"datasets--{repository.replace('/', '--')}" / "snapshots" / COMMIT / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            import pyarrow

            parquet.write_table(pyarrow.Table.from_pylist(content), path)
        else:
            path.write_bytes(content.read_bytes())
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return hub


def rows(name: str) -> list[dict]:
    lines = (FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


@pytest.mark.parametrize(
    ("name", "repository", "file"),
    [("mmlu", "cais/mmlu", "all/test-00000-of-00001.parquet"),
     ("hellaswag", "Rowan/hellaswag", "data/validation-00000-of-00001.parquet")],
)  # fmt: skip
def test_parquet_from_the_hub_gives_what_a_local_file_gives(hub, tmp_path, name, repository, file):
    hub.holds[repository, file] = rows(name)
    common = ["--model", MODEL, "--device", "cpu", "--limit", "4"]
    assert run(name, *common, "--out", str(tmp_path / "fetched")) == 0
    assert run(name, *common, "--data", str(FIXTURES / f"{name}.jsonl"), "--out", str(tmp_path / "local")) == 0
    fetched, local = (json.loads((tmp_path / k / "result.json").read_text()) for k in ("fetched", "local"))
    assert fetched["tables"] == local["tables"] and fetched["tables"][0]["rows"][0][1] == 4
    assert hub.asked == [(repository, file, "dataset", None)]
    assert fetched["settings"]["data"] == f"{repository}, {file}"
    assert fetched["settings"]["data revision"] == COMMIT


def test_xstest_from_the_hub(hub, tmp_path):
    hub.holds["Paul/XSTest", "xstest_prompts.csv"] = FIXTURES / "xstest.csv"
    words = ["--model", MODEL, "--device", "cpu", "--max-new-tokens", "2", "--judge", "rules", "--out", str(tmp_path)]
    assert run("xstest", *words, "--data-revision", "main") == 0
    assert hub.asked == [("Paul/XSTest", "xstest_prompts.csv", "dataset", "main")]
    assert json.loads((tmp_path / "result.json").read_text())["settings"]["data revision"] == COMMIT


def test_sorry_bench_takes_all_files_from_one_commit(hub, tmp_path, monkeypatch):
    """The branch is asked once; the other files come from the commit that it named then."""
    for file in ("question.jsonl", "question_question.jsonl"):
        hub.holds["sorry-bench/sorry-bench-202503", file] = FIXTURES / "sorry" / file
    reply_by(monkeypatch, lambda asked: "0")
    with StubEndpoint() as stub:
        words = ["--model", MODEL, "--device", "cpu", "--max-new-tokens", "2", "--no-thinking", "--judge-url", stub.url]
        assert run("sorry-bench", *words, "--judge-model", "j", "--mutations", "question", "--out", str(tmp_path)) == 0
    assert [one[1::2] for one in hub.asked] == [("question.jsonl", None), ("question_question.jsonl", COMMIT)]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["settings"]["data revision"] == COMMIT
    assert result["tables"][1]["rows"] == [["question", "base, none", 6, 0.0]]


class Response:
    headers: dict = {}  # noqa: RUF012
    status_code = 403
    request = None


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (LocalEntryNotFoundError("no connection\nand more"), ["no connection", "--data"]),
        (RepositoryNotFoundError("404 Client Error", response=Response()), ["404 Client Error", "--data"]),
        (GatedRepoError("403", response=Response()), ["gated", "HF_TOKEN", "--data"]),
        (ConnectionError(""), ["ConnectionError", "--data"]),
    ],
    ids=lambda x: type(x).__name__,
)
def test_without_a_hub_one_line_names_data(hub, error, named, tmp_path, capsys):
    hub.holds["Paul/XSTest", "xstest_prompts.csv"] = error
    line = refused_by(script.main, ["xstest", "--judge", "rules", "--out", tmp_path], capsys)
    assert line.startswith("error: Paul/XSTest: ") and all(word in line for word in named)


def test_really_offline(tmp_path):
    """The client's own error in its offline mode, not one that we made up."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, str(ROOT / "eval.py"), "hellaswag", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    line = error_line(done.stdout, done.stderr)
    assert done.returncode == 2 and line.startswith("error: Rowan/hellaswag: ") and "give --data" in line


def test_a_revision_of_a_local_file_is_a_contradiction(tmp_path, capsys):
    words = ["mmlu", "--data", "x.jsonl", "--data-revision", "main", "--out", tmp_path]
    assert "--data-revision" in refused_by(script.main, words, capsys)


def test_parquet_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    broken = tmp_path / "x.parquet"
    broken.write_bytes(b"PAR1 not really")
    refused(r"x\.parquet: cannot be read", read_table, broken, ["question"])
    refused(r"y\.parquet: cannot be read .No such file", read_table, tmp_path / "y.parquet", ["question"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(r"pip install pyarrow.*--data", read_table, broken, ["question"])
