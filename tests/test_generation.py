"""Generation against transformers: greedy ids, sampling filters, frequencies; and against itself: the same ids whatever
the batch, the slots, the order of the queue, the pieces of a prompt, or how late the host looks."""

import math
import random
import re

import pytest
import torch
import transformers

import kernels
from kernels.proof.closeness import relative_error
from psysafe import load_model
from psysafe.checkpoint.base import build
from psysafe.data.tokenizer import THINK_END, Tokenizer
from psysafe.generation import sampling, slot_state
from psysafe.generation import slots as cache_slots
from psysafe.generation.engine import Engine
from psysafe.generation.generator import Generator
from psysafe.generation.request import Options, Request
from psysafe.generation.sampling import Paths, Sampling, SamplingRows, choose, filtered, gumbel, penalised
from psysafe.model.cache import Cache, StepView
from psysafe.model.lora import attach, fused_layers, merge_adapters
from tests.mistakes import refused
from tests.oracles import both_models, randomise_lora_B, reference_model, write_checkpoint
from tests.tiny_text_model import byte_tokenizer, write_text_model

NEW = 20
VOCAB = 97
PROMPTS = [
    torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (1, 2, 63, 64, 65, 9, 30, 5)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """transformers' model and ours by config, built once."""
    pairs = {}

    def get(name="published pattern"):
        if name not in pairs:
            pairs[name] = both_models(tmp_path_factory.mktemp("model"), name)
        return pairs[name]

    return get


def generated_by_transformers(reference, eos, new=NEW):
    """Prompt by prompt, so that nothing is padded. The mask: it would take a pad id inside a prompt for padding. Its
    cache cannot do without a layer of attention."""
    cached = "full_attention" in reference.config.layer_types
    generated_ids = []
    for prompt in PROMPTS:
        x = torch.tensor([prompt])
        ids = reference.generate(
            x,
            attention_mask=torch.ones_like(x),
            max_new_tokens=new,
            do_sample=False,
            use_cache=cached,
            eos_token_id=eos,
            pad_token_id=0,
        )
        generated_ids.append(ids[0, len(prompt) :].tolist())
    return generated_ids


@pytest.fixture(scope="module")
def expected(models):
    """config -> (eos ids, greedy ids). The eos ids are such that some prompts end early and others do not."""
    by_config = {}

    def get(name):
        if name not in by_config:
            free = generated_by_transformers(models(name)[0], None)
            eos = [free[0][3], free[2][7]]
            stopped = []
            for ids in free:  # eos only cuts greedy text, so one run serves both
                ends = [i for i, token in enumerate(ids) if token in eos]
                stopped.append(ids[: ends[0] + 1] if ends else ids)
            by_config[name] = eos, stopped
        return by_config[name]

    return get


def engine_for(model, slots, max_tokens, eos, lag=0, **more):
    """Its decode steps check that they read all the keys that live sequences have."""
    engine = Engine(model, slots, max_tokens, eos, **more)
    engine.lag = lag
    step = engine.step

    def long_enough_for_all(longest):
        lengths = (engine.cache.lengths + 1)[engine.state.live]
        assert not len(lengths) or longest >= lengths.max()
        return step(longest)

    engine.step = long_enough_for_all
    return engine


def collected(events):
    """(ids, how they ended) by row."""
    ids, finishes = {}, {}
    for event in events:
        assert event.error is None and event.row not in finishes
        ids.setdefault(event.row, []).append(event.token)
        if event.finish:
            finishes[event.row] = event.finish
    return ids, finishes


def generated(model, eos, slots=3, order=None, lag=0, options=None, prompts=PROMPTS):
    """Ids by prompt; the queue in another order if wanted."""
    options = options or Options(max_new_tokens=NEW)
    longest = max(map(len, prompts)) + NEW
    engine = engine_for(model, slots, longest, eos, lag, prefill_tokens=options.prefill_tokens)
    requests = [Request(row, ids, options=options) for row, ids in enumerate(prompts)]
    ids, finishes = collected(engine.run([requests[i] for i in order or range(len(requests))]))
    assert sorted(finishes) == list(range(len(prompts)))
    for row, finish in finishes.items():
        assert finish == ("stop" if ids[row][-1] in eos else "length")
    return [ids[row] for row in range(len(prompts))]


REQUESTS = [Request(row, prompt, options=Options(max_new_tokens=NEW)) for row, prompt in enumerate(PROMPTS)]
SHUFFLED = random.Random(0).sample(range(len(PROMPTS)), len(PROMPTS))


def test_eos_cuts_as_transformers_does(models, expected):
    eos, ids = expected("published pattern")
    assert generated_by_transformers(models()[0], eos) == ids
    assert {len(x) < NEW for x in ids} == {True, False}


@pytest.mark.parametrize("name", ["published pattern", "attention first", "delta net only, taps 3", "wide heads"])
def test_greedy_ids_equal_transformers(name, models, expected):
    eos, ids = expected(name)
    assert generated(models(name)[1], eos) == ids


@pytest.mark.parametrize("options", [Options(max_new_tokens=NEW), Options(max_new_tokens=NEW, prefill_tokens=7)])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(("slots", "order"), [(1, None), (3, SHUFFLED), (8, None), (8, SHUFFLED), (11, None)])
def test_ids_do_not_depend_on_the_batch(slots, order, lag, options, models, expected):
    """Slots, queue, pieces of 7 tokens instead of whole prompts, and a host that reads one step late, as on a GPU."""
    eos, ids = expected("published pattern")
    assert generated(models()[1], eos, slots, order, lag, options) == ids


SAMPLED = {
    "temperature": Sampling(temperature=1.0, seed=3),
    "recommended": Sampling(temperature=0.6, top_k=20, top_p=0.95, seed=3),
    "everything": Sampling(1.3, 40, 0.9, 0.02, 1.2, 0.5, 2**40 + 1),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_ids_do_not_depend_on_the_batch(name, models):
    options = Options(SAMPLED[name], max_new_tokens=NEW)
    first = generated(models()[1], [3], 1, None, 0, options)
    assert first != generated(models()[1], [3], 1, None, 0, Options(max_new_tokens=NEW))
    for slots, order, lag in ((3, None, 1), (3, SHUFFLED, 0), (8, SHUFFLED, 1)):
        assert generated(models()[1], [3], slots, order, lag, options) == first


def test_rows_and_seeds_name_the_random_numbers(models):
    """The same prompt in two rows, or under two seeds, is continued differently; in one row always the same."""
    twice = [PROMPTS[3]] * 2
    runs = [generated(models()[1], [], 2, None, 0, Options(Sampling(1.0, seed=seed), NEW), twice) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


RIGHT_CONVOLVE, RIGHT_STEP = StepView.convolve, Cache.step


def keep_state(self, slots):  # lengths are reset, but not the states
    self.lengths[slots] = 0
    for slot in slots:
        self.host_lengths[slot] = 0


def grow_all(self, documents):
    self.cache.lengths += 1


def forget_own_key(self):
    return self.cache.lengths.clamp(min=1)


def stale_tail(self, layer, *args):
    tail = self.cache.layers[layer][0].clone()
    out = RIGHT_CONVOLVE(self, layer, *args)
    self.cache.layers[layer][0].copy_(tail)
    return out


def late_position(self, documents):
    return self.cache.lengths * 2


def few_keys(self, live, max_keys):
    return RIGHT_STEP(self, live, max_keys - 1)


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (Cache, "reset", keep_state),
        (StepView, "advance", grow_all),
        (StepView, "lengths", property(forget_own_key)),
        (StepView, "convolve", stale_tail),
        (StepView, "positions", late_position),
        (Cache, "step", few_keys),
    ],
)
def test_a_wrong_cache_is_caught(owner, name, wrong, models, expected, monkeypatch):
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        test_greedy_ids_equal_transformers("published pattern", models, expected)
        test_a_slot_that_has_ended_stays_in_its_own_memory(models)


def test_a_slot_that_has_ended_stays_in_its_own_memory(models):
    """A full slot ends after one token; the next one in memory goes on as if it were alone."""
    model, options = models()[1], Options(max_new_tokens=NEW)
    requests = [Request(0, PROMPTS[4], options=options), Request(1, PROMPTS[5], options=options)]
    both, _ = collected(Engine(model, 2, 66, []).run(requests))
    alone, _ = collected(Engine(model, 1, 66, []).run(requests[1:]))
    assert len(both[0]) == 1 and both[1] == alone[1]


@pytest.mark.parametrize("named_by", ["slot", "nothing"])
def test_wrongly_named_random_numbers_are_caught(named_by, models, monkeypatch):
    def wrong(seeds, choices, positions, tokens):
        choices = torch.arange(len(choices)) if named_by == "slot" else choices
        return gumbel(seeds, choices, torch.zeros_like(positions) if named_by == "nothing" else positions, tokens)

    monkeypatch.setattr(sampling, "gumbel", wrong)
    with pytest.raises(AssertionError):
        test_sampled_ids_do_not_depend_on_the_batch("temperature", models)
        test_frequencies_are_the_probabilities("temperature")


def test_an_end_token_that_the_model_cannot_say_is_ignored(models):
    """Checkpoints with a cut vocabulary keep the end tokens of the full one in generation_config.json."""
    requests = [Request(1, PROMPTS[1], options=Options(max_new_tokens=3))]
    plain, ignored = (collected(Engine(models()[1], 1, 85, eos).run(requests)) for eos in ([], [VOCAB + 9]))
    assert plain == ignored


def test_a_run_left_in_the_middle_does_no_harm(models, expected):
    eos, ids = expected("published pattern")
    engine = Engine(models()[1], 3, 85, eos)
    next(engine.run(REQUESTS))
    for _ in range(2):
        assert collected(engine.run(REQUESTS))[0] == dict(enumerate(ids))


def test_decoding_reads_no_more_of_the_cache_than_the_longest_sequence(models, monkeypatch):
    rows_read, attend = [], kernels.attention_decode

    def counted(q, k, v, lengths):
        rows_read.append((k.shape[1], v.shape[1], int(lengths.max())))
        return attend(q, k, v, lengths)

    monkeypatch.setattr(kernels, "attention_decode", counted)
    engine, options = Engine(models()[1], 2, 300, []), Options(max_new_tokens=4)
    list(engine.run([Request(1, PROMPTS[4], options=options), Request(2, PROMPTS[5], options=options)]))
    layers = models()[1].config.layer_types.count("full_attention")
    assert rows_read == [(n, n, n) for n in (66, 67, 68) for _ in range(layers)]


def test_an_engine_made_in_inference_mode_works_outside_of_it(models, expected):
    eos, ids = expected("published pattern")
    with torch.inference_mode():
        engine = Engine(models()[1], 3, 85, eos)
        inside, _ = collected(engine.run(REQUESTS))
    assert inside == collected(engine.run(REQUESTS))[0] == dict(enumerate(ids))


def test_weights_stay_as_they_are(models):
    """Values and memory layout: the model is the caller's."""
    model = models()[1]
    before = [(p.data_ptr(), p.stride(), p.clone()) for p in model.parameters()]
    generated(model, [])
    for p, (address, stride, values) in zip(model.parameters(), before, strict=True):
        assert (p.data_ptr(), p.stride()) == (address, stride) and torch.equal(p, values)


@pytest.mark.parametrize("chosen", SAMPLED.values(), ids=SAMPLED)
def test_a_decode_step_never_waits_for_the_device(chosen):
    """On the meta device every read of a value raises; so a step that passes could be a CUDA graph."""
    config = build_config()
    model = build(config, "meta", torch.float32)
    engine = Engine(model, 5, 64, [1, 2], [7, 8, 9], 8)
    options = Options(chosen, max_think_tokens=4, close_thinking_at_eos=True)
    engine.submit(Request(1, [1], options=options, logprobs=3))
    with torch.inference_mode():
        engine.prefill(engine.admit())
        assert engine.step(3).report.shape == (2, 5)
        assert engine.step(4).logits.device.type == "meta"


def build_config():
    from psysafe.model.config import ModelConfig

    return ModelConfig.from_dict(reference_model().config.to_dict())


# ---- sampling


def warped_by_transformers(logits, s: Sampling):
    """Log-weights after transformers' own processors, in its order."""
    ids = torch.zeros(len(logits), 1, dtype=torch.int64)
    steps = [transformers.TemperatureLogitsWarper(s.temperature)]
    if s.top_k:
        steps.append(transformers.TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        steps.append(transformers.TopPLogitsWarper(s.top_p))
    if s.min_p:
        steps.append(transformers.MinPLogitsWarper(s.min_p))
    for step in steps:
        logits = step(ids, logits)
    return logits


def settings_of(s: Sampling, rows=1):
    """As the engine keeps them for fp32 logits."""
    return SamplingRows.of([s] * rows, range(rows), like=SamplingRows(torch.zeros(1, 6), torch.zeros(1, 3).long()))


def dense(logits, s: Sampling):
    scores, tokens = logits.sort(descending=True)
    scores = filtered(scores, settings_of(s, len(logits)), ordered=True)
    return torch.full_like(logits, -math.inf).scatter(1, tokens, scores)


FILTERS = {
    "temperature": Sampling(0.7),
    "top-k": Sampling(1.0, top_k=5),
    "top-k 1": Sampling(1.0, top_k=1),
    "top-k of all": Sampling(0.9, top_k=500),
    "top-p": Sampling(1.0, top_p=0.8),
    "small top-p": Sampling(1.0, top_p=1e-6),
    "min-p": Sampling(1.5, min_p=0.1),
    "recommended": Sampling(0.6, 20, 0.95),
    "all": Sampling(1.4, 30, 0.7, 0.05),
}


def logits_of(rows=64, vocab=200):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1)) * 3


@pytest.mark.parametrize("name", FILTERS)
def test_filters_equal_transformers(name):
    expected, got = warped_by_transformers(logits_of(), FILTERS[name]), dense(logits_of(), FILTERS[name])
    assert torch.equal(expected == -math.inf, got == -math.inf)
    assert relative_error(got.clamp(min=-1e4), expected.clamp(min=-1e4)) <= 1e-6


@pytest.mark.parametrize("top_k", [1, 5, 30, 64])
def test_top_k_of_equal_logits_equals_transformers(top_k):
    """Rounded as in bf16: what is as likely as the k-th token stays, whatever its place in the vocabulary."""
    logits, s = (logits_of() * 2).round() / 2, Sampling(1.0, top_k=top_k)
    expected = warped_by_transformers(logits, s) == -math.inf
    assert ((~expected).sum(1) > top_k).any()
    assert torch.equal(expected, dense(logits, s) == -math.inf)


@pytest.mark.parametrize(("name", "wrong"), [("top-p", dict(top_p=0.79)), ("min-p", dict(min_p=0.11)),
                                             ("top-k", dict(top_k=6)), ("all", dict(temperature=1.41))])  # fmt: skip
def test_a_wrong_filter_is_caught(name, wrong, monkeypatch):
    right, warped = FILTERS[name], warped_by_transformers
    monkeypatch.setitem(FILTERS, name, Sampling(**vars(right) | wrong))
    monkeypatch.setitem(globals(), "warped_by_transformers", lambda x, s: warped(x, right))
    with pytest.raises(AssertionError):
        test_filters_equal_transformers(name)


def test_penalties():
    """Repetition as transformers has it, over prompt and answer; presence by its formula, over the answer alone."""
    logits, ids = logits_of(8, 30), torch.randint(0, 30, (8, 12), generator=torch.Generator().manual_seed(2))
    prompted, written = torch.zeros(8, 30, dtype=torch.bool), torch.zeros(8, 30, dtype=torch.int32)
    prompted.scatter_(1, ids[:, :7], True)
    written.scatter_add_(1, ids[:, 7:], torch.ones_like(ids[:, 7:], dtype=torch.int32))
    got = penalised(logits, settings_of(Sampling(repetition_penalty=1.3), 8), prompted, written)
    assert torch.equal(got, transformers.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone()))
    got = penalised(logits, settings_of(Sampling(presence_penalty=0.75, frequency_penalty=0.5), 8), prompted, written)
    assert written.max() > 1
    for row in range(8):
        for token in range(30):
            count = ids[row, 7:].tolist().count(token)
            assert abs(got[row, token] - (logits[row, token] - 0.75 * (count > 0) - 0.5 * count)) < 1e-6


def test_penalties_in_the_loop_equal_transformers(models):
    """The engine's own record of what was read and written, against transformers' over the ids."""
    reference, model = models()
    prompt = PROMPTS[5]
    x = torch.tensor([prompt])
    more = dict(attention_mask=torch.ones_like(x), do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = reference.generate(x, max_new_tokens=NEW, repetition_penalty=1.5, **more)[0, len(prompt) :].tolist()
    options = Options(Sampling(repetition_penalty=1.5), NEW)
    assert generated(model, [], 2, None, 0, options, [PROMPTS[4], prompt])[1] == expected
    plain = reference.generate(x, max_new_tokens=NEW, **more)[0, len(prompt) :].tolist()
    assert plain != expected
    never_twice = generated(model, [], 2, None, 0, Options(Sampling(presence_penalty=1e4), NEW), [prompt])[0]
    assert len(set(never_twice)) == NEW


@pytest.mark.parametrize("name", ["temperature", "recommended", "all"])
def test_frequencies_are_the_probabilities(name):
    """40,000 draws over rows and positions: chi-square within 5 standard deviations of its mean."""
    s, draws = FILTERS[name], 40_000
    logits = logits_of(1, 50)
    p = warped_by_transformers(logits, s).softmax(-1)[0].double()
    n = torch.arange(draws)
    settings = SamplingRows.of([s] * draws, (n // 200).tolist(), like=settings_of(s))
    drawn = choose(logits.expand(draws, -1), settings, Paths.of(s), n % 200)
    counts = torch.bincount(drawn, minlength=50).double()
    assert counts[p == 0].sum() == 0
    often = p * draws >= 5
    chi2 = ((counts - p * draws).square() / (p * draws))[often].sum()
    freedom = int(often.sum()) - 1
    assert abs(chi2 - freedom) <= 5 * math.sqrt(2 * freedom) + 1


def test_noise_is_gumbel_and_independent():
    """Moments, no correlation between neighbours in seed, row, position or token, and a fixed number to hold on to."""
    rows, positions, tokens = torch.arange(40), torch.arange(40) * 3, torch.arange(5000).expand(40, -1)
    seed = torch.full((40,), 7)
    base = gumbel(seed, rows, positions, tokens).double()
    assert abs(base.mean() - 0.5772157) < 0.012  # five standard errors
    assert abs(base.var() - math.pi**2 / 6) < 0.03
    others = {
        "seed": gumbel(seed + 1, rows, positions, tokens),
        "seed's high half": gumbel(seed + 2**32, rows, positions, tokens),
        "row": gumbel(seed, rows + 1, positions, tokens),
        "row's high half": gumbel(seed, rows + 2**32, positions, tokens),
        "position": gumbel(seed, rows, positions + 1, tokens),
        "token": gumbel(seed, rows, positions, tokens + 1),
    }
    for name, other in others.items():
        r = torch.corrcoef(torch.stack([base.flatten(), other.double().flatten()]))[0, 1]
        assert abs(r) < 0.012, (name, r)
    assert len(base.unique()) > 0.99 * base.numel()
    alone = gumbel(seed[:1], rows[5:6], positions[5:6], tokens[5:6, 100:101])
    assert alone.item() == base[5, 100].float().item()


def test_what_answers_depend_on_is_named_as_ever():
    """Or files of answers that were written before would be refused. A later setting is named where it is used."""
    names = "max_new_tokens max_think_tokens thinking context temperature top_k top_p min_p repetition_penalty"
    names = [*names.split(), "presence_penalty", "seed"]
    assert list(Options(batch_size=3, prefill_tokens=7, deterministic=True).fingerprint_fields()) == names
    more = Options(Sampling(frequency_penalty=0.5), close_thinking_at_eos=True, stop=("a",)).fingerprint_fields()
    later = {"stop": ["a"], "close_thinking_at_eos": True, "frequency_penalty": 0.5}
    assert {name: more[name] for name in more if name not in names} == later


# ---- text


def scripted(monkeypatch, lines):
    """The model says these ids, row by row, whatever its logits; then eos for ever."""

    def choose(logits, settings, paths, positions, *seen):
        choices = settings.choice.tolist()
        scripted_ids = [lines[row][at : at + 1] for row, at in zip(choices, positions.tolist(), strict=True)]
        return torch.tensor([ids[0] if ids else tokenizer().eos_ids[0] for ids in scripted_ids])

    monkeypatch.setattr(slot_state, "choose", choose)


def tokenizer() -> Tokenizer:
    return Tokenizer(byte_tokenizer())


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return load_model(write_text_model(tmp_path_factory.mktemp("text")))


def say(monkeypatch, model, text, **options):
    lines = {row: tokenizer().encode(text) for row in range(0, 9)}
    scripted(monkeypatch, lines)
    options = Options(Sampling(temperature=1.0), **options)  # so that the step looks up whose token it chooses
    (answer,) = Generator(model, tokenizer(), options).answers([[{"role": "user", "content": "hi"}]])
    return answer


def test_reasoning_and_answer(text_model, monkeypatch):
    answer = say(monkeypatch, text_model, f"I wonder.\n{THINK_END}\n\nYes, ö.")
    assert (answer.reasoning, answer.answer, answer.unfinished_thinking) == ("I wonder.", "Yes, ö.", False)
    assert answer.response == f"I wonder.\n{THINK_END}\n\nYes, ö."
    assert (answer.finish_reason, answer.new_tokens) == ("stop", len(tokenizer().encode(answer.response)) + 1)


def test_a_think_block_that_never_closes_is_unfinished(text_model, monkeypatch):
    for options, reason in ((dict(max_new_tokens=5), "length"), ({}, "stop")):
        answer = say(monkeypatch, text_model, "I wonder", **options)
        assert (answer.unfinished_thinking, answer.answer, answer.finish_reason) == (True, "", reason)
        assert "I wonder".startswith(answer.reasoning)
    answer = say(monkeypatch, text_model, "Yes.", thinking=False)
    assert (answer.unfinished_thinking, answer.reasoning, answer.answer) == (False, "", "Yes.")


@pytest.mark.parametrize("budget", [1, 3, 8])
def test_the_think_budget_closes_the_block(budget, text_model, monkeypatch):
    """After exactly `budget` tokens of reasoning, also through an eos; what follows is the model's own again."""
    text = "I wonder and wonder and wonder"
    answer = say(monkeypatch, text_model, text, max_think_tokens=budget, max_new_tokens=20)
    closing = f"\n{THINK_END}\n\n"
    rest = text[budget + len(tokenizer().encode(closing)) :]
    assert answer.response == (text[:budget] + closing + rest)[: len(answer.response)]
    assert answer.new_tokens == 20
    assert not answer.unfinished_thinking


@pytest.mark.parametrize("text", [f"ab{THINK_END}cdefghijkl", f"abc{THINK_END}defghijk"])
def test_a_block_closed_in_time_is_left_alone(text, text_model, monkeypatch):
    assert say(monkeypatch, text_model, text, max_think_tokens=4).response == text


def test_the_context_ends_an_answer(text_model):
    """Prompt and answer fill the context to its last token, and no more."""
    prompt = Generator(text_model, tokenizer()).encode([{"role": "user", "content": "hi"}])
    for n_tokens in (1, 2, 7):
        generator = Generator(text_model, Tokenizer(byte_tokenizer(), [0]), Options(context=len(prompt) + n_tokens))
        (answer,) = generator.complete([Request(1, prompt)])
        assert answer.finish_reason == "length" or answer.new_tokens < n_tokens
        assert answer.new_tokens <= n_tokens


def test_what_does_not_fit_is_named(text_model, monkeypatch):
    def fails(message, requests=(), **options):
        refused(message, lambda: list(Generator(text_model, tokenizer(), Options(**options)).complete(list(requests))))

    fails("prompt 2: 9 tokens, but prompt and answer together have room for 9; raise --context",
          [Request(1, [1]), Request(2, [1] * 9)], context=9)  # fmt: skip
    fails("rows.json row 3: 12 tokens", [Request(3, [1] * 12, "rows.json row 3")], context=9)
    fails("the model was made for", [Request(1, [1])], context=10**7)
    fails("max-new-tokens is 0, expected at least 1", max_new_tokens=0)
    monkeypatch.setattr(cache_slots, "memory_free", lambda device: 30_000)
    fails(r"1 x 2,049 tokens need 0\.\d MB of cache, but of 0\.0 MB free", [Request(1, [1])])
    printed, each = [], Cache(text_model.config, 1, 5, "meta").bytes_per_slot
    monkeypatch.setattr(cache_slots, "memory_free", lambda device: 5 * each)
    generator = Generator(text_model, tokenizer(), Options(max_new_tokens=4), printed.append)
    assert len(list(generator.complete([Request(i, [1]) for i in range(20)]))) == 20
    assert printed == [f"memory for 4 x 5 tokens: {each / 1e6:.1f} MB each, {4 * each / 1e6:.1f} MB in all"]


@pytest.mark.parametrize(("name", "value"), [("temperature", -1), ("temperature", math.nan), ("top_p", 0), ("seed", -1),
                                             ("top_k", -1), ("min_p", 2), ("repetition_penalty", 0),
                                             ("temperature", 1e-40), ("top_k", 2**63), ("presence_penalty", 1e39),
                                             ("frequency_penalty", -1e39), ("repetition_penalty", 1e-46)])  # fmt: skip
def test_impossible_settings_are_named(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name.replace('_', '-')} is {value}, expected")):
        Sampling(**{name: value})


def test_the_smallest_temperature_takes_the_likeliest_token():
    """And with the largest penalties no logit becomes nan: of nan, argmax takes the first token."""
    logits, none, position = torch.tensor([[-40.0, 40.0, 0.0, 39.9]]), torch.zeros(1, 4), torch.zeros(1).long()
    for s in (Sampling(1e-6), Sampling(1e-6, top_k=3), Sampling(1e-6, top_p=0.9)):
        assert choose(logits, settings_of(s), Paths.of(s), position).item() == 1
    s, seen = Sampling(presence_penalty=1e6, frequency_penalty=1e6, repetition_penalty=1e6), (none.bool(), none.int())
    seen[1][0, :3] = 2**20
    assert penalised(logits, settings_of(s), *seen).isfinite().all()
    assert choose(logits, settings_of(s), Paths.of(s), position, *seen).item() == 3


def test_a_number_of_tokens_that_no_tensor_can_hold_is_named():
    with pytest.raises(ValueError, match="max-think-tokens is 9223372036854775808, expected at least 0, and below 2"):
        Options(max_think_tokens=2**63)


# ---- adapters


def adapted(folder, dtype=torch.float32):
    model = load_model(folder, dtype=dtype)
    adapters = attach(model, 2, 6.0, "all-linear", seed=1)
    randomise_lora_B(adapters, seed=3)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_equals_unmerged(dtype, tmp_path):
    """And the adapter is seen: with half of its scale the same comparison fails."""
    folder = write_checkpoint(reference_model(), tmp_path)
    tokens, bounds = torch.tensor(PROMPTS[4]), torch.tensor([0, 65], dtype=torch.int32)
    model = adapted(folder, dtype)
    with torch.no_grad():
        before = model(tokens, bounds)
        merge_adapters(model)
        after = model(tokens, bounds)
    assert all(layer.adapter is None for _, layer in fused_layers(model))
    assert relative_error(after, before) <= (1e-5 if dtype == torch.float32 else 1e-12)
    half = adapted(folder, dtype)
    for _, layer in fused_layers(half):
        layer.adapter.scale /= 2
    merge_adapters(half)
    assert relative_error(half(tokens, bounds), before) > 1e-3


def test_merging_rounds_once(tmp_path):
    """bf16 weights: the sum is formed in fp32 and rounded to the nearest."""
    folder = write_checkpoint(reference_model(), tmp_path)
    model, exact = adapted(folder, torch.bfloat16), adapted(folder, torch.bfloat16)
    for _, layer in fused_layers(exact):
        layer.weight.data = layer.weight.data.double()
        layer.adapter.double()
    merge_adapters(model)
    merge_adapters(exact)
    pairs = zip(fused_layers(model), fused_layers(exact), strict=True)
    different = [(a.weight != b.weight.to(torch.bfloat16)).float().mean() for (_, a), (_, b) in pairs]
    assert max(different) < 1e-3  # fp32 against fp64 decides a tie now and then


def test_adapters_are_applied_while_decoding(tmp_path):
    """Unmerged and merged give the same text, and another than the base."""
    folder = write_checkpoint(reference_model(), tmp_path)
    model = adapted(folder)
    unmerged = generated(model, [])
    merge_adapters(model)
    assert generated(model, []) == unmerged != generated(load_model(folder), [])
