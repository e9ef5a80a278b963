"""Log-likelihoods of continuations, with the context of an item computed once for all its choices.

A batch is two packed forward passes:
1. The contexts. Each fills a cache slot, and the hidden state of its last token predicts the first token of every
   choice.
2. The longer choices, after their context's slot was copied for each of them: all tokens but the last are read, and
   they predict all tokens but the first.
Where every choice is one token long (MMLU), the second pass and the cache are not needed.

Letters: N rows, D hidden, V vocabulary.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import Documents
from psysafe.data.tokenizer import Tokenizer
from psysafe.model.cache import Cache
from psysafe.model.decoder import Qwen3_5
from psysafe.program import UserError
from psysafe.runtime import memory_total

BATCH_TOKENS = {"cuda": 16384, "cpu": 2048}
CACHE_SHARE = 0.3  # of the memory beside the weights; gathered slots and activations need the rest
LOGIT_ROWS = 128  # rows of fp32 logits at a time: 130 MB for a vocabulary of 248,320


class Branches(NamedTuple):
    """A context and continuations of it, as token ids. An item has several where its choices share no context."""

    prefix: list[int]
    continuations: list[list[int]]
    choices: list[list[int]]  # of each continuation, the numbers of the item's choices that it is

    @property
    def longer(self) -> list[list[int]]:
        """The continuations of more than one token: each needs a cache slot."""
        return [tail for tail in self.continuations if len(tail) > 1]


def encode(tokenizer: Tokenizer, context: str, continuations: Sequence[str], max_tokens: int) -> list[Branches]:
    """An item's continuations by their common context, cut at its left where it is too long.

    As in lm-eval, spaces at the end of the context belong to the continuation, and the ids of the continuation are
    those of the whole text after the ids of the context alone. Raises UserError for a choice that cannot be scored.
    """
    head = tokenizer.encode(context.rstrip())
    by_prefix: dict[tuple[int, ...], Branches] = {}
    for choice, continuation in enumerate(continuations):
        tail = tokenizer.encode(context + continuation)[len(head) :]
        if not head or not 0 < len(tail) <= max_tokens:
            raise UserError(
                f"a choice of {len(tail):,} tokens after a context of {len(head):,} cannot be scored; "
                f"expected 1 to {max_tokens:,} tokens after at least 1: {continuation[:60]!r}"
            )
        # One more than the model reads: the last token is only predicted. Where this cuts the context, the cut depends
        # on the length of the choice, so that choices of other lengths do not share it.
        prefix = (head + tail)[-(max_tokens + 1) :][: -len(tail)]
        branches = by_prefix.setdefault(tuple(prefix), Branches(prefix, [], []))
        if tail not in branches.continuations:
            branches.continuations.append(tail)
            branches.choices.append([])
        # Equal choices are read once: in two places of a batch they might differ in their last bits, and would not tie.
        branches.choices[branches.continuations.index(tail)].append(choice)
    return list(by_prefix.values())


def size(item: Sequence[Branches]) -> int:
    """Tokens that the model reads for an item."""
    return sum(len(b.prefix) + sum(len(tail) - 1 for tail in b.continuations) for b in item)


def batches(model: Qwen3_5, items: Sequence[list[Branches]], batch_tokens: int = 0) -> Iterator[list[int]]:
    """The items' numbers in groups for `score`, longest first, so that running out of memory shows at the start.

    The groups depend on the items and the machine alone: an interrupted run repeats them.
    """
    device = model.embed_tokens.device
    max_tokens = batch_tokens or BATCH_TOKENS[device.type]
    order = sorted(range(len(items)), key=lambda i: (-size(items[i]), i))
    if not order:
        return
    longest = _longest([b for item in items for b in item])
    bytes_per_slot = Cache(model.config, 1, longest, "meta", model.embed_tokens.dtype).bytes_per_slot
    # Not the free memory: that differs from start to start, and the groups with it.
    beside_weights = memory_total(device) - sum(p.numel() * p.element_size() for p in model.parameters())
    max_slots = max(1, int(CACHE_SHARE * beside_weights / bytes_per_slot))
    group, tokens, slots = [], 0, 0
    for i in order:
        item_tokens, item_slots = size(items[i]), sum(len(b.longer) for b in items[i])
        if group and (tokens + item_tokens > max_tokens or slots + item_slots > max_slots):
            yield group
            group, tokens, slots = [], 0, 0
        group.append(i)
        tokens, slots = tokens + item_tokens, slots + item_slots
    yield group


@torch.inference_mode()
def score(model: Qwen3_5, items: Sequence[list[Branches]]) -> list[list[float]]:
    """The log-likelihood of each choice of each item: over the whole vocabulary in fp32, its tokens summed in fp64."""
    numbered = [(number, b) for number, item in enumerate(items) for b in item]
    numbered.sort(key=lambda pair: not pair[1].longer)  # contexts that need cache slots come first
    branches = [b for _, b in numbered]
    slots = sum(len(b.longer) for b in branches)
    cache = None
    if slots:
        cache = Cache(model.config, slots, _longest(branches), model.embed_tokens.device, model.embed_tokens.dtype)
    last = _read_contexts(model, branches, cache)  # (contexts, D)

    tails = [tail for b in branches for tail in b.continuations]
    context_of_tail = [i for i, b in enumerate(branches) for _ in b.continuations]
    totals = _log_probabilities(model, last[context_of_tail], [tail[0] for tail in tails])
    if slots:
        is_longer = torch.tensor([len(tail) > 1 for tail in tails])
        totals[is_longer] += _read_longer(model, branches, cache)

    by_item: list[dict[int, float]] = [{} for _ in items]
    choices = [(number, equal) for number, b in numbered for equal in b.choices]
    for (number, equal), total in zip(choices, totals.tolist(), strict=True):
        by_item[number] |= dict.fromkeys(equal, total)
    return [[by_choice[choice] for choice in sorted(by_choice)] for by_choice in by_item]


def _read_contexts(model: Qwen3_5, branches: Sequence[Branches], cache: Cache | None) -> Tensor:
    """The hidden state of the last token of each context, (contexts, D).

    Contexts with longer choices come first in `branches`. Each fills one cache slot, the first of those of its choices.
    """
    device = model.embed_tokens.device
    with_slot = [b for b in branches if b.longer]
    view_of_slots = cache.at(_first_slots(with_slot)) if with_slot else None
    # Two passes where both kinds occur: in a pass with a cache every document needs a slot.
    passes = [(with_slot, view_of_slots), (branches[len(with_slot) :], None)]
    last = []
    for group, view in passes:
        if group:
            tokens, bounds = _packed([b.prefix for b in group], device)
            last_rows = (bounds[1:] - 1).to(device, torch.int64)
            last.append(model(tokens, Documents(bounds, device), view, last_rows))
    return torch.cat(last)


def _read_longer(model: Qwen3_5, branches: Sequence[Branches], cache: Cache) -> Tensor:
    """For each continuation of more than one token, the log-likelihood of all tokens but the first, (N,) fp64."""
    device = model.embed_tokens.device
    with_slot = [b for b in branches if b.longer]
    copies = [  # (slot of the context, slot of another of its choices)
        (first, first + k)
        for b, first in zip(with_slot, _first_slots(with_slot), strict=True)
        for k in range(1, len(b.longer))
    ]
    if copies:
        fork(cache, *map(list, zip(*copies, strict=True)))
    tails = [tail for b in with_slot for tail in b.longer]
    tokens, bounds = _packed([tail[:-1] for tail in tails], device)
    hidden = model(tokens, Documents(bounds, device), cache.at(list(range(len(tails)))))
    by_token = _log_probabilities(model, hidden, [token for tail in tails for token in tail[1:]])
    return torch.stack([part.sum() for part in by_token.split(bounds.diff().tolist())])


def fork(cache: Cache, sources: list[int], targets: list[int]) -> None:
    """Slot targets[i] becomes a copy of slot sources[i]."""
    for layer in cache.layers:
        for x in layer:
            x[targets] = x[sources]
    cache.lengths[targets] = cache.lengths[sources]
    for source, target in zip(sources, targets, strict=True):
        cache.host_lengths[target] = cache.host_lengths[source]


def _longest(branches: Sequence[Branches]) -> int:
    """Tokens of the longest context with a choice."""
    return max(len(b.prefix) + len(tail) for b in branches for tail in b.continuations)


def _first_slots(branches: Sequence[Branches]) -> list[int]:
    """Every longer choice has a slot, those of one context side by side: the first slot of each context."""
    return [0, *itertools.accumulate(len(b.longer) for b in branches)][: len(branches)]


def _packed(pieces: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """tokens (T,) on the device, bounds (n+1,) int32 on the CPU."""
    tokens = torch.tensor([token for piece in pieces for token in piece], device=device)
    return tokens, torch.tensor([0, *map(len, pieces)], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _log_probabilities(model: Qwen3_5, hidden: Tensor, targets: list[int]) -> Tensor:
    """log p(target) by the hidden state: hidden (N, D), targets N ids -> (N,) fp64 on the CPU.

    Computed in fp32 (fp64 in an fp64 model), LOGIT_ROWS rows at a time.
    """
    parts = []
    target_ids = torch.tensor(targets, device=hidden.device)
    for rows, ids in zip(hidden.split(LOGIT_ROWS), target_ids.split(LOGIT_ROWS), strict=True):
        logits = model.logits(rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        parts.append(logits.log_softmax(-1).gather(1, ids[:, None]).squeeze(1))
    return torch.cat(parts).double().cpu()  # the sum over a long text would lose its last digits in fp32
