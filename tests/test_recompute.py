"""What backward makes again: the same bits, fewer bytes kept, each call made once."""

import weakref
from itertools import combinations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import kernels
from psysafe.model import recompute
from psysafe.model.lora import TARGETS, attach
from psysafe.model.recompute import STAGES, Remake
from tests.oracles import both_models
from tests.test_model import boundaries, ids

LENGTHS = (70, 1, 40)
ROWS = torch.arange(5, 100)


def model_with_adapters(folder, targets=TARGETS, name="published pattern", **changes):
    _, model = both_models(folder, name, **changes)
    adapters = attach(model, 1, 3, targets)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        adapters.param.copy_(0.1 * torch.randn(adapters.param.shape, generator=generator))
    return model, adapters


def loss_of(model, rows=ROWS):
    hidden = model(ids(sum(LENGTHS)), boundaries(LENGTHS), rows=rows)
    return kernels.linear_cross_entropy(hidden, model.head, ids(sum(LENGTHS))[rows + 1])


def gradient(model, adapters, dropped=()):
    for block in model.layers:
        block.recompute = frozenset(dropped)
    adapters.grad.zero_()
    loss = loss_of(model)
    loss.backward()
    return loss.detach(), adapters.grad.clone()


def kept_bytes(model, monkeypatch, dropped=()) -> int:
    """Bytes that a forward pass leaves for backward, parameters apart; each piece of memory counts once."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        alive.append(x)
        return x

    alive = []
    monkeypatch.setattr(Remake, "keep", staticmethod(keep))
    for block in model.layers:
        block.recompute = frozenset(dropped)
    with saved_tensors_hooks(keep, lambda x: x):
        loss = loss_of(model)
    for p in model.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    del loss
    return sum(kept.values())


def compare(tmp_path, choices, **changes):
    model, adapters = model_with_adapters(tmp_path, **changes)
    loss, grad = gradient(model, adapters)
    assert grad.abs().max() > 0
    for dropped in choices:
        again, other = gradient(model, adapters, dropped)
        assert torch.equal(loss, again) and torch.equal(grad, other), dropped


def test_every_choice_gives_the_same_bits(tmp_path):
    compare(tmp_path, [names for n in range(1, 6) for names in combinations(STAGES, n)])


@pytest.mark.parametrize("targets", ["all-linear", ["down_proj", "in_proj_z"]])
def test_other_adapters_give_the_same_bits(tmp_path, targets):
    compare(tmp_path, [STAGES], targets=targets)


def test_a_call_made_again_with_other_inputs_is_caught(tmp_path, monkeypatch):
    """Mutant: x comes back a little larger."""
    original = Remake.derive

    def wrong(self, x, fn, h):
        original(self, x, lambda h: 1.001 * fn(h), h)

    monkeypatch.setattr(Remake, "derive", wrong)
    with pytest.raises(AssertionError):
        compare(tmp_path, [("in_proj",)])


def test_each_stage_keeps_less(tmp_path, monkeypatch):
    """The reference path. Its SwiGLU saves intermediate results instead of gate_up; Triton's is in test_memory.py."""
    model, _ = model_with_adapters(tmp_path)
    sizes = [kept_bytes(model, monkeypatch, STAGES[:n]) for n in range(len(STAGES))]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert sizes[-1] < sizes[0] / 2


def test_each_call_is_made_again_once_and_its_results_go_with_the_block(tmp_path, monkeypatch):
    model, adapters = model_with_adapters(tmp_path)
    sources, alive = [], []
    original = recompute._Source._make

    def make(self):
        assert self not in [source() for source in sources]
        sources.append(weakref.ref(self))
        alive.append(sum(source() is not None and source().made is not None for source in sources))
        return original(self)

    monkeypatch.setattr(recompute._Source, "_make", make)
    gradient(model, adapters, STAGES)
    assert len(sources) > 3 * len(model.layers) and not any(source() for source in sources)
    assert max(alive) <= len(STAGES), "results of one block live on in the next"


def test_a_graph_can_be_walked_twice(tmp_path):
    model, adapters = model_with_adapters(tmp_path)
    _, once = gradient(model, adapters, STAGES)
    adapters.grad.zero_()
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(adapters.grad, 2 * once)
