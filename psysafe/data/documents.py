"""A row goes in, packed micro-batches come out: rows -> token ids and mask -> the documents of a step -> one flat row.

    python -m psysafe.data --show FILE [--row N] [--model DIR] [--max-tokens N]

prints a row as the model sees it, with its trained tokens coloured.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from psysafe.data.tokenizer import THINK, THINK_END, Message, Tokenizer, load_tokenizer
from psysafe.files import parse_json
from psysafe.program import UserError

EXPECTED_FILE = "expected a JSON array of rows or one JSON object a line"
EXPECTED_ROW = "expected an object with prompt and answer (and reasoning), or with messages"


@dataclass(frozen=True)
class Row:
    """One row of a data file with all its fields, also those that training does not read (`risk cluster`, ...)."""

    fields: dict
    file: Path
    number: int  # its place among the rows of the file, from 1
    line: int | None = None  # JSONL only, from 1

    @property
    def where(self) -> str:
        return f"{self.file} row {self.number}" + (f" (line {self.line})" if self.line else "")

    @property
    def reasoning(self) -> str:
        """The reasoning trace, "" where the row has none. Older files call it `reasoning_language`."""
        return self.fields.get("reasoning") or self.fields.get("reasoning_language") or ""


@dataclass(frozen=True, eq=False)
class Document:
    """One encoded row: tokens (T,) int32, trained (T,) bool, and the file and row number it came from."""

    tokens: np.ndarray
    trained: np.ndarray
    source: str

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_targets(self) -> int:
        """Trained tokens that something predicts. The first token of a document has nothing before it."""
        return int(np.count_nonzero(self.trained[1:]))


@dataclass(frozen=True)
class Dataset:
    """Encoded rows, in the order of the rows, and what encoding did to them."""

    documents: list[Document]
    max_tokens: int
    n_cut: int
    n_without_reasoning: int

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.documents))

    @property
    def n_targets(self) -> int:
        return sum(document.n_targets for document in self.documents)

    def summary(self) -> str:
        """The line to print at start."""
        line = f"{len(self):,} rows, {self.n_tokens:,} tokens ({self.n_targets:,} trained), "
        line += f"{self.n_cut:,} cut at {self.max_tokens:,} tokens"
        return line + (f", {self.n_without_reasoning:,} without reasoning" if self.n_without_reasoning else "")


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Whole documents in one flat row, as the model takes them.

    tokens (T,) int64; cu_seqlens (n+1,) int32, document i is tokens[cu_seqlens[i]:cu_seqlens[i+1]]; rows (N,) int64,
    the rows of the hidden states (T, D) that predict a trained token; labels (N,) int64, those tokens. All on the CPU.
    weight: what its loss counts for, 0 in a spare micro-batch.
    """

    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    rows: torch.Tensor
    labels: torch.Tensor
    weight: float = 1.0


def read_rows(paths: str | Path | Sequence[str | Path]) -> list[Row]:
    """All rows of the files (JSON array or JSONL, UTF-8), in order. UserError names the file and the line or row."""
    paths = [paths] if isinstance(paths, str | Path) else paths
    rows = [row for path in paths for row in read_unchecked_rows(path)]
    for row in rows:
        _check_fields(row)
    return rows


def read_unchecked_rows(path: str | Path) -> list[Row]:
    """The rows of one file as they are, whatever fields they have. UserError where it is no JSON or empty."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: not UTF-8 at line {line} (byte {error.start}); save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {EXPECTED_FILE}") from None
    if text.lstrip().startswith("["):
        rows = [Row(fields, path, number) for number, fields in enumerate(_parse(text, path, first_line=1), 1)]
    else:
        # Not splitlines(): it also cuts at U+2028 and its kind, which JSON allows inside a text.
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [Row(_parse(line, path, first_line=n), path, number, n) for number, (n, line) in enumerate(lines, 1)]
    if not rows:
        raise UserError(f"{path}: no rows in it; {EXPECTED_FILE}")
    return rows


def _shown(value: object) -> str:
    return f"{json.dumps(value):.60} ({type(value).__name__})"


def _parse(text: str, path: Path, first_line: int) -> object:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        line, reason = first_line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except ValueError as error:  # a number of thousands of digits, brackets without end
        line, reason = first_line, str(error)
    raise UserError(f"{path}: malformed JSON at line {line}: {reason}; {EXPECTED_FILE}")


def _check_fields(row: Row) -> None:
    fields = row.fields
    if not isinstance(fields, dict):
        raise UserError(f"{row.where}: {_shown(fields)}, {EXPECTED_ROW}")
    if "messages" in fields:
        if not isinstance(fields["messages"], list):
            raise UserError(f"{row.where}: messages is {_shown(fields['messages'])}, expected a list of messages")
        return
    for key in ("prompt", "answer"):
        if key not in fields:
            raise UserError(f"{row.where}: no {key} in it (found: {', '.join(fields) or 'nothing'}); {EXPECTED_ROW}")
        if not isinstance(fields[key], str) or not fields[key].strip():
            raise UserError(f"{row.where}: {key} is {_shown(fields[key])}, expected a text that is not empty")
    for key in ("reasoning", "reasoning_language"):
        if not isinstance(fields.get(key), str | None):
            raise UserError(f"{row.where}: {key} is {_shown(fields[key])}, expected a text")


def row_messages(row: Row, system: str | None = None) -> list[Message]:
    """The row as a conversation. `system` goes in front unless the row brings its own; None sends no system message."""
    messages = row.fields.get("messages")
    if messages is None:
        reasoning, answer = row.reasoning, row.fields["answer"]
        tags = [("reasoning", reasoning, THINK), ("reasoning", reasoning, THINK_END), ("answer", answer, THINK_END)]
        for key, text, tag in tags:
            # The template takes the content apart again at these tags and would lose text without a word.
            if tag in text:
                raise UserError(f"{row.where}: {key} holds {tag}, at which the chat template would cut it; remove it")
        content = f"{THINK}\n{reasoning}\n{THINK_END}\n{answer}"
        messages = [{"role": "user", "content": row.fields["prompt"]}, {"role": "assistant", "content": content}]
    has_system = bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"
    return messages if system is None or has_system else [{"role": "system", "content": system}, *messages]


def encode_rows(rows: Sequence[Row], tokenizer: Tokenizer, max_tokens: int, system: str | None = None) -> Dataset:
    """Every row as a document of at most `max_tokens` tokens; longer rows lose their end and are counted.

    UserError for a conversation that the template refuses and for rows in which nothing is left to train.
    """
    encoded = [_encode_row(row, tokenizer, max_tokens, system) for row in rows]
    documents = [document for document, _ in encoded]
    useless = [document.source for document in documents if document.n_targets == 0]
    if useless:
        found = ", ".join(useless[:10]) + (f" and {len(useless) - 10:,} more" if len(useless) > 10 else "")
        expected = f"an assistant turn after the last user turn, begun within max_tokens {max_tokens}"
        raise UserError(f"{found}: no trained token in it; expected {expected}")
    n_cut = sum(length > max_tokens for _, length in encoded)
    n_without_reasoning = sum("messages" not in row.fields and not row.reasoning.strip() for row in rows)
    return Dataset(documents, max_tokens, n_cut, n_without_reasoning)


def _encode_row(row: Row, tokenizer: Tokenizer, max_tokens: int, system: str | None) -> tuple[Document, int]:
    """The document, and the row's length before the cut."""
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}, expected at least 1")
    messages = row_messages(row, system)
    try:
        ids, trained = tokenizer.encode_trained(messages)
    except ValueError as error:
        raise UserError(f"{row.where}: {error}") from None
    return Document(np.array(ids[:max_tokens], np.int32), np.array(trained[:max_tokens], bool), row.where), len(ids)


def split_rows(rows: Sequence[Row], *, seed: int, fraction: float) -> tuple[list[Row], list[Row]]:
    """(training rows, validation rows), both in file order: round(fraction x rows), at least one, go to validation."""
    if len(rows) < 2:
        raise UserError(f"{len(rows)} row cannot be split into training and validation; give a validation file")
    n_validation = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    validation = set(_permutation(len(rows), seed, 0)[:n_validation])
    return [r for i, r in enumerate(rows) if i not in validation], [r for i, r in enumerate(rows) if i in validation]


def steps_per_epoch(n_documents: int, batch_size: int) -> int:
    return -(-n_documents // batch_size)


def step_documents(n_documents: int, step: int, batch_size: int, seed: int) -> list[int]:
    """The documents of a step (counted from 0 over the whole run): a pure function, so a resumed run needs no iterator.

    Every epoch is a fresh permutation; its last batch may be short.
    """
    epoch, i = divmod(step, steps_per_epoch(n_documents, batch_size))
    return _permutation(n_documents, seed, 1 + epoch)[i * batch_size : (i + 1) * batch_size]


def _permutation(n: int, seed: int, stream: int) -> list[int]:
    """A uniform permutation of range(n): the order of n random 64-bit keys.

    NumPy promises the raw words of PCG64 and SeedSequence for every later version (NEP 19); it makes no such promise
    for `Generator.permutation`, nor Python for `random.shuffle`.
    """
    return np.argsort(np.random.PCG64([seed, stream]).random_raw(n), kind="stable").tolist()


def pack(documents: Sequence[Document], micro_batch_tokens: int) -> list[MicroBatch]:
    """The documents, in order, in micro-batches of at most `micro_batch_tokens`; a longer document stands alone."""
    return [_micro_batch(group) for group in _groups(documents, micro_batch_tokens)]


def pack_share(
    documents: Sequence[Document], micro_batch_tokens: int, rank: int = 0, world_size: int = 1
) -> list[MicroBatch]:
    """This rank's documents (every world_size-th) packed, and spare micro-batches of weight zero up to the number of
    the rank that has most: gathering sharded weights takes all ranks, whether they have documents left or not.
    """
    counts = [len(_groups(documents[other::world_size], micro_batch_tokens)) for other in range(world_size)]
    spare = [SPARE] * (max(counts) - counts[rank])
    return pack(documents[rank::world_size], micro_batch_tokens) + spare


def _groups(documents: Sequence[Document], micro_batch_tokens: int) -> list[list[Document]]:
    groups, n_tokens = [], 0
    for document in documents:
        n_tokens += len(document)
        if not groups or n_tokens > micro_batch_tokens:
            groups.append([])
            n_tokens = len(document)
        groups[-1].append(document)
    return groups


def _micro_batch(documents: Sequence[Document]) -> MicroBatch:
    tokens = torch.from_numpy(np.concatenate([document.tokens for document in documents]).astype(np.int64))
    trained = torch.from_numpy(np.concatenate([document.trained for document in documents]))
    cu_seqlens = torch.tensor(np.cumsum([0, *map(len, documents)]), dtype=torch.int32)
    # Token t is predicted at t - 1. The row before a document's first token belongs to another document.
    trained[cu_seqlens[:-1].long()] = False
    targets = trained.nonzero().squeeze(1)
    return MicroBatch(tokens, cu_seqlens, targets - 1, tokens[targets])


# A document of one token, through the whole model and the loss like any other.
_ONE_TOKEN = torch.zeros(1, dtype=torch.int64)
SPARE = MicroBatch(_ONE_TOKEN, torch.tensor([0, 1], dtype=torch.int32), _ONE_TOKEN, _ONE_TOKEN, weight=0.0)


def show(document: Document, tokenizer: Tokenizer, color: bool) -> str:
    """The document as text; trained tokens green, or without colour between [[ and ]]."""
    start, end = ("\x1b[32m", "\x1b[0m") if color else ("[[", "]]")
    edges = [0, *(np.flatnonzero(np.diff(document.trained)) + 1), len(document)]
    text = ""
    for a, b in pairwise(edges):
        run = tokenizer.decode(document.tokens[a:b])
        # A row's own control characters are shown, not obeyed by the terminal.
        run = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", run)
        text += f"{start}{run}{end}" if document.trained[a] else run
    return text


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m psysafe.data", description="Show a row as the model sees it.")
    parser.add_argument("--show", required=True, metavar="FILE", help="a JSON or JSONL file of rows")
    parser.add_argument("--row", type=int, default=1, metavar="N", help="which row, from 1 (default 1)")
    parser.add_argument("--model", default="assets:tiny", metavar="DIR", help="folder or hub id (default: bundled)")
    parser.add_argument("--max-tokens", type=int, default=4096, metavar="N", help="cut longer rows (default 4096)")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    args = parser.parse_args(argv)
    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    rows = read_rows(args.show)
    if not 1 <= args.row <= len(rows):
        raise UserError(f"{args.show}: --row {args.row}, expected 1 to {len(rows)}")
    tokenizer = load_tokenizer(args.model)
    document, length = _encode_row(rows[args.row - 1], tokenizer, args.max_tokens, system=None)
    print(f"{document.source} of {len(rows):,}\n\n{show(document, tokenizer, color)}")
    cut = f", cut from {length:,}" if length > len(document) else ""
    print(f"{len(document):,} tokens{cut}; {document.n_targets:,} trained")
    return 0
