"""eval.py turns with models: turn by turn after their own words, killed and started again, stored and read again."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

import eval as script
from psysafe import load_model
from psysafe.checkpoint.adapter import save_adapter
from psysafe.evaluation import result as results
from psysafe.evaluation.conversations import BENIGN, RISKY, Conversation, compared, in_turns
from psysafe.evaluation.models_under_test import ModelUnderTest
from psysafe.files import ASSETS
from psysafe.journal import Journal
from psysafe.model.lora import attach
from psysafe.program import main_guard
from tests.test_eval_run import MODEL
from tests.test_turns import items, rows_of, tables_of, write


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Of a random model: one that changes what it writes."""
    adapters = attach(load_model(MODEL), 1, 4.0)
    adapters.param.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("adapter") / "x"
    save_adapter(adapters, folder, MODEL, multimodal=False)
    return folder


@pytest.fixture
def prompts(tmp_path):
    write(tmp_path / "prompts.jsonl", rows_of())
    return ["turns", "--prompts", str(tmp_path / "prompts.jsonl"), "--judge", "rules", "--device", "cpu"]


def generate(prompts: list[str], adapter: Path, out: Path) -> int:
    model = ["--adapter", "base", "--adapter", str(adapter), "--no-thinking", "--max-new-tokens", "4"]
    return main_guard(script.main, [*prompts, *model, "--out", str(out)])


def test_killed_within_the_second_turn_it_goes_on(prompts, adapter, tmp_path, monkeypatch):
    """Two variants, 7 + 7 + 5 + 1 turns each. The same answers, items and tables as uninterrupted, and none twice."""
    loads = []
    load = ModelUnderTest.load
    monkeypatch.setattr(ModelUnderTest, "load", lambda self, *args: loads.append(1) or load(self, *args))
    assert generate(prompts, adapter, tmp_path / "whole") == 0 and len(loads) == 1
    lines = [json.loads(line) for line in (tmp_path / "whole" / "answers.jsonl").read_text().splitlines()]
    assert Counter(line["prompt"].count("assistant: ") for line in lines) == {0: 14, 1: 14, 2: 10, 3: 2}
    right, n_written = Journal.append, []

    def dies(self, key, row):
        n_written.append(key)
        if len(n_written) in (20, 30):  # in turn 2, and in turn 3
            raise KeyboardInterrupt
        right(self, key, row)

    monkeypatch.setattr(Journal, "append", dies)
    assert [generate(prompts, adapter, tmp_path / "killed") for _ in range(3)] == [130, 130, 0]
    assert items(tmp_path, "killed") == items(tmp_path, "whole")
    assert tables_of(tmp_path, "killed") == tables_of(tmp_path, "whole")
    assert len(n_written) == 42 and len(set(n_written)) == 40
    loads.clear()
    assert generate(prompts, adapter, tmp_path / "killed") == 0 and not loads


def test_each_variant_answers_after_its_own_words(prompts, adapter, tmp_path):
    assert generate(prompts, adapter, tmp_path / "out") == 0
    said = {(item["variant"], item["row"], item["turn"]): item for item in items(tmp_path)}
    for (variant, number, turn), item in said.items():
        earlier = [said[variant, number, t] for t in range(1, turn)]
        texts = rows_of()[number - 1]["turns"]
        pairs = [f"user: {text}\n\nassistant: {one['answer']}\n\n" for text, one in zip(texts, earlier, strict=False)]
        assert item["prompt"] == ("".join(pairs) + f"user: {texts[turn - 1]}" if turn > 1 else texts[0])
    assert said["base, none", 1, 1]["answer"] != said["x, none", 1, 1]["answer"]


@pytest.mark.parametrize("file", ["items.jsonl", "answers.jsonl"])
def test_what_it_writes_are_stored_answers(file, prompts, adapter, tmp_path):
    assert generate(prompts, adapter, tmp_path / "out") == 0
    stored = ["turns", *prompts[1:5], "--answers", str(tmp_path / "out" / file), "--out", str(tmp_path / "again")]
    assert main_guard(script.main, stored) == 0
    assert tables_of(tmp_path, "again") == tables_of(tmp_path)


def test_the_miniature(tmp_path):
    """The bundled base on three bundled conversations. It refuses some, and no first answer has support."""
    words = ["turns", "--limit", "3", "--max-new-tokens", "60", "--judge", "rules", "--device", "cpu"]
    train = ["--train", str(ASSETS / "rows" / "train.jsonl")]
    assert main_guard(script.main, [*words, *train, "--out", str(tmp_path / "out")]) == 0
    result = results.load(tmp_path / "out")[0]
    assert result.tables[0].rows[0][:3] == ["base, none", 3, 0]
    assert result.contamination == {"prompts": 9, "exact": 0, "normalised": 0}
    assert not any("Differences" in table.title for table in result.tables)


def test_nothing_is_asked_after_reasoning_without_end():
    """Of two variants one does not end its reasoning in the first turn of one conversation: the other goes on."""
    said = [Conversation(n, "weapon", (f"a{n}", f"b{n}"), (RISKY, BENIGN)) for n in (1, 2)]
    asked_by_turn = []

    def answer(asked):
        asked_by_turn.append({name: dict(of) for name, of in asked.items()})
        first = len(asked_by_turn) == 1
        never_ended = {("x", 1)} if first else set()
        return {name: {i: {"answer": "No.", "unfinished_thinking": (name, i) in never_ended} for i in of}
                for name, of in asked.items()}  # fmt: skip

    answers = in_turns(said, ["base", "x"], answer)
    assert {name: list(of) for name, of in asked_by_turn[1].items()} == {"base": [0, 1], "x": [0]}
    assert [message["content"] for message in asked_by_turn[1]["base"][1]] == ["a2", "No.", "b2"]
    assert len(answers) == 7
    assert [one.key for one in compared(answers, 2)] == [("base", 1, 1), ("base", 1, 2), ("x", 1, 1), ("x", 1, 2)]


def test_where_no_first_answer_ended_nothing_is_compared(prompts, tmp_path, capsys):
    words = [*prompts, "--model", MODEL, "--max-new-tokens", "3", "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert main_guard(script.main, words) == 2
    assert "nothing to compare between base, none: no first turn has a finished answer" in capsys.readouterr().err
