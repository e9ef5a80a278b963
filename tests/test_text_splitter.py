"""The text of an answer, token by token, against decode and partition of all its tokens at once: 6,000 random cases."""

import random

import pytest

from psysafe.data.tokenizer import THINK_END, Tokenizer, load_tokenizer
from psysafe.files import ASSETS
from psysafe.generation import text
from psysafe.generation.text import ANSWER, CLOSE, REASONING, TextSplitter
from tests.tiny_text_model import byte_tokenizer

# What is hard: beginnings of `</think>`, characters of two to four bytes, and the one that stands for broken ones.
PARTS = ["<", "</", "</think", THINK_END, "think>", "a", "b", "ab", " ", "\n\n", "END", "<|im_start|>"]
PARTS += ["ö", "\ufffd", "𝄞", "é\u0301"]
BYTES = [b"\xc3", b"\xb6", b"\xf0\x9d\x84", b"\x9e", b"\xff", b"\xed\xa0", b"\x80"]


@pytest.fixture(scope="module")
def tokenizers() -> list[Tokenizer]:
    """One of single bytes, and the bundled one."""
    return [Tokenizer(byte_tokenizer()), load_tokenizer(ASSETS / "tiny")]


@pytest.fixture(scope="module")
def id_of_bytes(tokenizers) -> dict[bytes, int]:
    return {tokenizers[0].token_bytes(token): token for token in range(tokenizers[0].vocab_size)}


def cases(tokenizers, id_of_bytes, count):
    """(tokenizer, ids, thinking, stops)."""
    for seed in range(count):
        draw = random.Random(seed)
        tokenizer, ids = tokenizers[seed % 2], []
        for _ in range(draw.randint(0, 12)):
            if tokenizer is tokenizers[0] and draw.random() < 0.3:
                ids += [id_of_bytes[bytes([byte])] for byte in draw.choice(BYTES)]
            elif draw.random() < 0.2:
                ids.append(draw.randrange(tokenizer.vocab_size))  # of the bundled one: any part of a character
            elif draw.random() < 0.2:
                ids.append(tokenizer.think_end_id)
            else:
                ids += tokenizer.encode("".join(draw.choices(PARTS, k=draw.randint(1, 3))))
        written, stops = tokenizer.decode(ids), []
        for _ in range(draw.randint(0, 3)):  # mostly what is there, so that they overlap
            start = draw.randint(0, len(written))
            stops.append(written[start : start + draw.randint(1, 6)] or draw.choice(PARTS))
        yield tokenizer, ids, draw.random() < 0.6, stops


def expected(tokenizer, ids, thinking, stops):
    """{kind: text}, and whether a stop was there."""
    written = tokenizer.decode([token for token in ids if token not in tokenizer.eos_ids])
    reasoning, close, answer = written.partition(THINK_END) if thinking else ("", "", written)
    ends = [(answer.index(stop) + len(stop), answer.index(stop)) for stop in stops if stop in answer]
    return {REASONING: reasoning, CLOSE: close, ANSWER: answer[: min(ends)[1]] if ends else answer}, bool(ends)


def joined(pieces) -> dict[str, str]:
    assert all(piece.text for piece in pieces)
    kinds = [piece.kind for piece in pieces]
    assert kinds == sorted(kinds, key=[REASONING, CLOSE, ANSWER].index)
    return {kind: "".join(piece.text for piece in pieces if piece.kind == kind) for kind in (REASONING, CLOSE, ANSWER)}


def check(tokenizers, id_of_bytes, count, start=TextSplitter):
    """Nothing missing, nothing too much, also of what has been handed out before the end is known."""
    n_stopped = n_closed = 0
    for tokenizer, ids, thinking, stops in cases(tokenizers, id_of_bytes, count):
        splitter, pieces = start(tokenizer, thinking, stops), []
        whole, has_stop = expected(tokenizer, ids, thinking, stops)
        for token in ids:
            pieces += splitter.push(token)
            so_far = joined(pieces)
            assert all(whole[kind].startswith(so_far[kind]) for kind in whole), (ids, stops, so_far, whole)
        pieces += splitter.finish()
        assert joined(pieces) == whole, (ids, stops)
        assert splitter.stopped == has_stop and splitter.thinking == (thinking and not whole[CLOSE])
        assert splitter.finish() == []
        n_stopped, n_closed = n_stopped + has_stop, n_closed + bool(whole[CLOSE])
    return n_stopped, n_closed


def test_the_pieces_are_decode_and_partition(tokenizers, id_of_bytes):
    n_stopped, n_closed = check(tokenizers, id_of_bytes, 6000)
    print(f"{n_stopped:,} stopped, {n_closed:,} closed")
    assert n_stopped > 1000 and n_closed > 1000


class NaiveReplacement(TextSplitter):
    """Waits while the last character is U+FFFD: a real one holds up what follows, then breaks it."""

    def __init__(self, *args):
        super().__init__(*args)
        self.pending = []

    def push(self, token_id):
        if token_id in self.tokenizer.eos_ids:
            return []
        self.pending.append(token_id)
        written = self.tokenizer.decode(self.pending)
        if written.endswith("\ufffd") and len(self.pending) < 4:
            return []
        self.pending.clear()
        return self._split(written)

    def finish(self):
        return self._split(self.tokenizer.decode(self.pending)) + super().finish()


class StopsEverywhere(TextSplitter):
    """Stops apply to the reasoning, too."""

    def _split(self, written):
        if self.thinking and any(stop in self._held + written for stop in self.stop):
            self.stopped = True
        return super()._split(written)


class LosesBytes(TextSplitter):
    """Bytes of a broken character before `</think>` are dropped."""

    def push(self, token_id):
        if token_id == self.tokenizer.think_end_id:
            self._decoder.reset()
        return super().push(token_id)


@pytest.mark.parametrize("wrong", [NaiveReplacement, StopsEverywhere, LosesBytes])
def test_a_wrong_splitter_is_caught(wrong, tokenizers, id_of_bytes):
    with pytest.raises(AssertionError):
        check(tokenizers, id_of_bytes, 6000, wrong)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("_overlap", lambda text, end: 0),  # nothing is held back
        ("_overlap", lambda text, end: len(end) - 1 if text.endswith(end[:-1]) else 0),  # only all but the last
        ("cut", lambda text, ends, right=text.cut: right(text, ends[:1])),
        ("cut", lambda text, ends, right=text.cut: right(text, sorted(ends, key=text.find)[-1:] or ends)),
    ],
)
def test_a_wrong_cut_is_caught(name, wrong, tokenizers, id_of_bytes, monkeypatch):
    monkeypatch.setattr(text, name, wrong)
    with pytest.raises(AssertionError):
        check(tokenizers, id_of_bytes, 6000)


def test_no_more_is_held_back_than_may_become_an_end(tokenizers):
    tokenizer, seen = tokenizers[0], []
    splitter = TextSplitter(tokenizer, False, ["END", "Nö"])
    for token in tokenizer.encode("an ENemy <EN"):
        seen.append("".join(piece.text for piece in splitter.push(token)))
    assert seen == ["a", "n", " ", "", "", "ENe", "m", "y", " ", "<", "", ""]
    assert [piece.text for piece in splitter.finish()] == ["EN"]


def test_the_stop_that_is_complete_first_ends_the_answer(tokenizers):
    """Of two that are complete together the longer one does, so that nothing of it is left."""
    for stops, answer in ((["abcd", "bc"], "xa"), (["bcd", "abcd"], "x"), (["cd", "d"], "xab"), (["dx", "cd"], "xab")):
        for tokenizer in tokenizers:
            splitter = TextSplitter(tokenizer, False, stops)
            pieces = [piece for token in tokenizer.encode("xabcdx") for piece in splitter.push(token)]
            assert joined(pieces + splitter.finish())[ANSWER] == answer and splitter.stopped


def test_a_character_after_a_real_replacement_character_is_whole(tokenizers):
    """At a terminal one used to be written in broken bytes."""
    tokenizer, written = tokenizers[0], "\ufffd" * 6 + "ö𝄞"
    splitter = TextSplitter(tokenizer, False)
    pieces = [piece.text for token in tokenizer.encode(written) for piece in splitter.push(token)]
    assert pieces == list(written)


def test_the_bytes_of_all_tokens_are_those_of_decode(tokenizers):
    for tokenizer in tokenizers:
        for token in range(tokenizer.vocab_size):
            assert tokenizer.token_bytes(token).decode(errors="replace") == tokenizer.decode([token])
        assert tokenizer.token_bytes(tokenizer.vocab_size + 9) == b""
