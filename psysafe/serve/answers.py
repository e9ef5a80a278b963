"""What the server says: completions, whole and as streams of chunks, in OpenAI's shape.

Both forms are made of the same parts, so that a stream, put together, is the whole answer.
"""

import codecs
import json
import secrets
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from psysafe.data.tokenizer import Tokenizer
from psysafe.generation.request import Event
from psysafe.generation.text import ANSWER, REASONING, Piece
from psysafe.serve.protocol import Asked

DONE = b"data: [DONE]\n\n"


class Update(NamedTuple):
    """What became known of one answer: a token and the text that is certain with it, or an error."""

    index: int  # which answer of the request
    event: Event
    pieces: list[Piece]
    in_reasoning: bool  # the token belongs to the reasoning
    finish: str  # "stop", "length" or "error": the last update; "" while it goes on


class Part(NamedTuple):
    """What an update adds to an answer."""

    reasoning: str
    answer: str
    logprobs: list[dict]  # of the tokens of `answer`


class Trimmed:
    """A text without white space at its ends, part by part."""

    def __init__(self):
        self.text, self.pending = "", ""

    def push(self, text: str) -> str:
        """What can be shown now: white space waits for what follows it."""
        text = self.pending + text if self.text else text.lstrip()
        shown = text.rstrip()
        self.pending = text[len(shown) :]
        self.text += shown
        return shown


class Verbatim(Trimmed):
    """A text as it is."""

    def push(self, text: str) -> str:
        self.text += text
        return text


@dataclass
class Choice:
    """One answer, as far as it is known."""

    index: int
    reasoning: Trimmed
    answer: Trimmed
    tokens: int = 0  # all that were generated, an end token included
    reasoning_tokens: int = 0
    finish: str = ""
    logprobs: list[dict] = field(default_factory=list)
    pending: list[dict] = field(default_factory=list)  # logprobs of tokens whose text is not shown yet

    def push(self, update: Update, logprobs: list[dict]) -> Part:
        """Takes up an update. logprobs: of its token, or empty where none are wanted."""
        self.tokens += update.event.token is not None
        self.reasoning_tokens += update.in_reasoning
        self.finish = update.finish
        reasoning = "".join([self.reasoning.push(text) for kind, text in update.pieces if kind == REASONING])
        answers = [text for kind, text in update.pieces if kind == ANSWER]
        answer = "".join(map(self.answer.push, answers))
        # A token is listed once its text is shown. What stays pending at the end is a stop text, or white space.
        self.pending += logprobs
        released = self.pending if answer else []
        # White space before the answer is never shown; half a character, or what may become a stop, will be.
        if answer or (answers and not self.answer.text):
            self.pending = []
        self.logprobs += released
        return Part(reasoning, answer, released)


class Completion:
    """The answers to one request, and how they look."""

    prefix = ""  # of the id
    whole_object = chunk_object = ""
    kind_of_text: type[Trimmed] = Trimmed

    def __init__(self, asked: Asked, tokenizer: Tokenizer):
        self.asked, self.tokenizer = asked, tokenizer
        self.head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": asked.model}
        texts = self.kind_of_text
        self.choices = [Choice(i, texts(), texts()) for i in range(len(asked.prompts) * asked.n)]

    @property
    def is_finished(self) -> bool:
        return all(choice.finish for choice in self.choices)

    def push(self, update: Update) -> dict | None:
        """Takes up an update; the chunk that tells it to a stream, None where it shows nothing."""
        choice = self.choices[update.index]
        wanted = self.asked.logprobs is not None and not update.in_reasoning and update.event.logprob is not None
        part = choice.push(update, [self._logprob(update.event)] if wanted else [])
        if not (part.reasoning or part.answer or update.finish):
            return None
        return self._chunk([self._delta(choice, part)])

    def opening(self) -> list[dict]:
        """Chunks before the first part."""
        return []

    def whole(self) -> dict:
        """The body of an answer that is not streamed."""
        choices = [self._whole_choice(choice) for choice in self.choices]
        return {**self.head, "object": self.whole_object, "choices": choices, "usage": self.usage()}

    def usage_chunk(self) -> dict:
        """A stream's last chunk, with the numbers of tokens and no choice."""
        return self._chunk([]) | {"usage": self.usage()}

    def usage(self) -> dict:
        prompt = sum(map(len, self.asked.prompts))
        new = sum(choice.tokens for choice in self.choices)
        reasoning = sum(choice.reasoning_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        }

    def _chunk(self, choices: list[dict]) -> dict:
        chunk = {**self.head, "object": self.chunk_object, "choices": choices}
        return chunk | ({"usage": None} if self.asked.include_usage else {})

    def _logprob(self, event: Event) -> dict:
        entry = self._token(event.token, event.logprob)
        return entry | {"top_logprobs": [self._token(*likely) for likely in event.top_logprobs or []]}

    def _token(self, token_id: int, logprob: float) -> dict:
        content = self.tokenizer.token_bytes(token_id)
        return {"token": content.decode(errors="replace"), "logprob": logprob, "bytes": list(content)}

    def _delta(self, choice: Choice, part: Part) -> dict:
        raise NotImplementedError

    def _whole_choice(self, choice: Choice) -> dict:
        raise NotImplementedError


class ChatCompletion(Completion):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[dict]:
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": c.index, "delta": delta, "finish_reason": None}]) for c in self.choices]

    def _delta(self, choice: Choice, part: Part) -> dict:
        delta = _reasoning(part.reasoning) if part.reasoning else {}
        delta |= {"content": part.answer} if part.answer else {}
        return {
            "index": choice.index,
            "delta": delta,
            "logprobs": {"content": part.logprobs, "refusal": None} if part.logprobs else None,
            "finish_reason": choice.finish or None,
        }

    def _whole_choice(self, choice: Choice) -> dict:
        message = {"role": "assistant", "content": choice.answer.text, "refusal": None}
        has_logprobs = self.asked.logprobs is not None
        return {
            "index": choice.index,
            "message": message | _reasoning(choice.reasoning.text or None),
            "logprobs": {"content": choice.logprobs, "refusal": None} if has_logprobs else None,
            "finish_reason": choice.finish,
        }


class TextCompletion(Completion):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"
    kind_of_text = Verbatim

    def __init__(self, asked: Asked, tokenizer: Tokenizer):
        super().__init__(asked, tokenizer)
        self.offsets = [Offsets() for _ in self.choices]

    def _delta(self, choice: Choice, part: Part) -> dict:
        offsets = self.offsets[choice.index].push(part.logprobs)
        return self._choice(choice, part.answer, part.logprobs, offsets)

    def _whole_choice(self, choice: Choice) -> dict:
        return self._choice(choice, choice.answer.text, choice.logprobs, self.offsets[choice.index].every)

    def _choice(self, choice: Choice, text: str, logprobs: list[dict], offsets: list[int]) -> dict:
        has_logprobs = self.asked.logprobs is not None
        listed = _columns(logprobs, offsets) if has_logprobs else None
        return {"index": choice.index, "text": text, "logprobs": listed, "finish_reason": choice.finish or None}


class Offsets:
    """Where in the text each token begins, in characters. One that is spread over tokens counts with its last byte."""

    def __init__(self):
        self.every: list[int] = []  # of all tokens so far
        self._next, self._decoder = 0, codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, logprobs: list[dict]) -> list[int]:
        """The offsets of the next tokens."""
        n_before = len(self.every)
        for entry in logprobs:
            self.every.append(self._next)
            self._next += len(self._decoder.decode(bytes(entry["bytes"])))
        return self.every[n_before:]


def _reasoning(text: str | None) -> dict:
    """Under both names that servers have given it: clients read one or the other."""
    return {"reasoning": text, "reasoning_content": text}


def _columns(logprobs: list[dict], offsets: list[int]) -> dict:
    """The table of text completions."""
    return {
        "tokens": [entry["token"] for entry in logprobs],
        "token_logprobs": [entry["logprob"] for entry in logprobs],
        "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in logprobs],
        "text_offset": offsets,
    }


def sse_event(event: dict) -> bytes:
    """An event of a stream (server-sent events), as its bytes."""
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode(errors="replace") + b"\n\n"
