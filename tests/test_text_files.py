"""Text files as editors save them: with a byte order mark and Windows line ends."""

import json

import pytest

from psysafe.data.prompts import system_text
from psysafe.data.rows import read_file
from psysafe.evaluation import criteria
from psysafe.evaluation.benchmarks.mmlu import read_folder
from psysafe.evaluation.judge_input import read_instructions
from psysafe.files import read_json
from psysafe.training.config import resolve
from tests.mistakes import refused


def rubric(path, monkeypatch) -> str:
    """The instructions that the judge is sent with --rubric."""
    instructions = read_instructions(path, criteria.own_instructions(), may_be_rubric=True)
    return instructions.messages("p", "a")[0]["content"]


READERS = {  # kind -> (name, content, what is read of it)
    "system prompt": ("s.txt", "Be kind.\n\nListen.", lambda path, _: system_text(str(path))),
    "rubric": ("r.txt", "Be fair.\n\nRead twice.", rubric),
    "configuration": ("run.toml", "lr = 0.5\nepochs = 7\n", lambda path, _: resolve(["--config", str(path)])[0]),
    "JSON": ("config.json", '{"a":\n "b"}', lambda path, _: read_json(path)),
    "rows in JSON": ("rows.json", '[{"prompt":\n "a"}]', lambda path, _: [row.fields for row in read_file(path)]),
    "rows in CSV": ("rows.csv", 'prompt,id\n"a\n\nb",1\n', lambda path, _: [row.fields for row in read_file(path)]),
    "MMLU's own files": ("art_test.csv", "Who?,a,b,c,d,A\n", lambda path, _: read_folder(path.parent)),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(kind, tmp_path, monkeypatch):
    name, content, read = READERS[kind]
    plain, windows = tmp_path / "plain" / name, tmp_path / "windows" / name
    for path, written in ((plain, content), (windows, "\ufeff" + content.replace("\n", "\r\n"))):
        path.parent.mkdir()
        path.write_bytes(written.encode())
    expected, actual = read(plain, monkeypatch), read(windows, monkeypatch)
    assert actual == expected
    assert "\\ufeff" not in json.dumps(str(actual)) and "\r" not in str(actual)


@pytest.mark.parametrize("kind", ["system prompt", "configuration", "JSON", "rubric", "MMLU's own files"])
def test_another_encoding_is_refused_with_the_line(kind, tmp_path, monkeypatch):
    name, _, read = READERS[kind]
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbffirst\ncaf\xe9")
    line = refused("not UTF-8 at line 2 .byte 12.", read, path, monkeypatch)
    assert str(path) in line
