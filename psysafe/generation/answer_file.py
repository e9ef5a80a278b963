"""Prompts from a file and answers into a file: the same rows with what the model wrote, one JSON object a line.

A row is written as soon as it is answered, so that a kill loses nothing; a second start answers what is missing. When
all rows are there the file is put in the prompts' order: however often it was interrupted, it comes out the same.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from psysafe.data.prompts import with_system
from psysafe.data.rows import Row
from psysafe.data.tokenizer import Message
from psysafe.files import parse_json, write_atomic
from psysafe.generation.engine import Answer, Generator, Request
from psysafe.program import UserError

ADDED = ("row", "adapter", "response", "reasoning", "answer", "finish_reason", "prompt_tokens", "new_tokens")
ADDED += ("stucked", "settings")


def conversation(row: Row, system: str | None) -> list[Message]:
    """The messages to be answered. `system` goes in front unless the row brings its own."""
    return with_system(row.fields.get("messages", [{"role": "user", "content": row.fields.get("prompt")}]), system)


class AnswerFile:
    """The answers of each prompt by each of `adapters`. Raises UserError when the file holds something else.

    settings: what the answers depend on; it is written into every row, and a file made with others is refused.
    """

    def __init__(self, path: str | Path, prompts: Sequence[Row], adapters: Sequence[str], settings: dict):
        self.path, self.adapters, self.settings = Path(path), list(adapters), settings
        self.prompts = {row.number: row for row in prompts}
        self.done: set[tuple[int, str]] = set()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        with open(self.path, "r+b") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            file.truncate(whole)  # a line that a kill tore in the middle is answered again
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            self._recognise(line, f"{self.path} line {number}")
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  (closed by finish or with the process)

    def _recognise(self, line: bytes, where: str) -> None:
        another = "give another --out, or move this file away"
        try:
            row = parse_json(line)
            key, settings = (row["row"], row["adapter"]), row["settings"]
            prompt = self.prompts[key[0]]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{where}: no answer to a row of these prompts; {another}") from None
        if any(row.get(name) != value for name, value in _kept(prompt).items()):
            raise UserError(f"{where}: answers another prompt than {prompt.where}; {another}")
        if key[1] not in self.adapters:
            found = f"answered by adapter {key[1]!s:.60}, expected {', '.join(self.adapters)}"
            raise UserError(f"{where}: {found}; {another}")
        for name, value in self.settings.items():
            if settings.get(name) != value:
                found = f"was made with {name} {settings.get(name)!s:.60}, not {value}"
                raise UserError(f"{where}: {found}; {another}")
        if key in self.done:
            raise UserError(f"{where}: answers row {key[0]} a second time; {another}")
        self.done.add(key)

    def missing(self, adapter: str) -> list[Row]:
        return [row for number, row in self.prompts.items() if (number, adapter) not in self.done]

    def write(self, adapter: str, answer: Answer) -> None:
        made = asdict(answer)
        stuck = {"stucked": "true"} if made.pop("stuck") else {}
        row = {**_kept(self.prompts[answer.row]), **made, "adapter": adapter, **stuck, "settings": self.settings}
        # Half a surrogate pair, which JSON allows and UTF-8 does not, becomes its JSON escape again.
        line = json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        self._file.write(line)
        self.done.add((answer.row, adapter))

    def finish(self) -> None:
        """Puts the rows into the prompts' order."""
        self._file.close()
        lines = [(json.loads(line), line) for line in self.path.read_bytes().split(b"\n") if line]
        lines.sort(key=lambda pair: (pair[0]["row"], self.adapters.index(pair[0]["adapter"])))
        write_atomic(self.path, b"".join(line + b"\n" for _, line in lines))


def answer_rows(generator: Generator, file: AnswerFile, adapter: str, system: str | None, say: Callable) -> None:
    """Answers what is missing of one adapter. Every prompt is checked before the first is answered."""
    missing = file.missing(adapter)
    say(f"{adapter}: {len(file.prompts) - len(missing):,} of {len(file.prompts):,} rows are in {file.path} already")
    requests = []
    for row in missing:
        try:
            requests.append(Request(row.number, generator.encode(conversation(row, system)), row.where))
        except ValueError as error:
            raise UserError(f"{row.where}: {error}") from None
    began, tokens, cut = time.perf_counter(), 0, 0
    for done, answer in enumerate(generator.complete(requests), 1):
        file.write(adapter, answer)
        tokens += answer.new_tokens
        cut += answer.finish_reason == "length"
        if sys.stderr.isatty() or done == len(missing):
            line = f"{done:,} of {len(missing):,} rows, {tokens / (time.perf_counter() - began):,.0f} tokens/s"
            line += f", {cut:,} cut (see --max-new-tokens, --context)" if cut else ""
            say(line, end="\n" if done == len(missing) else "\r")


def _kept(prompt: Row) -> dict:
    """The input's fields; one that has the name of an added one (a reference `answer`) is kept as `input_answer`."""
    return {f"input_{name}" if name in ADDED else name: value for name, value in prompt.fields.items()}
