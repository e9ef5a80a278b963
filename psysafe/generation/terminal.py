"""A conversation at a terminal: a notice first, then text as it is generated, with the reasoning dimmed."""

import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from psysafe import helplines
from psysafe.data.tokenizer import Message
from psysafe.generation.generator import TYPED_TOKENS, Answer, Generator
from psysafe.generation.request import Request
from psysafe.generation.text import CLOSE, REASONING, Piece
from psysafe.printable import plain
from psysafe.program import UserError

COMMANDS = "/new begins anew, /exit ends"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def ask(generator: Generator, messages: list[Message], row: int = 1) -> Answer:
    """Writes the answer to stdout while it is generated, and returns it."""
    _note_typed_tokens(generator, messages)
    with TextStream(sys.stdout) as stream:
        (answer,) = generator.answers([messages], [row], stream)
    _note_cut(answer)
    return answer


def compare(generator: Generator, messages: list[Message], names: Sequence[str]) -> None:
    """Writes what each adapter answers under its name. They answer in one batch."""
    _note_typed_tokens(generator, messages)
    ids = generator.encode(messages)
    requests = [Request(i, ids, choice=1, adapter=generator.adapter_named(name)) for i, name in enumerate(names)]
    with StreamsInOrder(names, sys.stdout) as streams:
        for answer in generator.complete(requests, streams):
            streams.end(answer.row)
            _note_cut(answer, f"{names[answer.row]}: ")


def _note_typed_tokens(generator: Generator, messages: list[Message]) -> None:
    if generator.tokenizer.has_typed_tokens(messages[-1:]):
        print(f"(the prompt holds {TYPED_TOKENS})", file=sys.stderr)


def _note_cut(answer: Answer, of: str = "") -> None:
    if answer.finish_reason == "length":
        print(f"({of}cut after {answer.new_tokens:,} tokens; see --max-new-tokens, --context)", file=sys.stderr)


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
        except UserError as error:  # the conversation outgrew the context
            print(plain(f"{error}, or begin anew with /new"), file=sys.stderr)
            messages.pop()
            continue
        except KeyboardInterrupt:
            print("stopped; the conversation goes on without this question", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer.answer, "reasoning_content": answer.reasoning})


def notice() -> str:
    """What everybody who chats should know first."""
    return (
        "This is a language model. It can be wrong, and it is not a substitute for professional care.\n"
        f"In a crisis, people are there for you. {helplines.as_text()}"
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


class StreamsInOrder:
    """Several answers that are written together, as one text: the first as it comes, the pieces of a later one once
    those before it have ended. Each begins with a line of its name; rows count from 0."""

    def __init__(self, names: Sequence[str], out: TextIO):
        self.names, self.out = names, out
        self.row = -1  # whose answer is being written
        self.stream: TextStream | None = None
        self.waiting: list[list[Piece]] = [[] for _ in names]
        self.ended: set[int] = set()

    def __enter__(self) -> "StreamsInOrder":
        self._next()
        return self

    def __call__(self, row: int, piece: Piece) -> None:
        if row == self.row:
            self.stream(row, piece)
        else:
            self.waiting[row].append(piece)

    def end(self, row: int) -> None:
        """The row's last piece has come."""
        self.ended.add(row)
        while self.row in self.ended:
            self._close()
            self._next()

    def __exit__(self, *error) -> None:
        self._close(*error)

    def _next(self) -> None:
        self.row += 1
        if self.row == len(self.names):
            return
        self.out.write(f"--- {self.names[self.row]}\n")
        self.out.flush()
        self.stream = TextStream(self.out)
        for piece in self.waiting[self.row]:
            self.stream(self.row, piece)

    def _close(self, *error) -> None:
        if self.stream is not None:
            self.stream.__exit__(*error or (None, None, None))
        self.stream = None


def _typed() -> Iterator[str]:
    while True:
        try:
            text = input("\n> ").strip()
        except EOFError:
            return
        if text:
            yield text
