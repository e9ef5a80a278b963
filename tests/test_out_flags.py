"""A folder where a file is to be written, or a file where a folder is: refused in one line, before anything is done.

The rows and models that the commands name are not there: whoever looks for them first says something else.
"""

import argparse
import ast
from pathlib import Path

import pytest

import eval as evaluation
import generate
import train
from psysafe import paper
from psysafe.checkpoint import __main__ as checkpoint
from psysafe.corpus import __main__ as corpus
from tests.mistakes import refused_by

ROOT = Path(__file__).resolve().parents[1]
EVALUATIONS = next(a for a in evaluation.make_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
ENDPOINT = ["--url", "http://x.invalid/v1", "--model-name", "m"]
# (program, its words, the flag behind them)
FOLDERS = [
    (train.main, [], "--out"),
    (train.main, ["--dry-run"], "--out"),
    *((evaluation.main, [name, *{"selective": ["--prompts", "x"], "report": ["x"]}.get(name, [])], "--out")
      for name in EVALUATIONS),
    (corpus.main, ["split", "x"], "--out"),
    (corpus.main, ["review", "x"], "--out"),
    (corpus.main, ["stats", "x"], "--plot"),
    (checkpoint.main, ["merge", "--adapter", "x"], "--out"),
    (checkpoint.main, ["adapter", "x", "--layout", "text"], "--out"),
]  # fmt: skip
FILES = [
    (generate.main, ["--prompts", "x"], "--out"),
    (corpus.main, ["impute", "x", *ENDPOINT], "--out"),
    (corpus.main, ["contrast", "x"], "--out"),
    (corpus.main, ["localise", "x", "--services", "AU"], "--out"),
    (corpus.main, ["prompt", "--services", "AU"], "--out"),
    (corpus.main, ["write", "x", *ENDPOINT], "--out"),
    (corpus.main, ["review", "--collect", "x", "--drafts", "x"], "--out"),
    *((corpus.main, [*words, "x"], "--json") for words in (["stats"], ["check"], ["leakage", "--held-out"])),
    (checkpoint.main, ["gguf", "--adapter", "x"], "--out"),
    *((paper.main, [], flag) for flag in ("--html", "--svg", "--chrome")),
]


def name_of(value: object) -> str:
    return value.__module__ if callable(value) else " ".join(value) if isinstance(value, list) else str(value)


@pytest.mark.parametrize(("main", "words", "flag"), FOLDERS, ids=name_of)
def test_a_file_where_a_folder_is_wanted(main, words, flag, tmp_path, capsys):
    file = tmp_path / "plain"
    file.write_text("x")
    for place in (file, file / "below"):
        line = refused_by(main, [*words, flag, place], capsys)
        assert f"{file} is a file" in line and ("expected a folder" in line or "choose another folder" in line)
    assert file.read_text() == "x"


@pytest.mark.parametrize(("main", "words", "flag"), FILES, ids=name_of)
def test_a_folder_where_a_file_is_wanted(main, words, flag, tmp_path, capsys):
    line = refused_by(main, [*words, flag, tmp_path], capsys)
    assert str(tmp_path) in line and "a folder; expected the name of a file to write" in line
    file = tmp_path / "plain"
    file.write_text("x")
    if words[:2] != ["review", "--collect"]:  # the system's own line, once there is something to write
        assert f"{file} is a file; expected a folder" in refused_by(main, [*words, flag, file / "below"], capsys)


def unchecked_outs(source: str) -> list[int]:
    """Lines with an argument --out whose type is neither of the two that look at what is there."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args]
    outs = [call for call in calls if isinstance(call.args[0], ast.Constant) and call.args[0].value == "--out"
            and ast.unparse(call.func).endswith(("add", "add_argument"))]  # fmt: skip
    return [call.lineno for call in outs if not any(
        keyword.arg == "type" and ast.unparse(keyword.value) in ("out_file", "out_folder") for keyword in call.keywords
    )]  # fmt: skip


def test_every_out_is_looked_at_when_the_command_is_read():
    paths = [*ROOT.glob("*.py"), *(ROOT / "psysafe").rglob("*.py")]
    unchecked = {str(path.relative_to(ROOT)) for path in paths if unchecked_outs(path.read_text())}
    assert unchecked == {"psysafe/corpus/review.py"}  # a folder, or with --collect a file; both stand above
    assert unchecked_outs('add("--out")\nadd("--out", type=Path)\nadd("--out", type=out_file)') == [1, 2]


def test_what_can_be_written_is_not_refused(tmp_path, capsys):
    """Each command goes on to its rows, which are not there."""
    for place in (tmp_path, tmp_path / "new", tmp_path / "a" / "new"):
        assert "x: cannot be read" in refused_by(corpus.main, ["split", "x", "--out", place], capsys)
    for place in ("new.jsonl", tmp_path / "a" / "new.jsonl", "/dev/null"):
        words = ["localise", "x", "--unchecked", "--services", "AU", "--out", place]
        assert "x: cannot be read" in refused_by(corpus.main, words, capsys)
