"""Token ids in, token ids out: prompts are prefilled into cache slots, all slots decode together, and a slot whose
sequence ends takes the next prompt of the queue (continuous batching, as in Orca, OSDI 2022).

Requests come and go while the engine runs: `submit`, `advance` (one forward pass), `cancel`. A decode step has fixed
shapes and never waits for the device: sampling, stops and the think budget are decided there, and on a GPU the host
reads the tokens one step late. With Triton the step is one CUDA graph there, one for each kind of step.
"""

import copy
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from kernels import Documents
from psysafe.generation.cuda_graph import captured, warm_up
from psysafe.generation.request import Event, Options, Request
from psysafe.generation.sampling import MAX_LOGPROBS, log_probabilities
from psysafe.generation.slot_state import LENGTH, STOP, SlotState, StepKind
from psysafe.model.cache import Cache, CacheView, StepView
from psysafe.model.decoder import Qwen3_5
from psysafe.model.mixed_adapters import MixedAdapters
from psysafe.program import UserError

REASONS = {STOP: "stop", LENGTH: "length"}


@dataclass(eq=False)
class Progress:
    """A request in a slot, and what the host knows of it so far."""

    request: Request
    slot: int
    n_read: int = 0  # tokens of the prompt in the cache
    n_new: int = 0  # tokens of the answer
    ended: bool = False

    @property
    def is_read(self) -> bool:
        return self.n_read == len(self.request.ids)


class Choice(NamedTuple):
    """What a forward pass chose, on the device: tokens and ends (2, n) int64, from logits (n, V)."""

    report: Tensor
    logits: Tensor


class Engine:
    """Continuous batching over a fixed number of slots, from token ids to token ids. All calls come from one thread."""

    def __init__(
        self,
        model: Qwen3_5,
        slots: int,
        max_tokens: int,
        eos_ids: Sequence[int],
        closing: Sequence[int] = (),
        think_end_id: int = -1,
        prefill_tokens: int = Options.prefill_tokens,
        deterministic: bool = False,
        adapters: MixedAdapters | None = None,
    ):
        """max_tokens: of prompt and answer together. closing: the ids that end a think block by force, `</think>` with
        what stands around it. deterministic: every prompt is read alone, and attention spans the whole cache, so that
        an answer has the same bits alone and in a crowd. adapters: those of the model that requests may name."""
        self.model, self.slots, self.max_tokens = model, slots, max_tokens
        self.prefill_tokens, self.deterministic = prefill_tokens, deterministic
        self.device = device = model.embed_tokens.device
        vocab_size, dtype = model.config.vocab_size, model.embed_tokens.dtype
        self.cache = Cache(model.config, slots, max_tokens, device, dtype)
        self.documents = Documents(torch.arange(slots + 1, dtype=torch.int32), device)  # one token a slot
        self.state = SlotState(slots, vocab_size, eos_ids, closing, think_end_id, device, dtype)
        self.adapters, self.adapter_weights = adapters, None  # (slots, r), at a fixed address as all that a step reads
        if adapters is not None:
            self.adapter_weights = adapters.weights([None] * slots, [1.0] * slots)

        self.queue: deque[Request] = deque()
        self.rows: set[int] = set()  # of all requests that are here
        self.seats: list[Progress | None] = [None] * slots
        self.reading: list[Progress] = []  # whose prompts are being read, by one forward pass or piece by piece
        self.unread_states: list[Tensor] = []  # of a prompt that is read in pieces
        self.n_alone = 0  # so many prompts are read alone, because together their pass failed
        self.decodes_next = False  # a prompt was read last: now the others have their turn
        self.kind: StepKind | None = None  # of decode steps; None: others are in them now
        self.lag = 1 if device.type == "cuda" else 0  # steps between a token's launch and its reading
        self.launched: deque[Report | None] = deque()

        self.graphs: dict[StepKind, Callable[[], Choice]] = {}  # decode steps
        self.uses_graphs = device.type == "cuda" and kernels.runs_triton(model.norm)
        if self.uses_graphs:
            self.graph_pool = torch.cuda.graph_pool_handle()
            # Now, while no slot is live and trial runs do no harm.
            with torch.inference_mode():
                warm_up(lambda: self._step(StepKind(), max_tokens))

    @property
    def active(self) -> int:
        """Requests in slots."""
        return sum(progress is not None for progress in self.seats)

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return len(self.queue)

    def submit(self, request: Request) -> None:
        """Puts a request into the queue. Raises UserError for one that no slot can take."""
        assert request.row not in self.rows, f"row {request.row} is here already"
        if not 0 < len(request.ids) < self.max_tokens:
            room = f"prompt and answer together have room for {self.max_tokens:,}"
            raise UserError(f"{request.where}: {len(request.ids):,} tokens, but {room}, and each has one at least")
        if request.logprobs is not None and not 0 <= request.logprobs <= MAX_LOGPROBS:
            raise UserError(f"{request.where}: {request.logprobs} logprobs, expected 0 to {MAX_LOGPROBS}")
        names = self.adapters.names if self.adapters else []
        if request.adapter is not None and request.adapter not in names:
            expected = " or ".join(names) or "none"
            raise UserError(f"{request.where}: no adapter {request.adapter:.60} here; expected {expected}")
        if not math.isfinite(request.adapter_scale):
            raise UserError(f"{request.where}: adapter_scale is {request.adapter_scale}, expected a real number")
        self.queue.append(request)
        self.rows.add(request.row)

    @torch.inference_mode()
    def advance(self) -> list[Event]:
        """One forward pass: a piece of prompts, or one more token for every slot, in turn while there is work of both.

        Returns what became known: at most one event a row. On a GPU it is what the pass before this one chose. A prompt
        that cannot be read is an event, too; an error of a decode step concerns all, and is raised.
        """
        if not self.rows:
            self.launched.clear()  # of rows that have ended
            return []
        if not self.reading:
            self.admit()
        decoding = any(progress is not None and progress.is_read for progress in self.seats)
        failures = []
        if self.reading and not (self.decodes_next and decoding):
            failures = self._launch_prefill()
        else:
            self._launch_step()
        return failures + (self._events(self.launched.popleft()) if len(self.launched) > self.lag else [])

    @torch.inference_mode()
    def cancel(self, row: int) -> None:
        """Ends a request, wherever it is; no event of it follows. A row that is not here is no mistake."""
        if row not in self.rows:
            return
        for progress in self.seats:
            if progress is not None and progress.request.row == row:
                self._leave(progress)
                self.state.live[progress.slot] = False
                return
        self.rows.remove(row)
        self.queue = deque(request for request in self.queue if request.row != row)

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Submits requests and advances until all have ended. What a caller leaves in the middle is cancelled."""
        requests = list(requests)
        try:
            for request in requests:
                self.submit(request)
            while self.rows:
                yield from self.advance()
        finally:
            for request in requests:
                self.cancel(request.row)

    def admit(self) -> list[Progress]:
        """Gives slots to the prompts of the next forward pass: as many as there are slots and prefill_tokens for, at
        least one."""
        free, n_tokens = [slot for slot, progress in enumerate(self.seats) if progress is None], 0
        for slot in free[: len(self.queue)]:
            n_tokens += len(self.queue[0].ids)
            if self.reading and (n_tokens > self.prefill_tokens or self.deterministic or self.n_alone):
                break
            progress = self.seats[slot] = Progress(self.queue.popleft(), slot)
            self.reading.append(progress)
        return self.reading

    def _launch_prefill(self) -> list[Event]:
        """Reads the next piece of `reading`. If that fails, the event of the request that could not be read."""
        progresses = list(self.reading)
        try:
            choice = self.prefill(progresses)
        except Exception as error:  # goes to whom it concerns; most likely memory was not enough
            return self._fail(progresses, error)
        self.decodes_next = True
        self.launched.append(None if choice is None else Report(choice, progresses))
        if choice is not None:
            self.reading = []
            self.n_alone = max(0, self.n_alone - 1)
        return []

    def _fail(self, progresses: list[Progress], error: Exception) -> list[Event]:
        """Of several prompts, each is read again alone: only the one that fails then has failed."""
        for progress in progresses:
            self._leave(progress)
            self.state.live[progress.slot] = False
        if len(progresses) == 1:
            self.n_alone = max(0, self.n_alone - 1)
            return [Event(progresses[0].request.row, None, "error", error=error)]
        for request in reversed([progress.request for progress in progresses]):
            self.queue.appendleft(request)
            self.rows.add(request.row)
        self.n_alone = len(progresses)
        return []

    def prefill(self, progresses: list[Progress]) -> Choice | None:
        """Reads prompts, or the next piece of a long one, into their slots; the first tokens, once all is read."""
        slots = [progress.slot for progress in progresses]
        self._prepare(slots, progresses)
        pieces = [p.request.ids[p.n_read : p.n_read + self.prefill_tokens] for p in progresses]
        hidden = self._read(pieces, slots)
        for progress, piece in zip(progresses, pieces, strict=True):
            progress.n_read += len(piece)
        if not progresses[0].is_read:  # then it is alone: `admit` admits nothing beside it
            # Decode steps write into the states of all slots.
            self.unread_states = self.cache.states(slots[0])
            return None
        self.unread_states, self.kind = [], None
        at = torch.tensor(slots, device=self.device)
        self.state.live[at] = True
        logits = self.model.logits(hidden)
        return Choice(self.state.emit(logits, at, StepKind.of(p.request for p in progresses)), logits)

    def _prepare(self, slots: list[int], progresses: list[Progress]) -> None:
        """Empty slots for new prompts, or what the earlier pieces of a prompt left."""
        if progresses[0].n_read == 0:
            self.cache.reset(slots)
            requests = [progress.request for progress in progresses]
            self.state.seat(slots, requests, self.max_tokens)
            self._seat_adapters(slots, requests)
        else:
            self.cache.set_states(slots[0], self.unread_states)

    def _seat_adapters(self, slots: list[int], requests: list[Request]) -> None:
        if self.adapters is not None:
            names, factors = [r.adapter for r in requests], [r.adapter_scale for r in requests]
            self.adapter_weights[torch.tensor(slots, device=self.device)] = self.adapters.weights(names, factors)

    def _read(self, pieces: list[list[int]], slots: list[int]) -> Tensor:
        """Continues the slots by these tokens; hidden states (n, D) of the last ones."""
        tokens = torch.tensor([token for piece in pieces for token in piece], device=self.device)
        bounds = torch.tensor([0, *map(len, pieces)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        rows = (bounds[1:] - 1).to(self.device, torch.int64)
        return self._forward(tokens, Documents(bounds, self.device), self.cache.at(slots), rows)

    def _launch_step(self) -> None:
        progresses = [p if p is not None and p.is_read else None for p in self.seats]
        longest = max(len(p.request.ids) + p.n_new for p in progresses if p is not None)
        # The host knows lengths `lag` steps late; a sequence may have grown since.
        choice = self.step(longest + self.lag)
        self.decodes_next = False
        self.launched.append(Report(choice, progresses))

    def step(self, longest: int) -> Choice:
        """One more token for every slot. No live sequence may become longer than `longest`."""
        if self.kind is None:
            self.kind = StepKind.of(p.request for p in self.seats if p is not None and p.is_read)
        if not self.uses_graphs:
            return self._step(self.kind, self.max_tokens if self.deterministic else longest)
        if self.kind not in self.graphs:
            self.graphs[self.kind] = self._captured(self.kind)
        return self.graphs[self.kind]()

    def _captured(self, kind: StepKind) -> Callable[[], Choice]:
        """A decode step as a graph, also while slots are live: the model is warm, and a copy warms up the choice."""
        logits = torch.zeros(self.slots, self.state.vocab_size, dtype=self.model.norm.dtype, device=self.device)
        trial = copy.deepcopy(self.state)
        warm_up(lambda: trial.emit(logits, slice(None), kind))
        # Its shapes are fixed, so it gets the whole cache; Triton's attention reads only the keys that a sequence has.
        return captured(lambda: self._step(kind, self.max_tokens), self.graph_pool)

    def _step(self, kind: StepKind, max_keys: int) -> Choice:
        view = self.cache.step(self.state.live, max_keys)
        logits = self.model.logits(self._forward(self.state.token, self.documents, view))
        return Choice(self.state.emit(logits, slice(None), kind), logits)

    def _forward(
        self, tokens: Tensor, documents: Documents, view: CacheView | StepView, rows: Tensor | None = None
    ) -> Tensor:
        """The one call of the model, for prompts and for decode steps."""
        weights = self.adapter_weights
        if weights is not None and isinstance(view, CacheView):  # a decode step has one token of every slot, in order
            weights = weights[view.slots[documents.index]]
        return self.model(tokens, documents, view, rows, weights)

    def _events(self, report: "Report | None") -> list[Event]:
        events = []
        for progress, event in report.read() if report is not None else ():
            progress.n_new += 1
            if event.finish:
                self._leave(progress)
            events.append(event)
        return events

    def _leave(self, progress: Progress) -> None:
        progress.ended = True
        self.seats[progress.slot] = self.kind = None
        self.rows.remove(progress.request.row)
        if progress in self.reading:
            self.reading.remove(progress)
            self.unread_states = []


class Report:
    """What a pass chose, on its way to the host while the next one runs, which writes its own to the same place."""

    def __init__(self, choice: Choice, progresses: Sequence[Progress | None]):
        """progresses: whose choice it is, in its order; None for a slot whose token means nothing."""
        self.progresses, tensors = progresses, [choice.report]
        if any(p is not None and p.request.logprobs is not None for p in progresses):
            tensors += log_probabilities(choice.logits, choice.report[0])
        self.values, self.ready = [x.to("cpu", non_blocking=True, copy=True) for x in tensors], None
        if choice.report.is_cuda:
            self.ready = torch.cuda.Event()
            self.ready.record()

    def read(self) -> Iterator[tuple[Progress, Event]]:
        """An event for each request that has not ended meanwhile: the pass was launched before that was known."""
        if self.ready is not None:
            self.ready.synchronize()
        (tokens, finishes), *logprobs = (x.tolist() for x in self.values)
        for i, progress in enumerate(self.progresses):
            if progress is None or progress.ended:
                continue
            event = Event(progress.request.row, tokens[i], REASONS.get(finishes[i], ""))
            if (count := progress.request.logprobs) is not None:
                logprob, top, ids = (rows[i] for rows in logprobs)
                pairs = list(zip(ids, top, strict=True))[:count]
                event = event._replace(logprob=logprob, top_logprobs=pairs)
            yield progress, event
