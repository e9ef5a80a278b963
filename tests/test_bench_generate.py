"""benchmarks/generate.py on a model of random weights: everybody answers alike, and the last line is the result."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import generate
from psysafe.program import main_guard

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "micro.json"
SMALL = ("--prompt-tokens", "5", "--new-tokens", "4", "--repeats", "1", "--peers", "transformers")


@pytest.mark.parametrize("where", ["random:model.json", "random:below/model.json"])
def test_the_same_answers_as_transformers(where, tmp_path, monkeypatch, capsys):
    """A config named without a folder, too."""
    monkeypatch.chdir(tmp_path)
    file = Path(where.removeprefix("random:"))
    file.parent.mkdir(exist_ok=True)
    shutil.copy(CONFIG, file)
    assert main_guard(generate.main, ["--model", where, "--batch", "2", "--out", "result.json", *SMALL]) == 0
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert Path("result.json").read_text() == last_line + "\n"
    result = json.loads(last_line)
    assert [(row["work"], row["by"]) for row in result["results"]] == [
        (work, by) for work in ("batch", "queue") for by in ("psysafe", "transformers")
    ]
    for row in result["results"]:
        assert row["same_answers"] == 1
        assert row["all"] > 0
