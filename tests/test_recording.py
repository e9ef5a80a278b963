"""A recorded decode step against the step itself, and what must not be recorded."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kernels
from psysafe import generation, recording
from psysafe.generation import Engine, Options, Progress, Request
from psysafe.lora import attach
from psysafe.recording import recorded, whole
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
    engine = Engine(model, options, 4, 90, [1, 2], [7, 8, 9], 8)
    with torch.inference_mode():
        engine._prefill([Progress(Request(row, PROMPTS[row + 1]), row) for row in range(3)])
        engine.limit[1] = 5
        said = torch.stack([engine.step().clone() for _ in range(steps)])
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
    ],
)
def test_a_recording_repeats_the_call(step):
    """Whatever writes, however it is spelled, does so again; what only looks like writing is read again."""
    x, y, x2, y2 = (torch.tensor(values) for values in ([3, -1, 4], [2, 1, 0]) * 2)
    again = recorded(lambda: step(x, y))
    step(x2, y2)
    for _ in range(3):
        for tensor in (x, x2):
            tensor += 5
        assert torch.equal(again(), step(x2, y2)) and torch.equal(x, x2)


def test_random_numbers_are_refused():
    with pytest.raises(RuntimeError, match="draws random numbers"):
        recorded(lambda: torch.zeros(2) + torch.rand(2))


def test_what_is_read_from_outside_is_read_each_time():
    """Tensors from outside change between calls; views of them follow; what is `whole` may look at values."""
    x, end, w = torch.arange(6.0), torch.tensor(2), nn.Parameter(torch.ones(()), requires_grad=False)
    total = whole(lambda x, end: x[: end.item()].sum())

    def step():
        y = x.view(2, 3)[1] * (w + w)
        x[0] += 1
        return total(y, end) + total(x[3:], end) + x[0]

    again = recorded(step)
    assert x[0] == 1  # it ran once
    for change in (0.0, 10.0):
        x[3:] += change
        end.fill_(3 if change else 1)
        assert again() == 3 * x[3 : 3 + int(end)].sum() + x[0]


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
        recorded(lambda: torch.ones(()) * look(x * 1, *args))


def test_constants_stay_constant():
    w = nn.Parameter(torch.ones(3), requires_grad=False)
    for change in (lambda: (w + 1).mul_(2), lambda: w.add_(1), lambda: torch.zeros(3).add_(w)):
        with pytest.raises(RuntimeError, match="changes a constant"):
            recorded(change)


def test_a_call_that_writes_and_makes_is_refused():
    x, mean = torch.ones(2, 3), torch.zeros(3)
    with pytest.raises(RuntimeError, match="both writes and makes"):
        recorded(lambda: torch.ops.aten._native_batch_norm_legit(x * 1, None, None, mean, mean, True, 0.1, 1e-5)[0])


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


def test_a_recording_can_be_made_and_run_in_inference_mode(model):
    with torch.inference_mode():
        engine = Engine(model, Options(max_new_tokens=3), 2, 90, [])
        inside = [p.ids for p in engine.run([Request(1, PROMPTS[1])])]
    assert inside == [p.ids for p in Engine(model, Options(max_new_tokens=3), 2, 90, []).run([Request(1, PROMPTS[1])])]


def test_an_autograd_function_is_recorded_by_the_calls_inside_it():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return (x * 2).view_as(x)

    x = torch.ones(3)
    again = recorded(lambda: Double.apply(x) + 1)
    x += 1
    assert torch.equal(again(), torch.full((3,), 5.0))


@pytest.mark.parametrize(
    ("device", "head_dim", "choice", "expected"),
    [
        ("cpu", 96, "auto", "recorded"),
        ("cuda", 256, "auto", "captured" if kernels.HAS_TRITON else "plain"),
        ("cuda", 96, "auto", "plain"),  # no Triton kernel for such heads
        ("cuda", 256, "reference", "plain"),
        ("cpu", 256, "triton", "plain"),  # in Triton's interpreter
    ],
)
def test_how_a_step_runs(device, head_dim, choice, expected, monkeypatch):
    """As one graph on a GPU, unless attention there is the reference: then one line says so."""
    monkeypatch.setenv("PSYSAFE_KERNELS", choice)
    monkeypatch.setattr(generation, "recorded", lambda step: "recorded")
    monkeypatch.setattr(generation, "captured", lambda step: "captured")
    monkeypatch.setattr(generation, "lay_out", lambda model: None)
    norm = SimpleNamespace(device=torch.device(device), is_cuda=device == "cuda")
    model = SimpleNamespace(norm=norm, config=SimpleNamespace(head_dim=head_dim))
    assert generation.prepared("plain", model) == expected
    told = generation.why_uncaptured(model)
    slow = expected == "plain" and device == "cuda"
    assert (f"heads of {head_dim}" in told and "\n" not in told) if slow else told == ""
