"""A folder where a file is to be written, or a file where a folder is: refused in one line, before anything is done.

The rows and models that the commands name are not there: whoever looks for them first says something else.
"""

import argparse
import ast
import datetime
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
JUDGE = ["--judge-url", "http://x.invalid/v1", "--judge-model", "m"]
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


# A file of helplines is somebody's work: no command that reads one may write over it.

# (words before --services FILE, words behind it)
OVER_HELPLINES = {
    "stats": [(["ROWS"], ["--json", "FILE"]), (["ROWS"], ["--plot", "FOLDER"])],
    "check": [(["ROWS"], ["--json", "FILE"]), (["ROWS", *JUDGE], ["--judged", "FILE"])],
    "localise": [(["ROWS"], ["--out", "FILE"])],
    "prompt": [([], ["--out", "FILE"])],
    "write": [(["ROWS", *ENDPOINT], ["--out", "FILE"])],
    "review": [(["ROWS"], ["--out", "FOLDER"])],
}


def test_the_list_has_every_command_that_reads_helplines_and_writes_a_file():
    flags = {}
    for name, module in corpus.COMMANDS.items():
        module.arguments(parser := argparse.ArgumentParser())
        flags[name] = {option for action in parser._actions for option in action.option_strings}
    writes = {"--out", "--json", "--plot", "--judged"}
    wanted = {name: writes & of for name, of in flags.items() if "--services" in of and writes & of}
    assert wanted == {name: {words[0] for _, words in cases} for name, cases in OVER_HELPLINES.items()}


@pytest.mark.parametrize(
    ("name", "before", "behind"), [(name, *case) for name, cases in OVER_HELPLINES.items() for case in cases]
)
def test_no_command_writes_over_a_file_of_helplines(name, before, behind, tmp_path, capsys):
    written = {"review": "review.html", "--plot": "lengths.png"}
    services, rows = tmp_path / written.get(name if name == "review" else behind[0], "DE.toml"), tmp_path / "rows.jsonl"
    text = (ROOT / "tests" / "fixtures" / "services_zz.toml").read_text()
    # Looked up today: entries of more than a year ago would be warned of, too.
    text = text.replace("checked_on = 2026-02-01", f"checked_on = {datetime.date.today()}")
    services.write_text(text)
    rows.write_text('{"prompt": "p", "answer": "a"}\n')
    places = {"ROWS": rows, "FILE": services, "FOLDER": tmp_path}
    words = [places.get(word, word) for word in (*before, "--services", services, *behind)]
    assert "that is a file of --services" in refused_by(corpus.main, [name, *words], capsys)
    assert services.read_text() == text
    # A link to it, and for `write` the file in which it keeps replies.
    if "FILE" in behind:
        link = tmp_path / "link"
        link.symlink_to(services)
        words = [link if word == services and i > len(before) + 1 else word for i, word in enumerate(words)]
        assert "that is a file of --services" in refused_by(corpus.main, [name, *words], capsys)
    if name == "write":
        replies_file = tmp_path / "d.jsonl.replies.jsonl"
        replies_file.write_text(text)
        words = [rows, *ENDPOINT, "--services", replies_file, "--out", tmp_path / "d.jsonl"]
        assert "that is a file of --services" in refused_by(corpus.main, [name, *words], capsys)


@pytest.mark.parametrize("name", [n for n, p in EVALUATIONS.items() if "--services" in p.format_help()])
def test_no_evaluation_writes_into_a_folder_over_a_file_of_helplines(name, tmp_path, capsys):
    services = tmp_path / "result.json"
    services.write_text("x")
    words = [name, *{"selective": ["--prompts", "x"]}.get(name, []), "--services", services]
    if name == "judge":
        words += ["--judge", "rules"]
    line = refused_by(evaluation.main, [*words, "--out", tmp_path], capsys)
    assert "is a file of --services" in line and services.read_text() == "x"
    # A file of the kind that none writes may lie there.
    good = tmp_path / "DE.toml"
    good.write_text("x")
    line = refused_by(evaluation.main, [*words[:-1], good, "--out", tmp_path] if name != "judge" else
                      [name, "--services", good, "--judge", "rules", "--out", tmp_path], capsys)  # fmt: skip
    assert "overwritten" not in line
