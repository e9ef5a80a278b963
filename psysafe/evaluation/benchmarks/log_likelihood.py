"""Log-likelihoods of continuations, with the context of an item computed once for all its choices.

A batch is two packed forward passes: the contexts, each into its own cache slot; then, with the slots copied for every
choice, the choices' remaining tokens. The first token of a choice is predicted by the context's last row, so where all
choices are one token long (MMLU) the second pass, and the cache, fall away.

Letters: N rows, D hidden, V vocabulary.
"""

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
    """A context and continuations of it, as token ids; `choices` are their places in the item."""

    prefix: list[int]
    continuations: list[list[int]]
    choices: list[int]


def encode(tokenizer: Tokenizer, context: str, continuations: Sequence[str], max_tokens: int) -> list[Branches]:
    """An item's continuations by their common context, cut at its left where it is too long.

    As lm-eval: spaces at the end of the context go over to the continuation; the continuation's ids are what the whole
    text has behind the ids of the context alone; of both together the last max_tokens + 1 are kept, of which the last
    is only predicted. A cut differs with the continuation's length, and then the choices share nothing.
    """
    bare = context.rstrip()
    head = tokenizer.encode(bare)
    by_prefix: dict[tuple[int, ...], Branches] = {}
    for choice, continuation in enumerate(continuations):
        tail = tokenizer.encode(context + continuation)[len(head) :]
        if not head or not 0 < len(tail) <= max_tokens:
            raise UserError(
                f"a choice of {len(tail):,} tokens after a context of {len(head):,} cannot be scored; "
                f"expected 1 to {max_tokens:,} tokens after at least 1: {continuation[:60]!r}"
            )
        prefix = (head + tail)[-(max_tokens + 1) :][: -len(tail)]
        branches = by_prefix.setdefault(tuple(prefix), Branches(prefix, [], []))
        branches.continuations.append(tail)
        branches.choices.append(choice)
    return list(by_prefix.values())


def size(item: Sequence[Branches]) -> int:
    """Tokens that the model reads for an item."""
    return sum(len(b.prefix) + sum(len(k) - 1 for k in b.continuations) for b in item)


def batches(model: Qwen3_5, items: Sequence[list[Branches]], batch_tokens: int = 0) -> Iterator[list[int]]:
    """The items' numbers in groups for `score`, longest first, so that running out of memory shows at the start.

    The groups depend on the items and the machine alone: an interrupted run repeats them.
    """
    device = model.embed_tokens.device
    most = batch_tokens or BATCH_TOKENS[device.type]
    order = sorted(range(len(items)), key=lambda i: (-size(items[i]), i))
    if not order:
        return
    longest = max(len(b.prefix) + len(k) for item in items for b in item for k in b.continuations)
    each = Cache(model.config, 1, longest, "meta", model.embed_tokens.dtype).bytes_per_slot
    # Not the free memory: that differs from start to start.
    room = memory_total(device) - sum(p.numel() * p.element_size() for p in model.parameters())
    most_slots = max(1, int(CACHE_SHARE * room / each))
    group, tokens, slots = [], 0, 0
    for i in order:
        needed = sum(_slots(b) for b in items[i])
        if group and (tokens + size(items[i]) > most or slots + needed > most_slots):
            yield group
            group, tokens, slots = [], 0, 0
        group.append(i)
        tokens, slots = tokens + size(items[i]), slots + needed
    yield group


@torch.inference_mode()
def score(model: Qwen3_5, items: Sequence[list[Branches]]) -> list[list[float]]:
    """The log-likelihood of each choice of each item: over the whole vocabulary in fp32, its tokens summed in fp64."""
    device = model.embed_tokens.device
    branches = [b for item in items for b in item]
    slots = sum(map(_slots, branches))
    longest = max(len(b.prefix) + len(k) for b in branches for k in b.continuations)
    cache = Cache(model.config, slots, longest, device, model.embed_tokens.dtype) if slots else None

    # Contexts. One whose choices are all single tokens needs no slot, but with a cache every document must have one.
    held = [b for b in branches if _slots(b)]
    loose = [b for b in branches if not _slots(b)]
    last = {}
    for group, kept in ((held, cache), (loose, None)):
        if group:
            view = None if kept is None else kept.at(_starts(group))
            tokens, bounds = _packed([b.prefix for b in group], device)
            hidden = model(tokens, Documents(bounds, device), view, (bounds[1:] - 1).to(device, torch.int64))
            last |= {id(b): hidden[i] for i, b in enumerate(group)}
    pairs = [(b, j) for b in branches for j in range(len(b.continuations))]
    rows = torch.stack([last[id(b)] for b, _ in pairs])
    totals = _logprobs(model, rows, [b.continuations[j][0] for b, j in pairs])

    # The rest of the longer choices, each in a copy of its context's slot.
    longer = [(i, b, j) for i, (b, j) in enumerate(pairs) if len(b.continuations[j]) > 1]
    if longer:
        copies = [(slot, slot + k) for b, slot in zip(held, _starts(held), strict=True) for k in range(1, _slots(b))]
        if copies:
            fork(cache, *map(list, zip(*copies, strict=True)))
        tails = [b.continuations[j] for _, b, j in longer]
        tokens, bounds = _packed([tail[:-1] for tail in tails], device)
        hidden = model(tokens, Documents(bounds, device), cache.at(list(range(slots))))
        found = _logprobs(model, hidden, [token for tail in tails for token in tail[1:]])
        for n, (i, _, _) in enumerate(longer):
            totals[i] += found[bounds[n] : bounds[n + 1]].sum()

    by_choice = {(id(b), b.choices[j]): total for (b, j), total in zip(pairs, totals.tolist(), strict=True)}
    return [[ll for _, ll in sorted((c, by_choice[id(b), c]) for b in item for c in b.choices)] for item in items]


def fork(cache: Cache, sources: list[int], targets: list[int]) -> None:
    """Slot targets[i] becomes a copy of slot sources[i]."""
    for layer in cache.layers:
        for x in layer:
            x[targets] = x[sources]
    cache.lengths[targets] = cache.lengths[sources]
    for source, target in zip(sources, targets, strict=True):
        cache.host_lengths[target] = cache.host_lengths[source]


def _slots(branches: Branches) -> int:
    return sum(len(k) > 1 for k in branches.continuations)


def _starts(group: Sequence[Branches]) -> list[int]:
    starts, slot = [], 0
    for branches in group:
        starts.append(slot)
        slot += _slots(branches)
    return starts


def _packed(pieces: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """tokens (T,) on the device, bounds (n+1,) int32 on the CPU."""
    tokens = torch.tensor([token for piece in pieces for token in piece], device=device)
    return tokens, torch.tensor([0, *map(len, pieces)], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _logprobs(model: Qwen3_5, hidden: Tensor, targets: list[int]) -> Tensor:
    """hidden (N, D), targets (N,) -> (N,) fp64, computed in fp32 (fp64 in an fp64 model), on the CPU."""
    wanted = torch.tensor(targets, device=hidden.device)
    found = []
    for rows, target in zip(hidden.split(LOGIT_ROWS), wanted.split(LOGIT_ROWS), strict=True):
        logits = model.logits(rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        found.append(logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1))
    return torch.cat(found).double().cpu()  # the sum over a long text would lose its last digits
