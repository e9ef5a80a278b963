"""Text in, text out: prompts are prefilled into cache slots, all slots decode together, and a slot whose sequence ends
takes the next prompt of the queue (continuous batching, as in Orca, OSDI 2022).

    generator = Generator(model, tokenizer, Options(Sampling(temperature=0.6, top_k=20, top_p=0.95)))
    for answer in generator.answers([[{"role": "user", "content": "..."}], ...]):
        answer.row, answer.reasoning, answer.answer

A decode step has fixed shapes and never waits for the device: sampling, stops and the think budget are decided there,
and on a GPU the host reads the tokens one step late. With Triton the step is one CUDA graph there.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from kernels import Documents
from psysafe.data.tokenizer import THINK_END, Message, Tokenizer
from psysafe.generation.sampling import Sampling, choose, setting
from psysafe.model.cache import Cache
from psysafe.model.decoder import Qwen3_5
from psysafe.program import UserError

RUNNING, LENGTH, STOP = range(3)  # STOP wins over LENGTH
REASONS = {STOP: "stop", LENGTH: "length"}
# Decoding reads all weights once a step, whatever the batch: more slots are almost free until arithmetic dominates.
MOST_SLOTS = {"cuda": 64, "cpu": 8}
CACHE_SHARE = 0.8  # of the free memory; the rest is for activations and logits
CLOSING = f"\n{THINK_END}\n\n"  # what the template puts between reasoning and answer

OnToken = Callable[[int, int], None]


@dataclass(frozen=True)
class Options:
    """What to generate and in how much memory; the defaults are those of `generate.py`."""

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = setting(2048, "Tokens of an answer, its reasoning included.")
    max_think_tokens: int = setting(0, "Reasoning longer than this is closed, and the answer begins; 0 for no limit.")
    thinking: bool = setting(True, "Let the model reason before it answers, as it has learnt to.")
    batch_size: int = setting(0, "Sequences decoded together; 0 for what fits in memory, up to 64 (CPU: 8).")
    context: int = setting(0, "Room for prompt and answer together, in tokens; 0 for what is needed.")
    prefill_tokens: int = setting(4096, "Most prompt tokens in one forward pass; longer prompts are read in pieces.")

    def __post_init__(self):
        for name in ("max_new_tokens", "max_think_tokens", "batch_size", "context", "prefill_tokens"):
            least = 1 if name in ("max_new_tokens", "prefill_tokens") else 0
            if getattr(self, name) < least:
                raise UserError(f"{name.replace('_', '-')} is {getattr(self, name)}, expected at least {least}")

    def fingerprint_fields(self) -> dict:
        """What answers depend on, flat: how many are computed together is not part of it."""
        kept = {key: value for key, value in asdict(self).items() if key not in ("batch_size", "prefill_tokens")}
        return kept | kept.pop("sampling")


@dataclass(frozen=True)
class Answer:
    """What the model wrote for a row. finish_reason: "stop" at an end-of-text token, "length" at a limit."""

    row: int
    response: str
    reasoning: str
    answer: str
    finish_reason: str
    prompt_tokens: int
    new_tokens: int
    unfinished_thinking: bool  # the think block never closed: everything is reasoning, and there is no answer


class Generator:
    """A model and a tokenizer as one function from conversations to answers. The model must not change meanwhile: a
    CUDA graph keeps to the tensors and adapters that it was captured with."""

    def __init__(
        self,
        model: Qwen3_5,
        tokenizer: Tokenizer,
        options: Options | None = None,
        say: Callable[[str], object] | None = None,
    ):
        """say: where to report how much memory the slots take, whenever slots are made."""
        self.model, self.tokenizer, self.options, self.say = model, tokenizer, options or Options(), say
        self.engine: Engine | None = None

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The conversation as the prompt's ids. UserError for one that the chat template refuses."""
        return self.tokenizer.encode(self.tokenizer.render(messages, True, self.options.thinking))

    def answers(
        self,
        conversations: Sequence[Sequence[Message]],
        rows: Sequence[int] | None = None,
        on_token: OnToken | None = None,
    ) -> Iterator["Answer"]:
        """Answers in the order in which they are finished. A row's number (default: 1, 2, ...) names its random
        numbers. on_token(row, id) sees every token as soon as it is known."""
        rows = range(1, len(conversations) + 1) if rows is None else rows
        return self.complete([Request(r, self.encode(c)) for r, c in zip(rows, conversations, strict=True)], on_token)

    def complete(self, requests: Sequence["Request"], on_token: OnToken | None = None) -> Iterator["Answer"]:
        """As `answers`, for prompts that are token ids already. Raises UserError for one that no slot can hold."""
        if requests:
            self._prepare(requests)
            for progress in self.engine.run(requests, on_token):
                yield self._answer(progress)

    def _prepare(self, requests: Sequence["Request"]) -> None:
        """Makes an engine for these requests, unless the one at hand will do."""
        options, longest = self.options, max(len(request.ids) for request in requests)
        positions = self.model.config.max_position_embeddings
        if options.context > positions:
            raise UserError(f"--context {options.context:,}: the model was made for {positions:,} tokens at most")
        limit = options.context or min(longest + options.max_new_tokens, positions)
        for request in requests:
            if len(request.ids) >= limit:
                remedy = "raise --context or shorten it" if limit < positions else "the model's limit; shorten it"
                raise UserError(
                    f"{request.name or f'prompt {request.row}'}: {len(request.ids):,} tokens, but prompt and answer "
                    f"together have room for {limit:,}; {remedy}"
                )
        wanted = min(len(requests), options.batch_size or MOST_SLOTS[self.model.embed_tokens.device.type])
        cache = self.engine and self.engine.cache
        if cache is not None and cache.max_tokens >= limit and cache.slots >= wanted:
            return
        self.engine = cache = None  # what it held is free memory for the next one
        slots = choose_slots(self.model, limit, wanted, exactly=options.batch_size > 0)
        tokenizer = self.tokenizer
        closing = tokenizer.encode(CLOSING)
        self.engine = Engine(self.model, options, slots, limit, tokenizer.eos_ids, closing, tokenizer.think_end_id)
        if self.say is not None:
            each = self.engine.cache.bytes_per_slot / 1e6
            self.say(f"memory for {slots} x {limit:,} tokens: {each:,.1f} MB each, {slots * each:,.1f} MB in all")

    def _answer(self, progress: "Progress") -> "Answer":
        text = self.tokenizer.decode(progress.ids[:-1] if progress.finish == STOP else progress.ids)
        reasoning, end, answer = text.partition(THINK_END) if self.options.thinking else ("", "", text)
        return Answer(
            row=progress.request.row,
            response=text,
            reasoning=reasoning.strip(),
            answer=answer.rpartition(THINK_END)[2].strip(),
            finish_reason=REASONS[progress.finish],
            prompt_tokens=len(progress.request.ids),
            new_tokens=len(progress.ids),
            unfinished_thinking=self.options.thinking and not end,
        )


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

    What a slot is doing stands in tensors (slots,) on the device: the token that it is fed next, its row, the tokens
    made and the most it may make, whether it is live, whether its think block is open, and how many tokens of the
    forced closing text have been emitted.
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
        self.model, self.options, self.think_end_id = model, options, think_end_id
        self.device = device = model.embed_tokens.device
        self.cache = Cache(model.config, slots, max_tokens, device, model.embed_tokens.dtype)
        self.documents = Documents(torch.arange(slots + 1, dtype=torch.int32), device)
        self.ends = torch.zeros(model.config.vocab_size, dtype=torch.int64, device=device)
        self.ends[self._tensor([token for token in eos_ids if token < model.config.vocab_size])] = STOP
        self.closing = torch.tensor(closing, dtype=torch.int64, device=device)
        self.token, self.row, self.made, self.limit, self.closed = torch.zeros(
            5, slots, dtype=torch.int64, device=device
        )
        self.live, self.thinking = torch.zeros(2, slots, dtype=torch.bool, device=device)
        self.prompted = self.written = None
        if options.sampling.penalises:
            self.prompted, self.written = torch.zeros(
                2, slots, model.config.vocab_size, dtype=torch.bool, device=device
            )
        self.lag = 1 if device.type == "cuda" else 0  # steps between a token's launch and its reading
        self.graph: Callable[[], Tensor] | None = None  # a decode step
        if device.type == "cuda" and kernels.runs_triton(model.norm):
            # Captured now, while its trial runs do no harm. Its shapes are fixed, so it gets the whole cache; Triton's
            # attention reads only the keys that a sequence has.
            self.graph = captured(lambda: self._step(max_tokens))

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], on_token: OnToken | None = None) -> Iterator[Progress]:
        """Yields every request as it ends. Prompts must be shorter than the cache's max_tokens."""
        assert all(0 < len(request.ids) < self.cache.max_tokens for request in requests)
        self.live.zero_()  # an earlier run may have been left in the middle
        queue, seats = deque(requests), [None] * self.cache.slots
        launched: deque[tuple[Report, list[Progress | None]]] = deque()
        while queue or any(seats):
            free = [slot for slot, seat in enumerate(seats) if seat is None]
            if queue and free:
                admitted = self._next(queue, free)
                for progress in admitted:
                    seats[progress.slot] = progress
                launched.append((Report(self._prefill(admitted)), admitted))
            else:
                longest = max(len(seat.request.ids) + len(seat.ids) for seat in seats if seat is not None)
                launched.append((Report(self.step(longest + self.lag)), list(seats)))
            while len(launched) > self.lag:
                report, progresses = launched.popleft()
                for progress, token, finish in zip(progresses, *report.read(), strict=True):
                    if progress is None or progress.finish:  # a step launched before its end was known
                        continue
                    progress.ids.append(token)
                    progress.finish = finish
                    if on_token is not None:
                        on_token(progress.request.row, token)
                    if finish:
                        seats[progress.slot] = None
                        yield progress

    def _next(self, queue: deque[Request], free: list[int]) -> list[Progress]:
        """The prompts of the next forward pass: as many as there are slots and prefill_tokens for, at least one."""
        taken, tokens = [], 0
        while queue and len(taken) < len(free):
            tokens += len(queue[0].ids)
            if taken and tokens > self.options.prefill_tokens:
                break
            taken.append(Progress(queue.popleft(), free[len(taken)]))
        return taken

    def _prefill(self, admitted: list[Progress]) -> Tensor:
        """Reads prompts into their slots; the report (2, n) of their first tokens."""
        slots, prompts = [p.slot for p in admitted], [p.request.ids for p in admitted]
        self.cache.reset(slots)
        at, most = self._tensor(slots), self.options.prefill_tokens
        self.row[at] = self._tensor([p.request.row for p in admitted])
        self.limit[at] = self._tensor(
            [min(self.options.max_new_tokens, self.cache.max_tokens - len(ids)) for ids in prompts]
        )
        self.made[at], self.closed[at] = 0, len(self.closing)
        self.live[at], self.thinking[at] = True, self.options.thinking
        if self.prompted is not None:
            self.prompted[at], self.written[at] = False, False
            for slot, ids in zip(slots, prompts, strict=True):
                self.prompted[slot, self._tensor(ids)] = True
        while len(prompts[0]) > most:  # then it is alone
            self._read([prompts[0][:most]], slots)
            prompts = [prompts[0][most:]]
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

    def _step(self, room: int) -> Tensor:
        hidden = self.model(self.token, self.documents, self.cache.step(self.live, room))
        return self._emit(self.model.logits(hidden), slice(None))

    def _emit(self, logits: Tensor, at: Tensor | slice) -> Tensor:
        """Chooses the next token of the slots `at` from logits (n, V) and decides what ends.

        The report (2, n) int64: tokens, and RUNNING, STOP or LENGTH. Slots that are not live report noise.
        """
        made, live, sampling = self.made[at], self.live[at], self.options.sampling
        seen = () if self.prompted is None else (self.prompted[at], self.written[at])
        token = choose(logits, sampling, self.row[at], made, *seen)
        if self.options.max_think_tokens:
            thinking, closed = self.thinking[at], self.closed[at]
            closed = closed.masked_fill(thinking & (made == self.options.max_think_tokens), 0)
            closing = closed < len(self.closing)
            token = torch.where(closing, self.closing[closed.clamp(max=len(self.closing) - 1)], token)
            self.closed[at] = closed + closing
            self.thinking[at] = thinking & (token != self.think_end_id)
        made = made + live
        finish = torch.maximum(self.ends.index_select(0, token), made >= self.limit[at])
        self.token[at], self.made[at], self.live[at] = token, made, live & (finish == RUNNING)
        if seen:
            self.written[at] = seen[1].scatter(1, token[:, None], True)
        return torch.stack([token, finish])

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


@torch.inference_mode()
def captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as one CUDA graph, replayed by a launch of a few microseconds. Its result lies in the same memory each
    time. The step must be harmless while no slot is live: it runs before it is captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # for whatever is compiled or allocated at first use
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        report = step()

    def replay() -> Tensor:
        graph.replay()
        return report

    return replay


def choose_slots(model: Qwen3_5, max_tokens: int, wanted: int, exactly: bool) -> int:
    """How many sequences of max_tokens fit in free memory, at most `wanted`. Raises UserError when none does, or fewer
    than wanted `exactly`."""
    device = model.embed_tokens.device
    each = Cache(model.config, 1, max_tokens, "meta", model.embed_tokens.dtype).bytes_per_slot
    free = memory_free(device)
    fit = int(free * CACHE_SHARE / each)
    least = wanted if exactly else 1
    if fit < least:
        raise UserError(
            f"{least} x {max_tokens:,} tokens need {least * each / 1e6:,.1f} MB of cache, but of {free / 1e6:,.1f} MB "
            f"free memory it may take {CACHE_SHARE:.0%}; lower --batch-size, --context or --max-new-tokens"
        )
    return min(wanted, fit)


def memory_free(device: torch.device) -> int:
    """Bytes that can still be had on the device."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # no Linux: count what is unused, or half of all
        pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages) // 2
