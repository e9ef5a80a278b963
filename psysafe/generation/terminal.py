"""A conversation at a terminal: a notice first, then text as it is generated, with the reasoning dimmed."""

import sys
from collections.abc import Iterator
from typing import TextIO

from psysafe.data.tokenizer import Message
from psysafe.files import clusters
from psysafe.generation.generator import TYPED_TOKENS, Answer, Generator
from psysafe.generation.text import CLOSE, REASONING, Piece
from psysafe.printable import plain

COMMANDS = "/new begins anew, /exit ends"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def ask(generator: Generator, messages: list[Message], row: int = 1) -> Answer:
    """Writes the answer to stdout while it is generated, and returns it."""
    if generator.tokenizer.has_typed_tokens(messages[-1:]):
        print(f"(the prompt holds {TYPED_TOKENS})", file=sys.stderr)
    with TextStream(sys.stdout) as stream:
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
    """Writes the text of one answer piece by piece. On a terminal the reasoning is dimmed; elsewhere the text is what
    the model wrote, `</think>` included."""

    def __init__(self, out: TextIO):
        self.out, self.terminal, self.begun, self.dimmed = out, out.isatty(), False, False

    def __enter__(self) -> "TextStream":
        return self

    def __call__(self, row: int, piece: Piece) -> None:
        self.begun = True
        if self.terminal:
            self._dim(piece.kind == REASONING)
        if not (self.terminal and piece.kind == CLOSE):
            # A model may write any text, also one that steers a terminal.
            self.out.write(plain(piece.text) if self.terminal else piece.text)
        self.out.flush()

    def __exit__(self, error_type: type | None, *error) -> None:
        self._dim(False)
        if self.begun or error_type is None:
            self.out.write("\n")
        self.out.flush()

    def _dim(self, dimmed: bool) -> None:
        if dimmed != self.dimmed:
            self.out.write(DIM if dimmed else PLAIN)
        self.dimmed = dimmed


def _typed() -> Iterator[str]:
    while True:
        try:
            text = input("\n> ").strip()
        except EOFError:
            return
        if text:
            yield text
