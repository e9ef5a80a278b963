"""Prompts from a file and answers into a file: the same rows with what the model wrote, one JSON object a line.

A row is written as soon as it is answered, so that a kill loses nothing; a second start answers what is missing. When
all rows are there the file is put in the prompts' order: however often it was interrupted, it comes out the same.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from psysafe.cli import progress, say
from psysafe.data.prompts import with_system
from psysafe.data.rows import Row, prompt_messages
from psysafe.files import write_atomic
from psysafe.generation.generator import TYPED_TOKENS, Answer, Generator
from psysafe.generation.ranks import Ranks
from psysafe.generation.request import Request
from psysafe.journal import NOT_SHARED, REMEDY, AppendFile
from psysafe.program import UserError

# Fields of a written row beside the prompt's own. `stucked` is the spelling of the published answer files.
ADDED = ("row", "adapter", "response", "reasoning", "answer", "finish_reason", "prompt_tokens", "new_tokens")
ADDED += ("stucked", "settings")


class AnswerFile(AppendFile):
    """The answers to each prompt by each of `adapters`. Raises UserError when the file holds something else.

    settings: what the answers depend on; it is written into every row, and a file written with others is refused.
    """

    FOREIGN = f"no answer to a row of these prompts; {REMEDY}"

    def __init__(
        self, path: str | Path, prompts: Sequence[Row], adapters: Sequence[str], settings: dict, rank: int = 0
    ):
        self.adapters, self.settings = list(adapters), settings
        self.prompts = {row.number: row for row in prompts}
        self.answered: set[tuple[int, str]] = set()  # (row, adapter)
        self._was_there = Path(path).exists()
        super().__init__(path, rank)

    def __exit__(self, *error) -> None:
        # A run that ended before its first answer leaves nothing.
        if not (self.answered or self._was_there or self.rank):
            self.path.unlink(missing_ok=True)
        super().__exit__(*error)

    def _add(self, row: dict, where: str) -> None:
        number, adapter, settings = row.get("row"), row.get("adapter"), row.get("settings")
        if not isinstance(number, int) or number not in self.prompts or not isinstance(settings, dict):
            raise UserError(f"{where}: {self.FOREIGN}")
        prompt = self.prompts[number]
        if any(row.get(name) != value for name, value in _own_fields(prompt).items()):
            raise UserError(f"{where}: answers another prompt than {prompt.where}; {REMEDY}")
        if adapter not in self.adapters:
            expected = ", ".join(self.adapters)
            raise UserError(f"{where}: answered by adapter {adapter!s:.60}, expected {expected}; {REMEDY}")
        for name, value in self.settings.items():
            if settings.get(name) != value:
                difference = f"was made with {name} {settings.get(name)!s:.60}, not {value}"
                raise UserError(f"{where}: {difference}; {REMEDY}")
        if (number, adapter) in self.answered:
            raise UserError(f"{where}: answers row {number} a second time; {REMEDY}")
        self.answered.add((number, adapter))

    def _holds(self, row: dict) -> bool:
        return (row.get("row"), row.get("adapter")) in self.answered

    def _began_as_own(self, torn: bytes) -> bool:
        starts = (self._line_start(prompt) for prompt in self.prompts.values())
        return any(torn.startswith(start) or start.startswith(torn) for start in starts)

    def _line_start(self, prompt: Row) -> bytes:
        """How the lines of a prompt begin, up to the text of the response."""
        fields = json.dumps({**_own_fields(prompt), "row": prompt.number}, ensure_ascii=False)
        return (fields[:-1] + ', "response": "').encode(errors="backslashreplace")

    def missing(self, adapter: str) -> list[Row]:
        return [row for number, row in self.prompts.items() if (number, adapter) not in self.answered]

    def write(self, adapter: str, answer: Answer) -> None:
        fields = asdict(answer)
        stucked = {"stucked": "true"} if fields.pop("unfinished_thinking") else {}
        row = {**_own_fields(self.prompts[answer.row]), **fields, "adapter": adapter, **stucked}
        self._write(json.dumps({**row, "settings": self.settings}, ensure_ascii=False))
        self.answered.add((answer.row, adapter))

    def finish(self, wait: Callable[[], None]) -> None:
        """Puts the rows of all ranks into one file, in the prompts' order. wait: returns when every rank is here."""
        self.collect(wait)
        if self.rank:
            return
        if n_missing := sum(len(self.missing(adapter)) for adapter in set(self.adapters)):
            raise UserError(f"{self.path}: {n_missing:,} {NOT_SHARED}")
        lines = [(json.loads(line), line) for line in self.path.read_bytes().split(b"\n") if line]
        lines.sort(key=lambda pair: (pair[0]["row"], self.adapters.index(pair[0]["adapter"])))
        write_atomic(self.path, b"".join(line + b"\n" for _, line in lines))


def answer_rows(generator: Generator, file: AnswerFile, system: str | None, ranks: Ranks) -> None:
    """Answers this rank's share of what is missing, of all adapters in one batch. Every rank checks every prompt before
    it answers its first."""
    asked, n_prompts = [], len(file.prompts)
    for adapter in dict.fromkeys(file.adapters):
        missing = file.missing(adapter)
        say(f"{adapter}: {n_prompts - len(missing):,} of {n_prompts:,} rows are in {file.path} already")
        asked += [(adapter, row) for row in missing]
    ranks.agree([(adapter, row.number) for adapter, row in asked])
    if not asked:
        return
    ids = _encoded(generator, {row.number: row for _, row in asked}, system)
    requests = [
        Request(i, ids[row.number], row.where, choice=row.number, adapter=generator.adapter_named(adapter))
        for i, (adapter, row) in enumerate(asked)
    ]
    generator.check(requests)
    requests = ranks.share(requests)
    start, n_tokens, n_cut, names = time.perf_counter(), 0, 0, " and ".join(file.adapters)
    with progress(len(requests), names, "rows") as bar:
        for answer in ranks.complete(generator, requests):
            adapter, row = asked[answer.row]
            file.write(adapter, replace(answer, row=row.number))
            n_tokens += answer.new_tokens
            n_cut += answer.finish_reason == "length"
            bar.update()
    speed = n_tokens / (time.perf_counter() - start)
    cut = f", {n_cut:,} cut (see --max-new-tokens, --context)" if n_cut else ""
    of_rank_0 = "" if len(requests) == len(asked) else " by rank 0"
    say(f"{names}: {len(requests):,} of {len(asked):,} rows{of_rank_0}, {speed:,.0f} tokens/s{cut}")


def _encoded(generator: Generator, rows: Mapping[int, Row], system: str | None) -> dict[int, list[int]]:
    """The rows' prompts as ids. A conversation that the template refuses ends the run here, not after hours."""
    ids, n_typed = {}, 0
    for number, row in rows.items():
        try:
            messages = with_system(prompt_messages(row), system)
            ids[number] = generator.encode(messages, row.tools)
            n_typed += generator.tokenizer.has_typed_tokens(messages, row.tools)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None
    if n_typed:
        say(f"{n_typed:,} of {len(rows):,} rows hold {TYPED_TOKENS}")
    return ids


def _own_fields(prompt: Row) -> dict:
    """The prompt's fields; one that has the name of an added one (a reference `answer`) becomes `input_answer`."""
    return {f"input_{name}" if name in ADDED else name: value for name, value in prompt.fields.items()}
