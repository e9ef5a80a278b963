"""Linear cross-entropy: the reference against torch's cross_entropy of all logits, Triton against the reference."""

import pytest
import torch
import torch.nn.functional as F

from kernels.ops import linear_cross_entropy as cross_entropy
from kernels.ops._triton import HAS_TRITON
from kernels.ops.linear_cross_entropy import linear_cross_entropy_reference, linear_cross_entropy_triton
from kernels.proof.cases.linear_cross_entropy import make_case
from kernels.proof.closeness import assert_close_fp32, outputs_and_gradients
from tests.kernels.trials import TRIALS
from tests.mistakes import refused

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 16)


def all_logits_at_once(x, weight, labels):
    return F.cross_entropy(F.linear(x, weight), labels, reduction="sum")


@pytest.mark.parametrize("size", TRIALS["linear_cross_entropy"].sizes, ids=str)
def test_reference_equals_torch(size):
    case = make_case(**size)
    expected = outputs_and_gradients(case, all_logits_at_once, torch.float64)
    assert_close_fp32(outputs_and_gradients(case, linear_cross_entropy_reference, torch.float64), expected)


@needs_triton
def test_large_logits_do_not_overflow():
    """exp(1000) is infinite in fp32; a wrong maximum would show as inf or NaN."""
    case = make_case(T=3, D=16, vocab=100)
    x, weight, labels = case.inputs["x"] * 300, case.inputs["weight"], case.inputs["labels"]
    expected = all_logits_at_once(x.double(), weight.double(), labels)
    assert_close_fp32({"loss": linear_cross_entropy_triton(x, weight, labels)}, {"loss": expected})


@needs_triton
@pytest.mark.parametrize("label", [-100, 100, 2**40])
def test_label_out_of_range_poisons_its_own_row(label):
    """It must neither read out of bounds nor train in silence: its row of dx is NaN, the others are as ever."""
    x, weight, labels = make_case(T=4, D=16, vocab=100).inputs.values()
    labels[2] = label
    x.requires_grad_()
    loss = linear_cross_entropy_triton(x, weight, labels)
    (dx,) = torch.autograd.grad(loss, x)
    assert loss.isnan() and dx[2].isnan().all() and not dx[[0, 1, 3]].isnan().any()


@needs_triton
def test_backward_twice_and_no_gradient():
    x, weight, labels = make_case(T=20, D=16, vocab=100).inputs.values()
    with torch.no_grad():
        bare = linear_cross_entropy_triton(x, weight, labels)
    x.requires_grad_()
    loss = linear_cross_entropy_triton(x, weight, labels)
    assert torch.equal(bare, loss.detach()) and not bare.requires_grad
    first, second = (torch.autograd.grad(loss, x, torch.tensor(0.25), retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second), "backward must leave the stored gradient as it is"


@needs_triton
def test_no_trained_row():
    """A micro-batch may hold nothing to train on."""
    x, weight, labels = torch.zeros(0, 16, requires_grad=True), torch.zeros(100, 16), torch.zeros(0, dtype=torch.int64)
    loss = linear_cross_entropy_triton(x, weight, labels)
    loss.backward()
    assert loss.item() == 0 and x.grad.shape == (0, 16)


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 31, 32, 100])
def test_chunks_cover_the_rows_evenly(rows):
    pieces = cross_entropy.chunks(rows)
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(rows))
    sizes = [piece.stop - piece.start for piece in pieces]
    assert all(size <= 32 for size in sizes) and (rows < 16 or sizes[0] >= 16)


@needs_triton
def test_what_triton_refuses():
    x, weight, labels = make_case(T=4, D=16, vocab=100).inputs.values()
    refused("weight requires grad", linear_cross_entropy_triton, x, weight.requires_grad_(), labels)
    refused("labels", linear_cross_entropy_triton, x, weight.detach(), labels[:2])
