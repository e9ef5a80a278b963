"""Token ids in, token ids out: prompts are prefilled into cache slots, all slots decode together, and a slot whose
sequence ends takes the next prompt of the queue (continuous batching, as in Orca, OSDI 2022).

A decode step has fixed shapes and never waits for the device: sampling, stops and the think budget are decided there,
and on a GPU the host reads the tokens one step late. With Triton the step is one CUDA graph there.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from kernels import Documents
from psysafe.cli import setting
from psysafe.generation.cuda_graph import captured
from psysafe.generation.sampling import Sampling, choose
from psysafe.model.cache import Cache
from psysafe.model.decoder import Qwen3_5
from psysafe.program import UserError

RUNNING, LENGTH, STOP = range(3)  # STOP wins over LENGTH

OnToken = Callable[[int, int], None]  # (row, token id)


@dataclass(frozen=True)
class Options:
    """What to generate and in how much memory; the defaults are those of `generate.py`."""

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = setting(2048, "Tokens of an answer, its reasoning included.")
    max_think_tokens: int = setting(0, "Reasoning longer than this is closed, and the answer begins; 0 for no limit.")
    thinking: bool = setting(True, "Let the model reason before it answers, as it has learnt to.")
    batch_size: int = setting(0, "Sequences decoded together; 0 for what fits in memory, up to 64 (CPU: 8).")
    context: int = setting(0, "Tokens of prompt and answer together, at most; 0 for what is needed.")
    prefill_tokens: int = setting(4096, "Most prompt tokens in one forward pass; longer prompts are read in pieces.")
    stop: tuple[str, ...] = ()  # texts that end an answer, and are no part of it; its reasoning may hold them

    def __post_init__(self):
        if not all(self.stop):
            raise UserError("stop is empty; expected a text that ends the answer")
        for name in ("max_new_tokens", "max_think_tokens", "batch_size", "context", "prefill_tokens"):
            minimum = 1 if name in ("max_new_tokens", "prefill_tokens") else 0
            if getattr(self, name) < minimum:
                raise UserError(f"{name.replace('_', '-')} is {getattr(self, name)}, expected at least {minimum}")

    def fingerprint_fields(self) -> dict:
        """What answers depend on, flat: how many are computed together is not part of it."""
        options = {key: value for key, value in asdict(self).items() if key not in ("batch_size", "prefill_tokens")}
        stop = list(options.pop("stop"))
        return options | options.pop("sampling") | ({"stop": stop} if stop else {})


class Request(NamedTuple):
    """A prompt to be continued. `row` names its random numbers, `name` it in errors."""

    row: int
    ids: list[int]
    name: str = ""


@dataclass
class Progress:
    """A request in a slot, and what the host knows of it so far."""

    request: Request
    slot: int
    ids: list[int] = field(default_factory=list)
    finish: int = RUNNING


class Engine:
    """Continuous batching over a fixed number of slots, from token ids to token ids.

    The state of every slot stands in tensors on the device, so that a step reads and writes it without the host.
    """

    def __init__(
        self,
        model: Qwen3_5,
        options: Options,
        slots: int,
        max_tokens: int,
        eos_ids: Sequence[int],
        closing: Sequence[int] = (),
        think_end_id: int = -1,
    ):
        """max_tokens: of prompt and answer together. closing: the ids that end the think block once its budget is
        used up, `</think>` with what stands around it."""
        self.model, self.options, self.think_end_id = model, options, think_end_id
        self.device = device = model.embed_tokens.device
        vocab_size = model.config.vocab_size
        self.cache = Cache(model.config, slots, max_tokens, device, model.embed_tokens.dtype)
        self.documents = Documents(torch.arange(slots + 1, dtype=torch.int32), device)  # one token a slot
        self.finish_of_token = torch.zeros(vocab_size, dtype=torch.int64, device=device)  # STOP at the eos ids
        # Checkpoints with a cut vocabulary list the end tokens of the full one.
        self.finish_of_token[self._tensor([token for token in eos_ids if token < vocab_size])] = STOP
        self.closing = torch.tensor(closing, dtype=torch.int64, device=device)

        def per_slot(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        self.token = per_slot()  # the last token: what the next step reads
        self.row = per_slot()  # names the random numbers
        self.n_new = per_slot()  # tokens generated so far
        self.max_new = per_slot()  # the length at which the answer is cut
        self.n_closing = per_slot()  # how many tokens of the forced `</think>` text have been emitted
        self.live = per_slot(dtype=torch.bool)  # its sequence goes on
        self.thinking = per_slot(dtype=torch.bool)  # its think block is open
        self.prompted = self.written = None  # which tokens prompt and answer hold (slots, V); for penalties only
        if options.sampling.penalises:
            self.prompted = per_slot(vocab_size, dtype=torch.bool)
            self.written = per_slot(vocab_size, dtype=torch.bool)

        self.lag = 1 if device.type == "cuda" else 0  # steps between a token's launch and its reading
        self.graph: Callable[[], Tensor] | None = None  # a decode step
        if device.type == "cuda" and kernels.runs_triton(model.norm):
            # Captured now, while no slot is live and its trial runs do no harm. Its shapes are fixed, so it gets the
            # whole cache; Triton's attention reads only the keys that a sequence has.
            self.graph = captured(lambda: self._step(max_tokens))

    @torch.inference_mode()
    def run(
        self,
        requests: Sequence[Request],
        on_token: OnToken | None = None,
        is_complete: Callable[[Progress], bool] | None = None,
    ) -> Iterator[Progress]:
        """Yields every request as it ends. Prompts must be shorter than the cache's max_tokens.

        is_complete: asked after every token whether the sequence ends here, for what only the host can see.
        """
        assert all(0 < len(request.ids) < self.cache.max_tokens for request in requests)
        self.live.zero_()  # an earlier run may have been left in the middle
        queue = deque(requests)
        active: list[Progress | None] = [None] * self.cache.slots
        launched: deque[tuple[Report, list[Progress | None]]] = deque()
        while queue or any(active):
            free = [slot for slot, progress in enumerate(active) if progress is None]
            if queue and free:
                admitted = self._next(queue, free)
                for progress in admitted:
                    active[progress.slot] = progress
                launched.append((Report(self._prefill(admitted)), admitted))
            else:
                longest = max(len(p.request.ids) + len(p.ids) for p in active if p is not None)
                # The host knows lengths `lag` steps late; a sequence may have grown since.
                launched.append((Report(self.step(longest + self.lag)), list(active)))
            while len(launched) > self.lag:
                report, progresses = launched.popleft()
                for progress, token, finish in zip(progresses, *report.read(), strict=True):
                    if progress is None or progress.finish:  # a step launched before its end was known
                        continue
                    progress.ids.append(token)
                    if not finish and is_complete is not None and is_complete(progress):
                        finish = STOP
                        self.live[progress.slot] = False
                    progress.finish = finish
                    if on_token is not None:
                        on_token(progress.request.row, token)
                    if finish:
                        active[progress.slot] = None
                        yield progress

    def _next(self, queue: deque[Request], free: list[int]) -> list[Progress]:
        """The prompts of the next forward pass: as many as there are slots and prefill_tokens for, at least one."""
        admitted, n_tokens = [], 0
        while queue and len(admitted) < len(free):
            n_tokens += len(queue[0].ids)
            if admitted and n_tokens > self.options.prefill_tokens:
                break
            admitted.append(Progress(queue.popleft(), free[len(admitted)]))
        return admitted

    def _prefill(self, admitted: list[Progress]) -> Tensor:
        """Reads prompts into their slots; the report (2, n) of their first tokens."""
        slots, prompts = [p.slot for p in admitted], [p.request.ids for p in admitted]
        self.cache.reset(slots)
        at, max_piece = self._tensor(slots), self.options.prefill_tokens
        self.row[at] = self._tensor([p.request.row for p in admitted])
        self.max_new[at] = self._tensor(
            [min(self.options.max_new_tokens, self.cache.max_tokens - len(ids)) for ids in prompts]
        )
        self.n_new[at] = 0
        self.n_closing[at] = len(self.closing)  # as if all were emitted: nothing is forced until the budget is used up
        self.live[at] = True
        self.thinking[at] = self.options.thinking
        if self.prompted is not None:
            self.prompted[at], self.written[at] = False, False
            for slot, ids in zip(slots, prompts, strict=True):
                self.prompted[slot, self._tensor(ids)] = True
        while len(prompts[0]) > max_piece:  # then it is alone: `_next` admits nothing beside it
            self._read([prompts[0][:max_piece]], slots)
            prompts = [prompts[0][max_piece:]]
        return self._emit(self.model.logits(self._read(prompts, slots)), at)

    def _read(self, pieces: list[list[int]], slots: list[int]) -> Tensor:
        """Continues the slots by these tokens; hidden states (n, D) of the last ones."""
        tokens = self._tensor([token for piece in pieces for token in piece])
        bounds = torch.tensor([0, *map(len, pieces)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        rows = (bounds[1:] - 1).to(self.device, torch.int64)
        return self.model(tokens, Documents(bounds, self.device), self.cache.at(slots), rows)

    def step(self, longest: int) -> Tensor:
        """One more token for every slot; the report (2, slots). No live sequence may become longer than `longest`."""
        return self._step(longest) if self.graph is None else self.graph()

    def _step(self, max_keys: int) -> Tensor:
        hidden = self.model(self.token, self.documents, self.cache.step(self.live, max_keys))
        return self._emit(self.model.logits(hidden), slice(None))

    def _emit(self, logits: Tensor, at: Tensor | slice) -> Tensor:
        """Chooses the next token of the slots `at` from logits (n, V) and decides what ends.

        The report (2, n) int64: tokens, and RUNNING, STOP or LENGTH. Slots that are not live report noise.
        """
        n_new, live, sampling = self.n_new[at], self.live[at], self.options.sampling
        seen = () if self.prompted is None else (self.prompted[at], self.written[at])
        token = choose(logits, sampling, self.row[at], n_new, *seen)
        if self.options.max_think_tokens:
            token = self._close_thinking(token, at)
        n_new = n_new + live
        # STOP wins over LENGTH: a token that ends the text is no cut, whatever the length.
        finish = torch.maximum(self.finish_of_token.index_select(0, token), n_new >= self.max_new[at])
        self.token[at], self.n_new[at], self.live[at] = token, n_new, live & (finish == RUNNING)
        if seen:
            self.written[at] = seen[1].scatter(1, token[:, None], True)
        return torch.stack([token, finish])

    def _close_thinking(self, token: Tensor, at: Tensor | slice) -> Tensor:
        """The chosen tokens (n,), replaced by those of the closing text where the think budget is used up."""
        thinking, n_closing = self.thinking[at], self.n_closing[at]
        n_closing = n_closing.masked_fill(thinking & (self.n_new[at] == self.options.max_think_tokens), 0)
        forced = n_closing < len(self.closing)
        token = torch.where(forced, self.closing[n_closing.clamp(max=len(self.closing) - 1)], token)
        self.n_closing[at] = n_closing + forced
        self.thinking[at] = thinking & (token != self.think_end_id)
        return token

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


class Report:
    """What a step decided, on its way to the host while the next step runs, which writes its own to the same place."""

    def __init__(self, report: Tensor):
        self.values, self.ready = report.to("cpu", non_blocking=True, copy=True), None
        if report.is_cuda:
            self.ready = torch.cuda.Event()
            self.ready.record()

    def read(self) -> list[list[int]]:
        if self.ready is not None:
            self.ready.synchronize()
        return self.values.tolist()
