"""Recomputation: the same bits, fewer bytes saved, each call computed once, and a decoder that knows nothing of it."""

import subprocess
import sys
import weakref
from itertools import combinations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import kernels
from psysafe.model import recompute as recomputation
from psysafe.model.lora import TARGETS, attach, disabled
from psysafe.model.recompute import STAGES
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
        recomputation.recompute(block, dropped)
    adapters.grad.zero_()
    loss = loss_of(model)
    loss.backward()
    return loss.detach(), adapters.grad.clone()


def saved_bytes(model, monkeypatch, dropped=()) -> int:
    """Bytes that a forward pass leaves for backward, parameters apart; each piece of memory counts once."""
    saved = {}

    def save(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        alive.append(x)
        return x

    alive = []
    monkeypatch.setattr(recomputation._RecomputedForward, "save", staticmethod(save))
    for block in model.layers:
        recomputation.recompute(block, dropped)
    with saved_tensors_hooks(save, lambda x: x):
        loss = loss_of(model)
    for p in model.parameters():
        saved.pop(p.untyped_storage().data_ptr(), None)
    del loss
    return sum(saved.values())


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


def test_a_call_recomputed_from_other_inputs_is_caught(tmp_path, monkeypatch):
    """Mutant: the inputs of a recomputed call are a little larger."""
    original = recomputation._map

    def wrong(kind, fn, args):
        if kind is not recomputation._Input:
            return original(kind, fn, args)
        return original(kind, lambda x: (1.001 * fn(x)).detach().requires_grad_(x.requires_grad), args)

    monkeypatch.setattr(recomputation, "_map", wrong)
    with pytest.raises(AssertionError):
        compare(tmp_path, [("in_proj",)])


def test_each_stage_keeps_less(tmp_path, monkeypatch):
    """The reference path. Its SwiGLU saves intermediate results instead of gate_up; Triton's is in test_memory.py."""
    model, _ = model_with_adapters(tmp_path)
    sizes = [saved_bytes(model, monkeypatch, STAGES[:n]) for n in range(len(STAGES))]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert sizes[-1] < sizes[0] / 2


def test_each_call_is_recomputed_once_and_its_results_go_with_the_block(tmp_path, monkeypatch):
    model, adapters = model_with_adapters(tmp_path)
    calls, alive = [], []
    original = recomputation._StageCall.run

    def run(self):
        assert self not in [call() for call in calls]
        calls.append(weakref.ref(self))
        alive.append(sum(call() is not None and call().results is not None for call in calls))
        return original(self)

    monkeypatch.setattr(recomputation._StageCall, "run", run)
    gradient(model, adapters, STAGES)
    assert len(calls) > 3 * len(model.layers) and not any(call() for call in calls)
    assert max(alive) <= len(STAGES), "results of one block live on in the next"


def test_a_graph_can_be_walked_twice(tmp_path):
    model, adapters = model_with_adapters(tmp_path)
    _, once = gradient(model, adapters, STAGES)
    adapters.grad.zero_()
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(adapters.grad, 2 * once)


def test_the_wrappers_leave_no_trace(tmp_path):
    """Without stages every module has the methods of its class again; with some, exactly these are replaced."""
    model, _ = model_with_adapters(tmp_path)
    attributes = [set(vars(module)) for module in model.modules()]
    for block in model.layers:
        recomputation.recompute(block, STAGES)
        recomputation.recompute(block, ("rope", "conv"))
        assert recomputation.recomputed_stages(block) == {"rope", "conv"}
        assert ("rope" in vars(block.mixer)) == block.is_attention == ("conv" not in vars(block.mixer))
        assert "forward" not in vars(block.mlp.in_proj)
        recomputation.recompute(block, ())
        assert not recomputation.recomputed_stages(block)
    assert [set(vars(module)) for module in model.modules()] == attributes


def test_adapters_switched_off_in_between_change_no_gradient(tmp_path):
    """Backward of an adapted forward pass while the adapters are disabled: a stage is recomputed as it was run."""
    model, adapters = model_with_adapters(tmp_path, "all-linear")
    _, expected = gradient(model, adapters, STAGES)
    adapters.grad.zero_()
    loss = loss_of(model)
    with disabled(model):
        loss.backward()
    assert torch.equal(adapters.grad, expected)


def test_the_decoder_does_not_import_it():
    code = "import sys, psysafe.model.lora; sys.exit('psysafe.model.recompute' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
