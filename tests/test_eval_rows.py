"""Rows of every shape as eval.py judge reads them: as stored answers, and as what a model is asked."""

import json
from pathlib import Path

from psysafe.data.prompts import system_text, with_system
from psysafe.data.rows import prompt_messages, read_prompts
from psysafe.data.tokenizer import load_tokenizer
from psysafe.evaluation import models_under_test
from psysafe.evaluation.benchmarks import four_criteria
from psysafe.evaluation.models_under_test import ModelUnderTest
from psysafe.evaluation.stored import read_answers
from psysafe.files import ASSETS
from psysafe.generation.generator import Generator
from psysafe.generation.ranks import Ranks
from psysafe.journal import Journal
from psysafe.runtime import start
from tests.mistakes import refused

MODEL = f"random:{Path(__file__).parent / 'fixtures' / 'eval' / 'model' / 'config.json'}"


def test_stored_answers_come_in_every_shape_of_rows(tmp_path):
    human, gpt = {"from": "human", "value": "I drink."}, {"from": "gpt", "value": "<think>so</think>I hear you."}
    user, assistant = {"role": "user", "content": "I drink."}, {"role": "assistant", "content": "I hear you."}
    rows = [
        {"question": "I drink.", "answer": "I hear you."},
        {"conversations": [human, gpt]},
        {"prompt": [user], "completion": [assistant]},
        {"instruction": "I drink.", "input": "", "output": "I hear you."},
        {"turns": ["I drink."], "response": "so</think>I hear you."},
        {"prompt": None, "messages": [user, assistant]},
        {"messages": [user, assistant], "prompt": "of another table", "answer": "I hear you."},
    ]
    for row in rows:
        (tmp_path / "stored.jsonl").write_text(json.dumps(row) + "\n")
        stored = read_answers(str(tmp_path / "stored.jsonl"))["stored"]
        assert {prompt: row["answer"] for prompt, row in stored.rows.items()} == {"I drink.": "I hear you."}, row
    # An empty answer beside our own adapter is one: the reasoning in `response` must not take its place.
    ours = {"question": "I drink.", "adapter": "base", "answer": "", "response": "Sure, one could", "reasoning": "Sure"}
    (tmp_path / "stored.jsonl").write_text(json.dumps(ours) + "\n")
    stored = read_answers(str(tmp_path / "stored.jsonl"))["base, None"]
    assert stored.rows["I drink."]["answer"] == "" and stored.unfinished_thinking == {"I drink."}


TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
CALL = [{"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock", "arguments": "{}"}}]},
        {"role": "tool", "content": "ten"}]  # fmt: skip


def test_a_judged_models_conversation_is_that_of_generate(tmp_path, monkeypatch):
    """A row's own system message and tools are sent, and a last answer is not; a tool's answer stays the last turn."""
    written = {"role": "assistant", "content": "It is ten."}
    rows = [{"prompt": "I drink."}, {"prompt": "I drink.", "system": "Be kind."},
            {"question": "I drink.", "system_prompt": "Be brief."},
            {"messages": [*CALL, written, written], "tools": [TOOL]},
            {"messages": [{"role": "user", "content": "Hi"}], "tools": json.dumps([TOOL])}]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_prompts(file)
    encoded = []

    def complete(self, requests, on_token=None):
        encoded.extend(request.ids for request in requests)
        return iter(())

    tokenizer = load_tokenizer(ASSETS / "tiny")
    generator = Generator(None, tokenizer)
    monkeypatch.setattr(Generator, "complete", complete)
    monkeypatch.setattr(Generator, "check", lambda self, requests: None)  # of lengths, which asks the model
    for system in ("none", "v1"):
        variant = models_under_test.Variant("base", system)
        questions = [four_criteria.question_of(row) for row in read]
        with Journal(tmp_path / f"answers-{system}.jsonl") as journal:
            asked = [(variant, question) for question in questions]
            ModelUnderTest(MODEL)._answer(Generator(None, tokenizer), asked, {}, journal, Ranks(start("cpu")))
        text = system_text(system)
        as_generate = [generator.encode(with_system(prompt_messages(row), text), row.tools) for row in read]
        assert encoded == as_generate
        encoded.clear()
    assert len({str(question.identity) for question in questions}) == len({str(q.identity[1:]) for q in questions}) == 5
    assert questions[0] == models_under_test.Question(1, "I drink.")  # as before: stored answers go on counting
    assert [question.prompt for question in questions[:3]] == ["I drink."] * 3
    assert "<function=clock>" in questions[3].prompt and questions[3].prompt.endswith("tool: ten")
    file.write_text(json.dumps({"messages": CALL[:1], "tools": 3}) + "\n")
    refused("row 1.*: tools is 3", four_criteria.question_of, *read_prompts(file))
