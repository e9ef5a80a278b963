"""Tokens become text while they come: reasoning, what closes it, and an answer that ends before a stop text.

    splitter = TextSplitter(tokenizer, thinking=True, stop=["\n\n"])
    for token in tokens:
        for kind, text in splitter.push(token): ...
    for kind, text in splitter.finish(): ...

The texts joined are what `Tokenizer.decode` makes of all tokens at once, up to a stop. A token may end within a
character, so bytes are decoded, not tokens. A text that may be the beginning of `</think>`, or of a stop, is held back
until that is known.
"""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from psysafe.data.tokenizer import THINK_END, Tokenizer

REASONING, CLOSE, ANSWER = "reasoning", "think_end", "answer"


class Piece(NamedTuple):
    """Some text, never empty, of one kind: REASONING, CLOSE (`</think>`), ANSWER."""

    kind: str
    text: str


class TextSplitter:
    """The pieces of one answer. Stops apply to the answer alone; the one that completes first ends it."""

    def __init__(self, tokenizer: Tokenizer, thinking: bool, stop: Sequence[str] = ()):
        """thinking: the prompt left a think block open."""
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.thinking = thinking  # the think block is open
        self.stopped = False  # a stop text is complete
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, token_id: int) -> list[Piece]:
        """What is certain now of the text. End tokens have none, and nothing comes after a stop."""
        if token_id in self.tokenizer.eos_ids:
            return []
        return self._split(self._decoder.decode(self.tokenizer.token_bytes(token_id)))

    def finish(self) -> list[Piece]:
        """What was held back, once no token follows."""
        pieces = self._split(self._decoder.decode(b"", final=True))
        kind, text, self._held = REASONING if self.thinking else ANSWER, self._held, ""
        return pieces + ([Piece(kind, text)] if text else [])

    def _split(self, text: str) -> list[Piece]:
        """The pieces of what was held back with this text behind it."""
        if self.stopped or not text:
            return []
        pieces, text = [], self._held + text
        if self.thinking:
            reasoning, end, text, self._held = cut(text, [THINK_END])
            pieces, self.thinking = [Piece(REASONING, reasoning), Piece(CLOSE, end)], not end
        if not self.thinking:
            answer, end, _, self._held = cut(text, self.stop)
            pieces, self.stopped = [*pieces, Piece(ANSWER, answer)], end != ""
        return [piece for piece in pieces if piece.text]


def cut(text: str, ends: Sequence[str]) -> tuple[str, str, str, str]:
    """(text before the first end, that end, text after it, ""), or (text, "", "", what may become an end).

    The first end is the one that is complete first; of two that are complete together it is the longer one.
    """
    first = min(((at + len(end), at, end) for end in ends if (at := text.find(end)) >= 0), default=None)
    if first is not None:
        stop, start, end = first
        return text[:start], end, text[stop:], ""
    n_held = max((_overlap(text, end) for end in ends), default=0)
    return text[: len(text) - n_held], "", "", text[len(text) - n_held :]


def _overlap(text: str, end: str) -> int:
    """How many characters at the end of a text begin `end`, without being all of it."""
    sizes = range(min(len(text), len(end) - 1), 0, -1)
    return next((n for n in sizes if text.endswith(end[:n])), 0)
