"""What a decode step reads and writes of every slot, and the choice of the next tokens.

All of it stands in tensors on the device, at fixed addresses, so that a step needs no word from the host and can be one
CUDA graph. What a request may set is a number per slot; so requests of all kinds are decoded together.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from psysafe.generation.request import Request
from psysafe.generation.sampling import Paths, SamplingRows, choose

RUNNING, LENGTH, STOP = range(3)  # STOP wins over LENGTH
NEVER = -1  # no number of tokens


class StepKind(NamedTuple):
    """What some request of a step needs; a step computes nothing else."""

    paths: Paths = Paths()
    closes: bool = False  # a think block that may have to be closed

    @classmethod
    def of(cls, requests: Iterable[Request]) -> "StepKind":
        kind = cls()
        for options in (request.options for request in requests):
            closes = options.thinking and (options.max_think_tokens > 0 or options.close_thinking_at_eos)
            kind = cls(kind.paths | Paths.of(options.sampling), kind.closes or closes)
        return kind


class SlotState:
    """The slots' tensors (slots,); a slot is written by `seat`, and goes on while it is `live`."""

    def __init__(
        self,
        slots: int,
        vocab_size: int,
        eos_ids: Sequence[int],
        closing: Sequence[int],
        think_end_id: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        """closing: the ids that end a think block by force; dtype: of the logits."""
        self.slots, self.vocab_size, self.device, self.think_end_id = slots, vocab_size, device, think_end_id
        self.finish_of_token = torch.zeros(vocab_size, dtype=torch.int64, device=device)  # STOP at the eos ids
        # Checkpoints with a cut vocabulary list the end tokens of the full one.
        self.finish_of_token[self._tensor([token for token in eos_ids if token < vocab_size])] = STOP
        self.closing = self._tensor(closing)

        self.token = self._per_slot()  # the last token: what the next step reads
        self.n_new = self._per_slot()  # tokens generated so far
        self.max_new = self._per_slot()  # the length at which the answer is cut
        self.max_think = self._per_slot()  # the length at which its reasoning is closed
        self.n_closing = self._per_slot()  # how many tokens of the forced `</think>` text have been emitted
        self.live = self._per_slot(dtype=torch.bool)  # its sequence goes on
        self.thinking = self._per_slot(dtype=torch.bool)  # its think block is open
        self.close_at_eos = self._per_slot(dtype=torch.bool)  # an end token closes the think block
        numbers = self._per_slot(6, dtype=torch.promote_types(dtype, torch.float32))
        self.sampling = SamplingRows(numbers, self._per_slot(3))
        # How often prompt and answer hold each token (slots, V): made with the first request that penalises.
        self.prompted: Tensor | None = None
        self.written: Tensor | None = None

    def seat(self, slots: Sequence[int], requests: Sequence[Request], max_tokens: int) -> None:
        """Prepares slots for requests; they are not live yet. max_tokens: of prompt and answer together."""
        at, options = self._tensor(slots), [request.options for request in requests]
        rooms = [max_tokens - len(request.ids) for request in requests]
        self.max_new[at] = self._tensor([min(o.max_new_tokens, n) for o, n in zip(options, rooms, strict=True)])
        self.max_think[at] = self._tensor([o.max_think_tokens or NEVER for o in options])
        self.n_new[at] = 0
        self.n_closing[at] = len(self.closing)  # as if all were emitted: nothing is forced yet
        self.thinking[at] = self._tensor([o.thinking for o in options]).bool()
        self.close_at_eos[at] = self._tensor([o.close_thinking_at_eos for o in options]).bool()
        choices = [request.row if request.choice is None else request.choice for request in requests]
        self.sampling[at] = SamplingRows.of([o.sampling for o in options], choices, like=self.sampling)
        for slot, request in zip(slots, requests, strict=True):
            if request.options.sampling.penalises:
                self._count_prompt(slot, request.ids)

    def _count_prompt(self, slot: int, ids: Sequence[int]) -> None:
        if self.prompted is None:
            self.prompted = self._per_slot(self.vocab_size, dtype=torch.bool)
            self.written = self._per_slot(self.vocab_size, dtype=torch.int32)
        self.prompted[slot], self.written[slot] = False, 0
        self.prompted[slot, self._tensor(ids)] = True

    def emit(self, logits: Tensor, at: Tensor | slice, kind: StepKind) -> Tensor:
        """Chooses the next token of the slots `at` from logits (n, V) and decides what ends.

        The report (2, n) int64: tokens, and RUNNING, STOP or LENGTH. Slots that are not live report noise.
        """
        n_new, live = self.n_new[at], self.live[at]
        settings = self.sampling[at] if any(kind.paths) else self.sampling
        seen = (self.prompted[at], self.written[at]) if kind.paths.penalties else ()
        token = choose(logits, settings, kind.paths, n_new, *seen)
        if kind.closes:
            token = self._close_thinking(token, at)
        n_new = n_new + live
        # STOP wins over LENGTH: a token that ends the text is no cut, whatever the length.
        finish = torch.maximum(self.finish_of_token.index_select(0, token), n_new >= self.max_new[at])
        self.token[at], self.n_new[at], self.live[at] = token, n_new, live & (finish == RUNNING)
        if kind.paths.penalties:
            written, once = self.written[at], torch.ones_like(token[:, None], dtype=torch.int32)
            self.written[at] = written.scatter_add(1, token[:, None], once)
        return torch.stack([token, finish])

    def _close_thinking(self, token: Tensor, at: Tensor | slice) -> Tensor:
        """The chosen tokens (n,), replaced by those of the closing text where the reasoning has to end."""
        thinking, n_closing, size = self.thinking[at], self.n_closing[at], len(self.closing)
        is_end = self.close_at_eos[at] & (self.finish_of_token.index_select(0, token) == STOP)
        # Not again while it is being closed: the model may go on to say an end token.
        begins = thinking & (n_closing == size) & (is_end | (self.n_new[at] == self.max_think[at]))
        n_closing = n_closing.masked_fill(begins, 0)
        forced = n_closing < size
        token = torch.where(forced, self.closing[n_closing.clamp(max=size - 1)], token)
        self.n_closing[at] = n_closing + forced
        self.thinking[at] = thinking & (token != self.think_end_id)
        return token

    def _per_slot(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(self.slots, *shape, dtype=dtype, device=self.device)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
