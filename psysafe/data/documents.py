"""From rows of a file to packed micro-batches.

Every row becomes a document (token ids, and which of them are trained). A step takes some documents, and packs them one
after the other into micro-batches: flat rows of tokens, without padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from psysafe.data.chat_template import EARLIER, SWITCHED_OFF, WITHOUT_TEXT, TrainTurns, read_turns
from psysafe.data.rows import Row, row_messages
from psysafe.data.tokenizer import Tokenizer
from psysafe.printable import counted
from psysafe.program import UserError

LongRows = Literal["cut", "drop", "error"]


@dataclass(frozen=True, eq=False)
class Document:
    """One encoded row: tokens (T,) int32, trained (T,) bool, and the file and row number it came from.

    is_contrast: its answer is the base's own.
    """

    tokens: np.ndarray
    trained: np.ndarray
    source: str
    is_contrast: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_targets(self) -> int:
        """Trained tokens that something predicts. The first token of a document has nothing before it."""
        return int(np.count_nonzero(self.trained[1:]))


@dataclass(frozen=True)
class Dataset:
    """Encoded rows, in the order of the rows; how many of them were cut, and how many have no reasoning.

    notes: what else the reader of a run's first lines should know, a phrase each.
    """

    documents: list[Document]
    max_tokens: int
    n_cut: int
    n_without_reasoning: int
    notes: Sequence[str] = ()

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
        line = f"{counted(len(self), 'row')}, {self.n_tokens:,} tokens ({self.n_targets:,} trained), "
        line += f"{self.n_cut:,} cut at {self.max_tokens:,} tokens"
        line += f", {self.n_without_reasoning:,} without reasoning" if self.n_without_reasoning else ""
        return ", ".join([line, *self.notes])


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Whole documents in one flat row, as the model takes them.

    tokens (T,) int64; cu_seqlens (n+1,) int32, document i is tokens[cu_seqlens[i]:cu_seqlens[i+1]]; rows (N,) int64,
    the rows of the hidden states (T, D) that predict a trained token; labels (N,) int64, those tokens. All on the CPU.
    weight: the factor of its loss, 1, or 0 in a padding micro-batch (`pack_share`).
    contrast: its contrast documents, which are its last ones, once more as a micro-batch of their own: what the base
    reads to be compared with. The last n_contrast of `rows` are theirs. None: it has none.
    """

    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    rows: torch.Tensor
    labels: torch.Tensor
    weight: float = 1.0
    contrast: "MicroBatch | None" = None
    n_contrast: int = 0


def encode_rows(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    max_tokens: int,
    system: str | None = None,
    train_turns: TrainTurns = "last",
    long_rows: LongRows = "cut",
    is_contrast: bool = False,
) -> Dataset:
    """Every row as a document of at most `max_tokens` tokens.

    train_turns: the assistant turns after the last user query, or all of them. Those that are not trained are counted.
    long_rows: longer rows lose their end (cut), are left out (drop) or refused (error); a note names them.
    is_contrast: the answers are the base's own.
    UserError for a conversation that the template refuses and for rows in which nothing is left to train.
    """
    encoded = [encode_row(row, tokenizer, max_tokens, system, train_turns) for row in rows]
    too_long = [document.source for document, length in encoded if length > max_tokens]
    notes = _long_row_notes(too_long, max_tokens, long_rows)
    if too_long and long_rows == "drop":
        rows = [row for row, (_, length) in zip(rows, encoded, strict=True) if length <= max_tokens]
        encoded = [pair for pair in encoded if pair[1] <= max_tokens]
        if not rows:
            raise UserError(f"{_named(too_long)}: every row is longer than max_tokens {max_tokens:,}; none is left")
    documents = [replace(document, is_contrast=is_contrast) for document, _ in encoded]
    untrained = [document.source for document in documents if document.n_targets == 0]
    if untrained:
        place = "after the last user turn, " if train_turns == "last" else ""
        expected = f"an assistant turn with a text {place}not switched off, begun within max_tokens {max_tokens}"
        raise UserError(f"{_named(untrained)}: no trained token in it; expected {expected}")
    n_cut = sum(length > max_tokens for _, length in encoded)
    n_without_reasoning = sum(_has_empty_reasoning(row, train_turns) for row in rows)
    notes += _turn_notes(rows, documents, train_turns, tokenizer)
    return Dataset(documents, max_tokens, n_cut, n_without_reasoning, notes)


def _long_row_notes(too_long: Sequence[str], max_tokens: int, long_rows: LongRows) -> list[str]:
    """What becomes of the rows over `max_tokens`. UserError for long_rows = error."""
    if not too_long:
        return []
    if long_rows == "error":
        remedy = "raise --max-tokens, or take --long-rows cut or drop"
        raise UserError(f"{_named(too_long)}: longer than max_tokens {max_tokens:,}; {remedy}")
    if long_rows == "drop":
        return [f"{len(too_long):,} longer left out: {_named(too_long)}"]
    # In these rows the helplines come last: a model that never sees them learns to leave them out.
    return [f"not trained to their end (--long-rows drop leaves them out): {_named(too_long)}"]


def _turn_notes(
    rows: Sequence[Row], documents: Sequence[Document], train_turns: TrainTurns, tokenizer: Tokenizer
) -> list[str]:
    """Which assistant turns are not trained, and which rows hold control tokens that somebody typed."""
    n_turns, typed = 0, []
    untrained: dict[str, list[str]] = {EARLIER: [], SWITCHED_OFF: [], WITHOUT_TEXT: []}
    for row in rows:
        for turn in read_turns(row_messages(row), train_turns):
            n_turns += turn.role == "assistant"
            if turn.untrained:
                untrained[turn.untrained].append(row.where)
        if has_typed_tokens(row, tokenizer):
            typed.append(row.where)
    notes = []
    if n_turns > len(rows) or any(untrained.values()):
        remedies = {EARLIER: "; --train-turns all trains them", SWITCHED_OFF: " by weight, train or loss"}
        reasons = [
            f"{len(places):,} {reason}{remedies.get(reason) or f': {_named(places)}'}"
            for reason, places in untrained.items()
            if places
        ]
        n_trained = sum(map(_count_trained_turns, documents))
        if n_cut := n_turns - sum(map(len, untrained.values())) - n_trained:
            reasons.append(f"{n_cut:,} cut off")
        why = f" ({', '.join(reasons)})" if reasons else ""
        notes.append(f"{n_trained:,} of {n_turns:,} assistant turns trained{why}")
    if typed:
        notes.append(f"{len(typed):,} with typed control tokens such as <|im_end|>, taken for text: {_named(typed)}")
    return notes


def _has_empty_reasoning(row: Row, train_turns: TrainTurns) -> bool:
    """Whether an empty think block is trained."""
    turns = read_turns(row_messages(row), train_turns)
    return any(turn.reasoning == "" and not turn.untrained for turn in turns)


def has_typed_tokens(row: Row, tokenizer: Tokenizer) -> bool:
    """Whether a text of the row holds a control token that somebody typed."""
    return tokenizer.has_typed_tokens(row_messages(row), row.tools)


def _count_trained_turns(document: Document) -> int:
    """Of which the cut left something. Between two of them stands the marker that the second begins with."""
    return int(np.count_nonzero(document.trained[1:] & ~document.trained[:-1]))


def _named(places: Sequence[str]) -> str:
    """The first ten, and how many more there are."""
    return ", ".join(places[:10]) + (f" and {len(places) - 10:,} more" if len(places) > 10 else "")


def encode_row(
    row: Row,
    tokenizer: Tokenizer,
    max_tokens: int,
    system: str | None = None,
    train_turns: TrainTurns = "last",
) -> tuple[Document, int]:
    """The document, and the row's length before the cut."""
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}, expected at least 1")
    messages = row_messages(row, system)
    try:
        ids, trained = tokenizer.encode_trained(messages, row.tools, train_turns)
    except ValueError as error:
        raise UserError(f"{row.where}: {error}") from None
    return Document(np.array(ids[:max_tokens], np.int32), np.array(trained[:max_tokens], bool), row.where), len(ids)


def split_rows(rows: Sequence[Row], *, seed: int, fraction: float) -> tuple[list[Row], list[Row]]:
    """(training rows, validation rows), both in file order: round(fraction x rows), at least one, go to validation."""
    if len(rows) < 2:
        remedy = "give a file that validates (--val-data, --contrast-val-data), or --val-fraction 0"
        raise UserError(f"{_named([row.where for row in rows])}: {len(rows)} row cannot be split in two; {remedy}")
    n_validation = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    validation = set(_permutation(len(rows), seed, 0)[:n_validation])
    train_rows = [row for i, row in enumerate(rows) if i not in validation]
    return train_rows, [row for i, row in enumerate(rows) if i in validation]


def steps_per_epoch(n_documents: int, batch_size: int) -> int:
    return -(-n_documents // batch_size)


def step_documents(n_documents: int, step: int, batch_size: int, seed: int) -> list[int]:
    """The indices of the documents of a step, which is counted from 0 over the whole run.

    Every epoch is a new permutation; its last batch may be short. The result follows from the arguments alone, so a
    resumed run needs no saved iterator.
    """
    epoch, i = divmod(step, steps_per_epoch(n_documents, batch_size))
    return _permutation(n_documents, seed, 1 + epoch)[i * batch_size : (i + 1) * batch_size]


_CONTRAST = 1  # not 0: NumPy's SeedSequence takes [seed, stream, 0] for [seed, stream]


def step_contrast_documents(
    n_contrast: int, ratio: float, n_documents: int, step: int, batch_size: int, seed: int
) -> list[int]:
    """The indices of the contrast documents of a step whose training documents are `step_documents`.

    After d training documents there have been round(ratio x d): one in each step of four at 0.25, one in every second
    or third step at 0.1. They pass in a stream of their own, permutation after permutation, from the arguments alone.
    """
    epoch, i = divmod(step, steps_per_epoch(n_documents, batch_size))
    before, after = (epoch * n_documents + min(j * batch_size, n_documents) for j in (i, i + 1))
    positions = range(round(ratio * before), round(ratio * after))
    passes = {p // n_contrast: _permutation(n_contrast, seed, p // n_contrast, _CONTRAST) for p in positions}
    return [passes[p // n_contrast][p % n_contrast] for p in positions]


def _permutation(n: int, *key: int) -> list[int]:
    """A uniform permutation of range(n): the order of n random 64-bit keys. key: the seed, then which stream of it.

    NumPy promises the raw words of PCG64 and SeedSequence for every later version (NEP 19); it makes no such promise
    for `Generator.permutation`, nor Python for `random.shuffle`.
    """
    return np.argsort(np.random.PCG64(key).random_raw(n), kind="stable").tolist()


def pack(documents: Sequence[Document], micro_batch_tokens: int) -> list[MicroBatch]:
    """The documents, in order, in micro-batches of at most `micro_batch_tokens`; a longer document stands alone."""
    return [_micro_batch(group) for group in _groups(documents, micro_batch_tokens)]


def pack_share(
    documents: Sequence[Document], micro_batch_tokens: int, rank: int = 0, world_size: int = 1
) -> list[MicroBatch]:
    """This rank's documents (every world_size-th), packed, then padding micro-batches of weight zero.

    Every rank gets as many micro-batches as the rank with the longest list: sharded weights are gathered by all ranks
    together, also by one that has no documents left. For the same reason a micro-batch without contrast documents gets
    padding for the base to read where one of another rank has some.
    """
    groups = [_groups(documents[r::world_size], micro_batch_tokens) for r in range(world_size)]
    n_batches = max(map(len, groups))
    batches = [_micro_batch(group) for group in groups[rank]]
    batches += [PADDING_MICRO_BATCH] * (n_batches - len(batches))
    for i in range(n_batches):
        if batches[i].contrast is None and any(share[i][-1].is_contrast for share in groups if i < len(share)):
            batches[i] = replace(batches[i], contrast=PADDING_MICRO_BATCH)
    return batches


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
    contrast = [document for document in documents if document.is_contrast]
    assert contrast == documents[len(documents) - len(contrast) :], "contrast documents come last"
    batch = _flat_row(documents)
    if not contrast:
        return batch
    part = _flat_row(contrast)
    return replace(batch, contrast=part, n_contrast=len(part.rows))


def _flat_row(documents: Sequence[Document]) -> MicroBatch:
    tokens = torch.from_numpy(np.concatenate([document.tokens for document in documents]).astype(np.int64))
    trained = torch.from_numpy(np.concatenate([document.trained for document in documents]))
    cu_seqlens = torch.tensor(np.cumsum([0, *map(len, documents)]), dtype=torch.int32)
    # Token t is predicted at t - 1. The row before a document's first token belongs to another document.
    trained[cu_seqlens[:-1].long()] = False
    targets = trained.nonzero().squeeze(1)
    return MicroBatch(tokens, cu_seqlens, targets - 1, tokens[targets])


# A document of one token goes through the whole model and the loss like any other: the model has no second path.
_ONE_TOKEN = torch.zeros(1, dtype=torch.int64)
PADDING_MICRO_BATCH = MicroBatch(
    _ONE_TOKEN, torch.tensor([0, 1], dtype=torch.int32), _ONE_TOKEN, _ONE_TOKEN, weight=0.0
)
