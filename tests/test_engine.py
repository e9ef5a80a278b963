"""Requests that come and go while the engine runs: an answer in a crowd is the answer alone, whatever the others ask,
when they come, leave, or fail."""

import random
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from psysafe.checkpoint.base import build
from psysafe.generation import engine as generation
from psysafe.generation import sampling, slot_state
from psysafe.generation.engine import Engine
from psysafe.generation.request import Request, RequestOptions
from psysafe.generation.sampling import Paths, Sampling
from psysafe.generation.slot_state import SlotState, StepKind
from psysafe.model.cache import Cache
from psysafe.model.config import ModelConfig
from psysafe.model.decoder import Qwen3_5
from tests.mistakes import refused
from tests.oracles import reference_model

VOCAB, ROOM = 97, 90
EOS, CLOSING, THINK_END = [3, 50], [20, 21, 22], 21


def model_of(dtype=torch.float32) -> Qwen3_5:
    reference = reference_model(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    model = build(ModelConfig.from_dict(reference.config.to_dict()), "cpu", dtype)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        p.data.copy_(torch.randn(p.shape) * (0.5 if p.dim() == 1 else 0.15))
        if name.endswith("norm"):
            p.data.add_(1)
    return model


@pytest.fixture(scope="module")
def model():
    return model_of()


def prompt(n: int) -> list[int]:
    return torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist()


OPTIONS = {
    "greedy": RequestOptions(max_new_tokens=12),
    "top-k": RequestOptions(Sampling(1.0, top_k=20, top_p=0.95, seed=3), 9),
    "temperature": RequestOptions(Sampling(1.3, seed=2**40), 14),
    "top-p": RequestOptions(Sampling(1.5, top_p=0.8, min_p=0.01), 10),
    "large top-k": RequestOptions(Sampling(1.5, top_k=80), 10),
    "penalties": RequestOptions(Sampling(1.0, 40, 0.9, 0.02, 1.3, 0.5, 1, 0.3), 16),
    "greedy with penalties": RequestOptions(Sampling(repetition_penalty=1.5), 11),
    "think budget": RequestOptions(Sampling(1.0), 15, max_think_tokens=3),
    "closes at eos": RequestOptions(Sampling(2.0), 25, close_thinking_at_eos=True),
    "no thinking": RequestOptions(Sampling(2.0), 25, thinking=False),
}
LENGTHS = (1, 2, 9, 30, 5, 63, 17, 4, 33, 12)
CROWD = [
    Request(row, prompt(n), options=options, choice=100 + row, logprobs=row % 3 or None)
    for row, (n, options) in enumerate(zip(LENGTHS, OPTIONS.values(), strict=True))
]


def engine_for(model, slots=4, lag=0, **more) -> Engine:
    engine = Engine(model, slots, ROOM, EOS, CLOSING, THINK_END, **more)
    engine.lag = lag
    return engine


def drained(engine: Engine, events=()) -> dict[int, list]:
    """The events of every row, once all have ended."""
    by_row = {}
    while engine.rows:
        events = [*events, *engine.advance()]
    for event in events:
        by_row.setdefault(event.row, []).append(event)
    return by_row


def ids(events) -> list[int]:
    return [event.token for event in events]


@pytest.fixture(scope="module")
def alone(model):
    """Each request's events, with nobody else in the slots."""
    engine, events = engine_for(model), {}
    for request in CROWD:
        engine.submit(request)
        events |= drained(engine)
    assert {events[row][-1].finish for row in events} == {"stop", "length"}
    return events


def crowded(model, seed, lag, **more):
    """Requests come at random moments, in a random order, and a third is cancelled at one."""
    draw, engine, events = random.Random(seed), engine_for(model, lag=lag, **more), []
    waiting = draw.sample(CROWD, len(CROWD))
    leaving = {request.row: draw.randint(0, 12) for request in waiting[:3]}
    draw.shuffle(waiting)
    submitted, passes = set(), 0
    while waiting or engine.rows:
        for _ in range(draw.choice((0, 0, 1, 3))):
            if waiting:
                submitted.add(waiting[-1].row)
                engine.submit(waiting.pop())
        events += engine.advance()
        passes += 1
        for row in [row for row in leaving if row in submitted]:
            leaving[row] -= 1
            if leaving[row] < 0:
                del leaving[row]
                engine.cancel(row)
                events.append(("cancelled", row))
        assert passes < 1000
    assert engine.active == engine.queued == 0 and not engine.state.live.any()
    return events


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("more", [{}, {"prefill_tokens": 8}, {"deterministic": True}, {"slots": 1}], ids=str)
def test_an_answer_in_a_crowd_is_the_answer_alone(more, lag, model, alone):
    """Late, cancelled and long ones among them, of all kinds of options. Of a cancelled one nothing more is heard."""
    for seed in range(2):
        by_row, cancelled = {}, set()
        for event in crowded(model, seed, lag, **more):
            if event[0] == "cancelled":
                cancelled.add(event[1])
            else:
                assert event.row not in cancelled
                by_row.setdefault(event.row, []).append(event)
        complete = [row for row in by_row if by_row[row][-1].finish]
        assert len(complete) >= len(CROWD) - 3
        for row, events in by_row.items():
            expected = alone[row] if row in complete else alone[row][: len(events)]
            assert ids(events) == ids(expected)
            assert [event.finish for event in events] == [event.finish for event in expected]


def keep_live(self, row):
    """Forgets the device when a row is cancelled: the slot goes on, and its next request begins in the middle."""
    for progress in self.seats:
        if progress is not None and progress.request.row == row:
            self._leave(progress)


def restore_nothing(self, slot, states):
    pass


def first_kind(requests, right=StepKind.of):
    return right(list(requests)[:1])


def slot_named(self, slots, requests, max_tokens, right=SlotState.seat):
    right(self, slots, [replace(r, choice=slot) for slot, r in zip(slots, requests, strict=True)], max_tokens)


def close_again(self, token, at, right=SlotState._close_thinking):
    self.n_closing[at] = len(self.closing)
    return right(self, token, at)


def count_all(self, slot, ids):
    """The counts of the slot's last request stay."""
    self.prompted = self._per_slot(self.vocab_size, dtype=torch.bool) if self.prompted is None else self.prompted
    self.written = self._per_slot(self.vocab_size, dtype=torch.int32) if self.written is None else self.written
    self.prompted[slot, self._tensor(ids)] = True


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (Engine, "cancel", keep_live),
        (Cache, "set_states", restore_nothing),
        (StepKind, "of", first_kind),
        (SlotState, "seat", slot_named),
        (SlotState, "_close_thinking", close_again),
        (SlotState, "_count_prompt", count_all),
    ],
)
def test_a_crowd_that_disturbs_is_caught(owner, name, wrong, model, alone, monkeypatch):
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((AssertionError, TypeError)):
        for more in ({}, {"prefill_tokens": 8}, {"slots": 1}):
            test_an_answer_in_a_crowd_is_the_answer_alone(more, 0, model, alone)


def test_a_step_computes_only_what_somebody_in_it_needs(model, monkeypatch):
    """Greedy rows sort and draw nothing; the kind follows those who come and go."""
    kinds = []
    emit = SlotState.emit
    monkeypatch.setattr(SlotState, "emit", lambda self, x, at, kind: kinds.append(kind) or emit(self, x, at, kind))
    engine = engine_for(model)
    engine.submit(Request(0, [1], options=replace(OPTIONS["greedy"], max_new_tokens=9)))
    for _ in range(3):
        engine.advance()
    engine.submit(Request(1, [1], options=OPTIONS["top-k"]))
    for _ in range(3):
        engine.advance()
    engine.cancel(1)
    drained(engine)
    paths = [kind.paths for kind in kinds]
    window = Paths(window=True)
    assert paths == [Paths()] * 3 + [window] * 3 + [Paths()] * (len(paths) - 6)
    assert [Paths.of(options.sampling) for options in OPTIONS.values()][2:6] == [
        Paths(vocabulary=True), Paths(vocabulary=True, ordered=True), Paths(vocabulary=True, ordered=True),
        Paths(window=True, penalties=True),
    ]  # fmt: skip
    monkeypatch.setattr(sampling, "filtered", None)
    engine.submit(Request(2, [1], options=OPTIONS["greedy"]))
    drained(engine)


def test_a_graph_for_each_kind_of_step(model, alone, monkeypatch):
    """Captured while others are in their slots, and warmed up on copies. Here the step itself stands in for a graph."""
    monkeypatch.setattr(generation, "captured", lambda step, pool: step)
    monkeypatch.setattr(generation, "warm_up", lambda step: [step(), step()])
    engine = engine_for(model)
    engine.uses_graphs, engine.graph_pool = True, None
    for request in CROWD:
        engine.submit(request)
    events = drained(engine)
    assert {row: ids(events[row]) for row in events} == {row: ids(alone[row]) for row in alone}
    assert 3 <= len(engine.graphs) <= 12 and {kind.closes for kind in engine.graphs} == {False, True}


@pytest.mark.parametrize("lag", [0, 1])
def test_a_long_prompt_holds_up_no_stream(lag, model, alone):
    """It is read one piece an advance, and in between the others get their tokens."""
    engine, long = engine_for(model, lag=lag, prefill_tokens=8), replace(CROWD[5], options=OPTIONS["no thinking"])
    stream = replace(CROWD[0], options=replace(OPTIONS["greedy"], max_new_tokens=30))
    engine.submit(stream)
    for _ in range(2 + lag):
        engine.advance()
    engine.submit(long)
    heard, n_passes = [], 0
    while long.row not in heard:
        heard += [event.row for event in engine.advance()]
        n_passes += 1
    assert n_passes >= 2 * 63 // 8 and heard.count(stream.row) >= 63 // 8


def test_a_prompt_that_cannot_be_read_fails_alone(model, alone, monkeypatch):
    """Those that were read with it are read again, and answered as ever; the slot is free again."""
    forward, passes = Qwen3_5.forward, []

    def fails(self, tokens, documents, *rest):
        passes.append(len(tokens))
        if 96 in tokens.tolist() and len(tokens) != 4:
            raise torch.OutOfMemoryError("no memory")
        return forward(self, tokens, documents, *rest)

    monkeypatch.setattr(Qwen3_5, "forward", fails)
    short = [request for request in CROWD if 96 not in request.ids][:4]
    bad = Request(77, [1, 96, 1], "rows.jsonl row 8")
    for lag in (0, 1):
        engine = engine_for(model, lag=lag)
        for request in (*short[:2], bad, *short[2:]):
            engine.submit(request)
        events = drained(engine)
        (failure,) = events.pop(bad.row)
        assert (failure.token, failure.finish) == (None, "error") and "no memory" in str(failure.error)
        assert {row: ids(e) for row, e in events.items()} == {r.row: ids(alone[r.row]) for r in short}
        assert engine.active == 0 and not engine.state.live.any()
        (event,) = engine.run([bad])
        assert event.error is not None


def test_deterministic_answers_have_the_same_bits(model, monkeypatch):
    """Log-probabilities to the last bit. Otherwise they differ: prompts read together, another number of keys."""
    requests = [replace(request, logprobs=5) for request in CROWD]

    def bits(**more):
        engine = engine_for(model, **more)
        for request in requests:
            engine.submit(request)
        together, single = drained(engine), {}
        for request in requests:
            engine.submit(request)
            single |= drained(engine)
        return together, single

    together, single = bits(deterministic=True)
    assert together == single
    together, single = bits()
    assert together != single


def test_log_probabilities_are_the_models(model, alone):
    """Against the whole text in one forward pass; whatever penalties, temperature and filters do to the choice."""
    for request in CROWD:
        events, tokens = alone[request.row], request.ids + ids(alone[request.row])
        if request.logprobs is None:
            assert all(event.logprob is None and event.top_logprobs is None for event in events)
            continue
        with torch.inference_mode():
            hidden = model(torch.tensor(tokens), torch.tensor([0, len(tokens)], dtype=torch.int32))
            logp = model.logits(hidden).double().log_softmax(-1)[len(request.ids) - 1 : -1]
        for event, expected in zip(events, logp, strict=True):
            assert abs(event.logprob - expected[event.token]) < 1e-4
            top = expected.topk(request.logprobs)
            assert [token for token, _ in event.top_logprobs] == top.indices.tolist()
            assert (torch.tensor([p for _, p in event.top_logprobs]) - top.values).abs().max() < 1e-4


def test_the_choice_and_the_seed_name_the_random_numbers(model):
    """Not the row, nor when it comes: a seed repeats."""
    options = OPTIONS["temperature"]
    requests = [Request(row, prompt(5), options=options, choice=choice) for row, choice in enumerate((7, 7, 8))]
    first, again, other = drained_all(engine_for(model), requests)
    assert first == again != other
    seeded = replace(options, sampling=replace(options.sampling, seed=1))
    assert drained_all(engine_for(model), [Request(9, prompt(5), options=seeded, choice=7)])[0] != first
    by_row = drained_all(engine_for(model), [Request(7, prompt(5), options=options)])[0]
    assert by_row == first


def drained_all(engine, requests) -> list[list[int]]:
    for request in requests:
        engine.submit(request)
    events = drained(engine)
    return [ids(events[request.row]) for request in requests]


def test_a_frequency_penalty_counts(model):
    """Greedy, against a loop over whole forward passes: every time that the answer holds a token costs the penalty."""
    tokens, n_prompt, penalty = prompt(9), 9, 0.8
    for _ in range(20):
        with torch.inference_mode():
            hidden = model(torch.tensor(tokens), torch.tensor([0, len(tokens)], dtype=torch.int32))
            logits = model.logits(hidden)[-1]
        counts = torch.bincount(torch.tensor(tokens[n_prompt:], dtype=torch.int64), minlength=VOCAB)
        tokens.append(int((logits - penalty * counts).argmax()))
    options = RequestOptions(Sampling(frequency_penalty=penalty), 20)
    engine = Engine(model, 2, ROOM, [])
    assert drained_all(engine, [Request(1, prompt(9), options=options)])[0] == tokens[n_prompt:]
    assert max(tokens[n_prompt:].count(token) for token in tokens) > 1  # else presence alone would do


def test_an_end_token_in_the_reasoning_closes_it(model, monkeypatch):
    """Once: what the model says while the closing text is written is lost, also another end token."""
    said = [5, 3, 3, 50, 8, 9, 3]
    scripted = lambda logits, settings, paths, at, *seen: torch.tensor([said[i] for i in at.tolist()])  # noqa: E731
    monkeypatch.setattr(slot_state, "choose", scripted)
    engine = engine_for(model, slots=1)

    def answer(**options):
        engine.submit(Request(1, [1], options=RequestOptions(max_new_tokens=20, **options)))
        events = drained(engine)[1]
        return ids(events), events[-1].finish

    assert answer(close_thinking_at_eos=True) == ([5, *CLOSING, 8, 9, 3], "stop")
    assert answer() == ([5, 3], "stop")
    assert answer(close_thinking_at_eos=True, thinking=False) == ([5, 3], "stop")
    assert answer(close_thinking_at_eos=True, max_think_tokens=2) == ([5, *CLOSING, 8, 9, 3], "stop")
    assert answer(close_thinking_at_eos=True, max_think_tokens=1) == ([5, *CLOSING, 8, 9, 3], "stop")


def test_who_is_here(model):
    engine = engine_for(model, slots=2)
    assert engine.advance() == [] and (engine.active, engine.queued) == (0, 0)
    for row in range(4):
        engine.submit(Request(row, [row + 1]))
    assert (engine.active, engine.queued) == (0, 4)
    engine.advance()
    assert (engine.active, engine.queued) == (2, 2)
    engine.cancel(0)
    engine.cancel(3)
    engine.cancel(99)
    assert (engine.active, engine.queued) == (1, 1)
    assert {event.row for _ in range(2) for event in engine.advance()} == {1, 2}
    assert (engine.active, engine.queued) == (2, 0)
    engine.submit(Request(3, [1]))  # free again
    for row in (1, 2, 3):
        engine.cancel(row)
    assert (engine.active, engine.queued) == (0, 0) and engine.advance() == []


def test_what_no_slot_can_take_is_refused(model):
    engine = engine_for(model)
    refused("row 7: 90 tokens, but prompt and answer together have room for 90",
            engine.submit, Request(1, [1] * ROOM, "row 7"))  # fmt: skip
    refused("prompt 1: 0 tokens", engine.submit, Request(1, []))
    refused("prompt 1: 21 logprobs, expected 0 to 20", engine.submit, Request(1, [1], logprobs=21))
    refused("prompt 1: no adapter mine here", engine.submit, Request(1, [1], adapter="mine"))
    assert engine.queued == 0 and not engine.rows


class CacheWrites(TorchDispatchMode):
    """Whether torch was asked for determinism at each write by index into a cache."""

    def __init__(self, cache):
        super().__init__()
        self.places = {x.untyped_storage()._cdata for layer in cache.layers for x in layer}
        self.asked: dict[str, list[bool]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        writes = name in ("index_put_", "_index_put_impl_", "index_copy_", "scatter_")
        if writes and args[0].untyped_storage()._cdata in self.places:
            self.asked.setdefault(name, []).append(torch.are_deterministic_algorithms_enabled())
        return func(*args, **(kwargs or {}))


def test_a_cache_is_written_without_sorting_or_copying_it(model):
    """What torch does on a GPU where determinism is asked for: prompts in pieces, several at once, and decode steps."""
    before = torch.get_deterministic_debug_mode()
    try:
        torch.set_deterministic_debug_mode("warn")
        engine = Engine(model, 3, ROOM, EOS, CLOSING, THINK_END, prefill_tokens=8)
        options = RequestOptions(max_new_tokens=4)
        with CacheWrites(engine.cache) as writes:
            list(engine.run(Request(i, prompt(n), options=options) for i, n in enumerate((3, 4, 20))))
        assert torch.get_deterministic_debug_mode() == 1
    finally:
        torch.set_deterministic_debug_mode(before)
    assert writes.asked.keys() == {"index_put_", "index_copy_"}
    assert not any(map(any, writes.asked.values())), writes.asked
