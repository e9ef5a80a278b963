"""What a request may say: every field is used, harmless or refused by name; and whatever comes, the answer is no 500.
Also how a stream and a whole answer are put together."""

# ruff: noqa: F811  (a test's arguments are fixtures, which are imported)

import contextlib
import copy
import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psysafe.generation.request import Event
from psysafe.generation.text import ANSWER, Piece, TextSplitter
from psysafe.serve import protocol
from psysafe.serve.answers import Choice, TextCompletion, Trimmed, Update
from psysafe.serve.fields import ApiError
from psysafe.serve.protocol import HARMLESS, UNSUPPORTED, Asked, Served, read_chat, read_text
from psysafe.serve.setup import default_sampling
from tests.live_server import CHAT, TEXT, config, live_server, model, question, tokenizer  # noqa: F401
from tests.mistakes import refused

SERVED = Served(
    {"base": None, "tuned": "tuned"}, context=100, vocab_size=300, max_rows=6, max_new_tokens=50, max_think_tokens=9,
    sampling={"temperature": 0.6, "top_k": 20},
)  # fmt: skip


def chat(tokenizer, served: Served = SERVED, **fields) -> Asked:
    return read_chat(json.dumps({**question("Hi"), **fields}).encode(), served, tokenizer)


def text(tokenizer, **fields) -> Asked:
    return read_text(json.dumps({"model": "base", "prompt": "Hi", **fields}).encode(), SERVED, tokenizer)


def fault(read, *args, **fields) -> ApiError:
    with pytest.raises(ApiError) as error:
        read(*args, **fields)
    assert error.value.status == 400 and "\n" not in error.value.message
    return error.value


def test_every_field_is_used(tokenizer):
    asked = chat(
        tokenizer, model="tuned", max_completion_tokens=7, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1,
        presence_penalty=0.3, frequency_penalty=-0.2, repetition_penalty=1.1, seed=4, n=2, stop="###", logprobs=True,
        top_logprobs=3, adapter_scale=-0.5, thinking_budget=5, stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    sampling = asked.options.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 5, 0.1)
    penalties = sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty
    assert (penalties, sampling.seed) == ((0.3, -0.2, 1.1), 4)
    assert (asked.model, asked.adapter, asked.adapter_scale) == ("tuned", "tuned", -0.5)
    assert (asked.n, asked.stop, asked.logprobs) == (2, ("###",), 3) and asked.stream and asked.include_usage
    options = asked.options
    assert (options.max_new_tokens, options.max_think_tokens, options.thinking) == (7, 5, True)
    assert options.close_thinking_at_eos


def test_what_holds_where_nothing_is_said(tokenizer):
    asked = read_chat(json.dumps({k: v for k, v in question("Hi").items() if k != "temperature"}).encode(), SERVED,
                      tokenizer)  # fmt: skip
    assert (asked.options.sampling.temperature, asked.options.sampling.top_k) == (0.6, 20)  # the model's own
    assert (asked.options.max_new_tokens, asked.options.max_think_tokens, asked.logprobs) == (50, 9, None)
    assert asked.options.sampling.seed != chat(tokenizer).options.sampling.seed
    served = protocol.replace(SERVED, sampling={"frequency_penalty": 0.5})
    assert chat(tokenizer, served).options.sampling.frequency_penalty == 0.5
    assert chat(tokenizer, max_tokens=1000).options.max_new_tokens == 50  # the server's limit
    assert chat(tokenizer, max_tokens=5, max_completion_tokens=5, top_k=-1).options.sampling.top_k == 0
    assert text(tokenizer).options.max_new_tokens == 16 and not text(tokenizer).options.thinking
    assert text(tokenizer, logprobs=0).logprobs == 0
    assert chat(tokenizer, temperature=1e-9).options.sampling.temperature == 0
    nulls = dict.fromkeys((*protocol.CHAT, *HARMLESS, *UNSUPPORTED))
    assert chat(tokenizer, **(nulls | question("Hi"))).prompts == chat(tokenizer).prompts


def test_what_is_missing_is_called_missing(tokenizer):
    for name, message in (("model", "model is missing, expected one of base, tuned"),
                          ("messages", "messages is missing, expected a list of messages")):  # fmt: skip
        error = fault(chat, tokenizer, **{name: None})
        assert (error.message, error.param, error.code) == (message, name, "missing")


def test_messages(tokenizer):
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert chat(tokenizer, messages=[{"role": "user", "content": parts}]).prompts == chat(tokenizer).prompts
    by_role = [chat(tokenizer, messages=[{"role": role, "content": "Be kind."}, {"role": "user", "content": "Hi"}])
               for role in ("system", "developer")]  # fmt: skip
    assert by_role[0].prompts == by_role[1].prompts != chat(tokenizer).prompts
    served = protocol.replace(SERVED, system="Be kind.")
    assert chat(tokenizer, served).prompts == by_role[0].prompts
    other = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert chat(tokenizer, served, messages=other).prompts == chat(tokenizer, messages=other).prompts
    off = chat(tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert tokenizer.decode(off.prompts[0]).endswith("<think>\n\n</think>\n\n") and not off.options.thinking
    # An answer of ours, as clients send it back.
    message = {"role": "assistant", "content": "a", "refusal": None, "reasoning": "r", "reasoning_content": "r",
               "tool_calls": None, "function_call": None, "audio": None, "annotations": []}  # fmt: skip
    turns = [{"role": "user", "content": "Hi"}, message, {"role": "user", "content": "And?"}]
    assert "a<|im_end|>" in tokenizer.decode(chat(tokenizer, messages=turns).prompts[0])
    # What somebody types is text: no control token.
    typed = chat(tokenizer, messages=[{"role": "user", "content": "<|im_end|>"}]).prompts[0]
    assert typed.count(tokenizer.eos_ids[0]) == 1


BAD = [  # (fields of a chat completion, the field at fault)
    ({"temperature": 3}, "temperature"), ({"temperature": "1"}, "temperature"), ({"temperature": True}, "temperature"),
    ({"temperature": math.nan}, "temperature"), ({"temperature": 10**400}, "temperature"), ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"), ({"top_k": 1.5}, "top_k"), ({"top_k": -2}, "top_k"), ({"min_p": -1}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"), ({"frequency_penalty": []}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"seed": -1}, "seed"), ({"seed": 2**63}, "seed"),
    ({"n": 0}, "n"), ({"n": 7}, "n"), ({"n": True}, "n"), ({"stop": ""}, "stop"), ({"stop": 5}, "stop"),
    ({"stop": ["a"] * 17}, "stop"), ({"stop": ["a", ""]}, "stop"), ({"stop": "a" * 201}, "stop"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 2.0}, "max_tokens"), ({"stream": 1}, "stream"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"logprobs": 2}, "logprobs"), ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs.enable_thinking"),
    ({"chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs.tools"), ({"thinking_budget": 0}, "thinking_budget"),
    ({"chat_template_kwargs": {"enable_thinking": False}, "thinking_budget": 5}, "thinking_budget"),
    ({"adapter_scale": 0.5}, "adapter_scale"), ({"model": "tuned", "adapter_scale": 101}, "adapter_scale"),
    ({"model": 5}, "model"), ({"model": None}, "model"), ({"messages": []}, "messages"), ({"messages": {}}, "messages"),
    ({"messages": None}, "messages"), ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "messages[0].weight"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": "a", "reasoning": "b"}]}, "messages[0].reasoning"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "messages"),
    ({"messages": [{"role": "system", "content": "b"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "long " * 200}]}, "messages"),
    ({"tools": [{"type": "function"}]}, "tools"), ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_schema"}}, "response_format"), ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"modalities": ["audio"]}, "modalities"), ({"audio": {"voice": "x"}}, "audio"),
    ({"reasoning_effort": "low"}, "reasoning_effort"), ({"max_tokns": 5}, "max_tokns"), ({"\ud800": 1}, "?"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: str(value)[:40])
def test_a_field_that_cannot_be_honoured_is_named(tokenizer, fields, param):
    error = fault(chat, tokenizer, **fields)
    assert error.body()["error"]["param"] == param
    json.dumps(error.body(), ensure_ascii=False).encode()


def test_text_completions_name_theirs(tokenizer):
    for fields, param in [
        ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": 5}, "prompt"),
        ({"prompt": [300]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a", [True]]}, "prompt"), ({"prompt": ["a"] * 7}, "prompt"), ({"prompt": ["a"] * 4, "n": 2}, "n"),
        ({"prompt": [1] * 100}, "prompt"), ({"echo": True}, "echo"), ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": True}, "logprobs"), ({"max_completion_tokens": 5}, "max_completion_tokens"),
        ({"messages": []}, "messages"),
    ]:  # fmt: skip
        assert fault(text, tokenizer, **fields).param == param
    assert fault(text, tokenizer, prompt=[1] * 100).code == "context_length_exceeded"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"5", b'"x"', b"\xff\xfe\x00", b"[" * 10**5, b'{"a":' * 10**5,
                                  b'{"n": ' + b"9" * 5000 + b"}", b"\x00" * 100])  # fmt: skip
def test_a_body_that_is_no_request(tokenizer, body):
    with pytest.raises(ApiError) as error:
        read_chat(body, SERVED, tokenizer)
    assert error.value.status == 400


def test_what_a_field_is_called_is_close_to_what_was_meant(tokenizer):
    assert "did you mean temperature?" in fault(chat, tokenizer, temprature=1).message
    for name in HARMLESS:
        assert chat(tokenizer, **{name: {"any": ["thing"]}}).prompts
    for name, nothing in UNSUPPORTED.items():
        for value in nothing:
            assert chat(tokenizer, **{name: value}).prompts


def test_defaults_of_a_model_that_no_request_may_have(tmp_path):
    """They would be every request's fault. Its seed is left out: without one no two requests are alike."""
    config = {"do_sample": True, "temperature": 0.6, "frequency_penalty": 0.5, "seed": 1}
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(config))
    assert default_sampling(tmp_path) == {"temperature": 0.6, "frequency_penalty": 0.5}
    file.write_text(json.dumps(config | {"temperature": 3}))
    refused("generation_config.json: temperature is 3.0, expected a number from 0 to 2", default_sampling, tmp_path)


def test_each_token_of_the_answer_is_listed_also_where_its_text_came_later():
    """The first two are half a character, or what could have become a stop; white space before the answer is no part
    of it, and what stays held back is a stop."""
    choice, texts = Choice(0, Trimmed(), Trimmed()), ["\n", None, None, "Hel", " ", None, "p", None]
    listed = []
    for number, text in enumerate(texts):
        pieces = [] if text is None else [Piece(ANSWER, text)]
        listed += choice.push(Update(0, Event(1, number), pieces, False, ""), [{"token": number}]).logprobs
    assert listed == choice.logprobs == [{"token": number} for number in range(1, 7)]


@settings(max_examples=60)
@given(st.lists(st.text(" \n\tab", max_size=5), max_size=8))
def test_the_parts_of_a_trimmed_text_are_the_trimmed_text(parts):
    trimmed = Trimmed()
    assert "".join(map(trimmed.push, parts)) == trimmed.text == "".join(parts).strip()


# 2,000 mutated bodies against a server that answers

SEEDS = [
    question("Hello", max_tokens=1, n=1, stop=["a"], seed=1, top_p=0.5),
    question("Hello", max_tokens=1, stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=1),
    {"model": "base", "prompt": "Hello", "max_tokens": 1, "temperature": 1, "top_k": 3, "logprobs": 1},
    {"model": "base", "prompt": [[1, 2], [3]], "max_tokens": 1, "n": 2, "presence_penalty": 1},
]  # fmt: skip
VALUES = [
    None, True, 0, -1, 1, 2, 1e308, -1e-308, math.nan, math.inf, 2**64, "", "a", "\ud800", "\x00", [], [[]], {}, [None],
    {"type": "text"}, [{"type": "text", "text": "x"}], "x" * 5000, [0] * 500, {"a": {"a": {"a": []}}},
]  # fmt: skip


def places(value: object) -> list[tuple[object, object]]:
    """Every (container, key) in a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in [(value, key), *places(value[key])]]


def mutated(draw: random.Random) -> tuple[str, bytes]:
    """(path, body): fields changed, dropped, added or moved; sometimes bytes."""
    i = draw.randrange(len(SEEDS))
    body = json.loads(json.dumps(SEEDS[i]))
    for _ in range(draw.choice([0, 1, 1, 2, 3])):
        container, key = draw.choice(places(body))
        kind = draw.randrange(4)
        if kind == 0 and isinstance(container, dict):
            container[draw.choice([*protocol.CHAT, *protocol.TEXT, "role", "content", "x"])] = container.pop(key)
        elif kind == 1:
            del container[key]
        elif kind == 2 and isinstance(container, dict):
            container[draw.choice([*protocol.CHAT, *UNSUPPORTED, *HARMLESS])] = copy.deepcopy(draw.choice(VALUES))
        else:
            container[key] = copy.deepcopy(draw.choice(VALUES))
        if not body:
            break
    content = bytearray(json.dumps(body).encode())
    for _ in range(draw.choice([0] * 9 + [1, 5])):
        content[draw.randrange(len(content))] = draw.randrange(256)
    path = TEXT if (i >= 2) != (draw.random() < 0.1) else CHAT
    return path, bytes(content[: draw.choice([len(content)] * 9 + [len(content) // 2])])


def test_two_thousand_mutated_bodies(model, tokenizer):
    draw, statuses = random.Random(0), []
    with contextlib.ExitStack() as stack:
        live = stack.enter_context(live_server(model, tokenizer, served={"max_new_tokens": 2}))
        line = stack.enter_context(contextlib.closing(live.connect()))
        for _ in range(2000):
            path, body = mutated(draw)
            line.request("POST", path, body, {"content-type": "application/json"})
            response = line.getresponse()
            content = response.read()
            statuses.append(response.status)
            if response.status != 200:
                assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"}
        assert set(statuses) <= {200, 400, 404, 429} and statuses.count(200) > 300, sorted(statuses)
        assert live.worker.is_alive and live.health()["active"] == 0
        assert live.ask(question(max_tokens=2))[0] == 200


def test_a_character_of_several_tokens_moves_no_offset(tokenizer):
    """Streamed as whole. Counted by what each token shows alone, four bytes of an emoji were four characters."""
    answer = "a\u00e9\U0001f642b!"
    ids = tokenizer.encode(answer)
    assert len(ids) == len(answer.encode())  # a token a byte
    splitter, streamed = TextSplitter(tokenizer, thinking=False), []
    completion = TextCompletion(text(tokenizer, logprobs=0), tokenizer)
    for place, token in enumerate(ids):
        finish = "length" if place == len(ids) - 1 else ""
        event = Event(1, token, finish, -1.0, [])
        chunk = completion.push(Update(0, event, splitter.push(token), False, finish))
        streamed += chunk["choices"][0]["logprobs"]["text_offset"] if chunk else []
    (whole,) = completion.whole()["choices"]
    assert whole["text"] == answer
    assert whole["logprobs"]["text_offset"] == streamed == [0, 1, 1, 2, 2, 2, 2, 3, 4]
