"""A conversation at a terminal: a notice first, then text as it is generated, with the reasoning dimmed."""

import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from psysafe.data.tokenizer import THINK_END, Message, Tokenizer
from psysafe.files import clusters
from psysafe.generation.generator import TYPED_TOKENS, Answer, Generator
from psysafe.printable import plain

COMMANDS = "/new begins anew, /exit ends"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def ask(generator: Generator, messages: list[Message], row: int = 1) -> Answer:
    """Writes the answer to stdout while it is generated, and returns it."""
    if generator.tokenizer.has_typed_tokens(messages[-1:]):
        print(f"(the prompt holds {TYPED_TOKENS})", file=sys.stderr)
    options = generator.options
    with TextStream(generator.tokenizer, options.thinking, sys.stdout, options.stop) as stream:
        (answer,) = generator.answers([messages], [row], stream)
    if answer.finish_reason == "length":
        print(f"(cut after {answer.new_tokens:,} tokens; see --max-new-tokens, --context)", file=sys.stderr)
    return answer


def chat(generator: Generator, system: str | None) -> None:
    """Answers what is typed until stdin ends; the model sees the whole conversation since /new.

    Ctrl-C stops an answer: its question leaves the conversation, which goes on. At the prompt it ends the program.
    """
    print(f"{notice()}\n\n{COMMANDS} (or Ctrl-D), Ctrl-C stops an answer.")
    start = [] if system is None else [{"role": "system", "content": system}]
    messages, turn = list(start), 0  # the turn names the random numbers of its answer
    for text in _typed():
        if text in ("/exit", "/quit"):
            return
        if text == "/new":
            messages = list(start)
            continue
        if text.startswith("/"):
            print(f"unknown command; {COMMANDS}", file=sys.stderr)
            continue
        turn += 1
        messages.append({"role": "user", "content": text})
        try:
            answer = ask(generator, messages, turn)
        except ValueError as error:  # the conversation outgrew the context
            print(plain(f"{error}, or begin anew with /new"), file=sys.stderr)
            messages.pop()
            continue
        except KeyboardInterrupt:
            # The engine clears what it left in its slots when the next answer begins.
            print("stopped; the conversation goes on without this question", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer.answer, "reasoning_content": answer.reasoning})


def notice() -> str:
    """What everybody who chats should know first. Names and numbers come from clusters.toml, their only source."""
    support = clusters()
    names = support["clusters"]["suicide and selfharm"]["resources"].values()
    services = [support["resources"][name] for name in names]
    crisis = "; ".join(f"{service['country']}: {service['name']}, {service['contact']}" for service in services)
    danger = ", ".join(f"{number} ({country})" for country, number in support["emergency"].items())
    return (
        "This is a language model. It can be wrong, and it is not a substitute for professional care.\n"
        f"In a crisis, people are there for you. {crisis}. In immediate danger: {danger}."
    )


class TextStream:
    """Writes tokens as text, in whole characters only. On a terminal the reasoning is dimmed; elsewhere the text is
    what the model wrote, `</think>` included. An answer is written up to the first of the `stop` texts."""

    def __init__(self, tokenizer: Tokenizer, thinking: bool, out: TextIO, stop: Sequence[str] = ()):
        self.tokenizer, self.out, self.stop, self.pending = tokenizer, out, stop, []
        self.terminal, self.begun, self.thinking = out.isatty(), False, thinking
        self.held, self.stopped = "", False  # what may be the beginning of a stop text, and whether one was there

    def __enter__(self) -> "TextStream":
        return self

    def __call__(self, row: int, token: int) -> None:
        if not self.begun:
            self.out.write(DIM if self.thinking and self.terminal else "")
            self.begun = True
        if token in self.tokenizer.eos_ids:
            return
        if token == self.tokenizer.think_end_id and self.thinking:
            self._flush()
            self.out.write(PLAIN if self.terminal else THINK_END)
            self.thinking = False
            return
        self.pending.append(token)
        # A character may be cut between tokens; its first bytes alone decode to U+FFFD. After 16 tokens it is written
        # as it is: a model may really write U+FFFD, and then no later token would complete it.
        if len(self.pending) >= 16 or not self.tokenizer.decode(self.pending).endswith("\ufffd"):
            self._flush()

    def __exit__(self, *error) -> None:
        if self.begun:
            self._flush()
            self._write(self.held)
            self.out.write((PLAIN if self.thinking and self.terminal else "") + "\n")
            self.out.flush()

    def _flush(self) -> None:
        text = self.tokenizer.decode(self.pending)
        self._write(text if self.thinking else self._before_stop(self.held + text))
        self.pending.clear()

    def _write(self, text: str) -> None:
        self.out.write(plain(text) if self.terminal else text)  # a model may write any text
        self.out.flush()

    def _before_stop(self, text: str) -> str:
        """What of a text can be written: nothing after a stop text, and no end that may become one (`held`)."""
        first = min((text.index(stop) for stop in self.stop if stop in text), default=None)
        beginnings = [stop[:n] for stop in self.stop for n in range(1, len(stop))]
        n_held = max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)
        if self.stopped or first is not None:
            text, n_held = "" if self.stopped else text[:first], 0
            self.stopped = True
        self.held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def _typed() -> Iterator[str]:
    while True:
        try:
            text = input("\n> ").strip()
        except EOFError:
            return
        if text:
            yield text
