"""benchmarks/generate.py on a model of random weights: all answer alike, and the last line is the result. And the
mistakes of it and of its neighbours.
"""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import contrast, generate, paper, serve
from psysafe.program import main_guard
from tests.mistakes import refused_by

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


@pytest.mark.parametrize(
    ("benchmark", "argv", "message"),
    [
        (contrast, ["--steps", "0"], "argument --steps: '0' is no whole number above 0"),
        (generate, ["--repeats", "0"], "argument --repeats: '0' is no whole number above 0"),
        (serve, ["--requests", "0"], "argument --requests: '0' is no whole number above 0"),
        (paper, ["--layers", "6"], "--layers 6: expected a multiple of 4"),
        (paper, ["--tokens", "1"], "--tokens 1: expected 2 or more"),
        (paper, ["--gpu", "H300"], "argument --gpu: invalid choice"),
    ],
)
def test_mistakes_are_one_line(benchmark, argv, message, capsys):
    assert message in refused_by(benchmark.main, argv, capsys)


def test_prompts_of_a_queue_have_a_token_each(capsys):
    """Around a length of one token they may not become empty."""
    flags = ["--model", f"random:{CONFIG}", "--work", "queue", "--batch", "1", *SMALL, "--prompt-tokens", "1"]
    assert main_guard(generate.main, flags) == 0
