"""A recorded decode step against the step itself, and what must not be recorded."""

from functools import partial

import pytest
import torch
from torch import nn

from psysafe import generation, load_model, recording
from psysafe.generation import Engine, Options, Progress, Request
from psysafe.lora import attach, fused_layers
from psysafe.recording import recorded
from psysafe.sampling import Sampling
from tests.oracles import both_models
from tests.test_generation import PROMPTS

SETTINGS = {
    "greedy": Options(),
    "everything": Options(Sampling(1.3, 40, 0.9, 0.02, 1.2, 0.5, 3), max_think_tokens=4),
    # So cold that the masks really cut: the random model's logits are flat.
    "top-p": Options(Sampling(0.1, top_p=0.5, seed=3)),
    "min-p": Options(Sampling(0.1, min_p=0.3, seed=3)),
}


@pytest.fixture(scope="module", params=["base", "adapter"])
def model(request, tmp_path_factory):
    model = both_models(tmp_path_factory.mktemp("model"), "published pattern")[1]
    if request.param == "adapter":
        adapters = attach(model, 2, 6.0, "all-linear", seed=1)
        adapters.param.copy_(torch.randn(adapters.param.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return model


def reports(model, options, record, monkeypatch, steps=12):
    """What 12 steps report, and the memory behind them: slots of unlike lengths, one of them empty, one that ends."""
    monkeypatch.setattr(generation, "recorded", record)
    engine = Engine(model, options, 4, 140, [1, 2], [7, 8, 9], 8)
    with torch.inference_mode():
        engine._prefill([Progress(Request(row, PROMPTS[row + 1]), row) for row in range(3)])
        engine.limit[1] = 5
        said = torch.stack([engine.step(123 + i).clone() for i in range(steps)])  # for 128 keys, then for 140
    return said[:, :, :3], engine.cache.lengths, *(x[:3] for layer in engine.cache.layers for x in layer)


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_a_recorded_step_is_the_step(options, model, monkeypatch):
    """To the last bit: tokens, ends, lengths, keys, values, convolution tails and states."""
    expected = reports(model, options, lambda step: step, monkeypatch)
    for a, b in zip(expected, reports(model, options, recorded, monkeypatch), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["index_copy_", "mul_", "copy_"])
def test_lost_writes_are_caught(name, model, monkeypatch):
    """A recording that takes a call in place for a read would drop it."""
    again = recording.again

    def forgetful(func, args, kwargs):
        lost = func._schema.name == f"aten::{name}"
        return ((lambda: None), (), {}) if lost else again(func, args, kwargs)

    monkeypatch.setattr(recording, "again", forgetful)
    with pytest.raises(AssertionError):
        test_a_recorded_step_is_the_step(SETTINGS["greedy"], model, monkeypatch)


@pytest.mark.parametrize(
    "step",
    [
        lambda x, y: ~x,
        lambda x, y: torch.add(x, y, out=x),
        lambda x, y: torch.nn.functional.relu(x.neg_(), inplace=True),
        lambda x, y: x.__isub__(y),
        lambda x, y: x[y],
        lambda x, y: (x * y).to(x.dtype),
        lambda x, y: (x * y).to(torch.float64),
        lambda x, y: x.expand(2, 3).reshape(6) + y.repeat(2),
        lambda x, y: x.sort(descending=True)[1],
        lambda x, y: torch.nn.functional.embedding(y, x[:, None].float()),
        lambda x, y: x.clone().mul_(y),
        lambda x, y: (x * 2, x.copy_((x + 1) * 3))[0],  # what it returns is made early and must last
        lambda x, y: (x.view(1, 3).__setitem__((slice(None), y), x.view(1, 3) + 1), x * 1)[1],
    ],
)
def test_a_recording_repeats_the_call(step):
    """Whatever writes, however it is spelled, does so again; what only looks like writing is read again."""
    x, y, x2, y2 = (torch.tensor(values) for values in ([3, -1, 4], [2, 1, 0]) * 2)
    again = recorded(lambda: step(x, y))
    for _ in range(3):
        for tensor in (x, x2):
            tensor += 5
        assert torch.equal(again(), step(x2, y2)) and torch.equal(x, x2)


def test_random_numbers_are_refused():
    with pytest.raises(RuntimeError, match="draws random numbers"):
        recorded(lambda: torch.zeros(2) + torch.rand(2))()


def test_what_is_read_from_outside_is_read_each_time():
    """Tensors from outside change between calls; views of them follow; the first call is one like the others."""
    x, w = torch.arange(6.0), nn.Parameter(torch.ones(()), requires_grad=False)

    def step():
        y = x.view(2, 3)[1] * (w + w)
        x[0] += 1
        return y.sum() + x[3:].sum() + x[0]

    again = recorded(step)
    for calls, change in enumerate((0.0, 10.0, 20.0), 1):
        x[3:] += change
        assert again() == 3 * x[3:].sum() + x[0] and x[0] == calls


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.item(),
        lambda x: 1 if x > 0 else 2,
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: torch.arange(3)[x.long()],
        lambda x: torch.arange(3)[torch.arange(3) > x],
        lambda x: torch.arange(3)[: x.long()],
        torch.nonzero,
        torch.masked_select,
        int,
    ],
)
def test_a_value_cannot_decide(look):
    x, args = torch.ones(()), ()
    if look is torch.masked_select:
        args = (x > 0,)
    with pytest.raises(RuntimeError, match="looks at a value"):
        recorded(lambda: torch.ones(()) * look(x * 1, *args))()


def test_constants_stay_constant():
    w = nn.Parameter(torch.ones(3), requires_grad=False)
    for change in (lambda: (w + 1).mul_(2), lambda: w.add_(1), lambda: torch.zeros(3).add_(w)):
        with pytest.raises(RuntimeError, match="changes a constant"):
            recorded(change)()


def test_a_call_that_writes_and_makes_is_refused():
    x, mean = torch.ones(2, 3), torch.zeros(3)
    with pytest.raises(RuntimeError, match="both writes and makes"):
        recorded(lambda: torch.ops.aten._native_batch_norm_legit(x * 1, None, None, mean, mean, True, 0.1, 1e-5)[0])()


def test_memory_is_used_again_once_it_has_been_read():
    x = torch.arange(4.0)

    def step():
        early = x + 1
        late = early
        for _ in range(8):
            late = late * 2
        return late.view(2, 2) + early[2:]

    with recording.Recorder() as recorder:
        result = step()
    calls, result = recording.packed(recorder.calls, result, recorder.made)
    x += 1
    for call in calls:
        call()
    assert len(calls) == 10 and torch.equal(result, step())
    places = recording.memory(recording.tensors([(call.args, call.keywords) for call in calls]))
    assert len(places) == 4  # x, early, and two that take turns


def test_weights_of_middling_size_are_read_ahead():
    """Before the product, in the order in which they lie: as a flat view of the same memory."""
    x = torch.randn(2, 64)

    def calls(rows, lay_out=lambda w: w):
        w = nn.Parameter(lay_out(torch.randn(rows, 64)), requires_grad=False)
        with recording.Recorder() as recorder:
            torch.nn.functional.linear(x, w)
        return w, recording.read_ahead(recorder.calls, recorder.constant)

    for lay_out in (lambda w: w, lambda w: w.T.contiguous().T):
        w, ((first, (flat, _), _), (second, *_)) = calls(128, lay_out)
        assert first is torch.sum and second is torch.mm
        assert flat.data_ptr() == w.data_ptr() and flat.shape == (w.numel(),) and flat.is_contiguous()
    assert [len(calls(rows)[1]) for rows in (127, 128, 1 << 14, (1 << 14) + 1)] == [1, 2, 2, 1]
    assert len(calls(128, lambda w: w.new_empty(128, 65)[:, :64])[1]) == 1  # its bytes are not one piece


def test_a_step_of_the_bundled_model_is_read_ahead_and_allocates_nothing(monkeypatch):
    """Every call has its `out`; every matrix of a layer and the head are read before they are used."""
    model, found = load_model("assets:tiny"), []
    packed = recording.packed
    monkeypatch.setattr(recording, "packed", lambda calls, *rest: (found.extend(calls), packed(calls, *rest))[1])
    engine = Engine(model, Options(), 2, 90, [])
    with torch.inference_mode():
        engine.step(1)
    functions = [function for function, _, _ in found]
    assert recording.copied not in functions and functions.count(torch.mm) == 33
    weights = [model.head, *(layer.weight for _, layer in fused_layers(model))]
    assert all(weight.T.is_contiguous() for weight in weights)
    read = {args[0].data_ptr() for function, args, _ in found if function is torch.sum}
    assert {weight.data_ptr() for weight in weights if weight.nbytes >= recording.READ_AHEAD_LEAST} <= read


def test_a_recording_can_be_made_and_run_in_inference_mode():
    def answer():
        model, request = load_model("assets:tiny"), Request(1, PROMPTS[1])
        return next(Engine(model, Options(max_new_tokens=3), 2, 90, []).run([request])).ids

    with torch.inference_mode():
        inside = answer()
    assert inside == answer()


def test_an_autograd_function_is_recorded_by_the_calls_inside_it():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return (x * 2).view_as(x)

    x = torch.ones(3)
    again = recorded(lambda: Double.apply(x) + 1)
    for expected in (3.0, 5.0):
        assert torch.equal(again(), torch.full((3,), expected))
        x += 1


def test_steps_are_recorded_for_as_many_keys_as_there_are(model):
    engine = Engine(model, Options(max_new_tokens=80), 2, 300, [])
    list(engine.run([Request(1, PROMPTS[4])]))  # 65 tokens, and 79 more are fed
    assert list(engine.steps) == [128, 256]
    with torch.inference_mode():
        engine.step(300)
        assert list(engine.steps) == [128, 256, 300]
        engine.steps, engine.triton = {}, True  # whose kernels read as many as a sequence has
        engine.step(5)
    assert list(engine.steps) == [300] and isinstance(engine.steps[300], partial)  # not recorded
    assert [generation.rounded(n) for n in (1023, 1025, 2049)] == [1024, 1280, 2560]


def test_few_recordings_are_kept(model):
    engine = Engine(model, Options(), 1, 1000, [])
    with torch.inference_mode():
        for longest in (1, 200, 300, 400, 1, 600):
            engine.step(longest)
    assert list(engine.steps) == [384, 512, 128, 640]
