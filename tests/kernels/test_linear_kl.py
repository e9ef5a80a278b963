"""The KL divergence of two heads' rows: the reference against torch's kl_div of all logits, Triton against it."""

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels.ops import linear_cross_entropy as cross_entropy
from kernels.ops.linear_kl import linear_kl_reference, linear_kl_triton
from kernels.proof.cases.linear_kl import make_case
from kernels.proof.closeness import assert_close_bf16, outputs_and_gradients, relative_error
from tests.kernels.trials import TRIALS
from tests.mistakes import refused

needs_triton = pytest.mark.skipif(not kernels.HAS_TRITON, reason="needs Triton")
IMPLEMENTATIONS = [linear_kl_reference, pytest.param(linear_kl_triton, marks=needs_triton)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 16)


def all_logits_at_once(x, base, weight):
    log_p, log_q = (F.linear(rows, weight).log_softmax(1) for rows in (x, base))
    return F.kl_div(log_p, log_q, reduction="sum", log_target=True)


@pytest.mark.parametrize("size", TRIALS["linear_kl"].sizes, ids=str)
def test_reference_equals_torch_and_autograd(size):
    case = make_case(**size)
    expected = outputs_and_gradients(case, all_logits_at_once, torch.float64)
    actual = outputs_and_gradients(case, linear_kl_reference, torch.float64)
    assert actual.keys() == {"loss", "dx"}
    assert all(relative_error(actual[name], expected[name]) <= 1e-9 for name in expected)


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_equal_rows_have_no_divergence_and_no_gradient(op):
    x, _, weight = make_case(T=20, D=16, vocab=100).inputs.values()
    x.requires_grad_()
    loss = op(x, x.detach().clone(), weight)
    assert loss.item() == 0 and not torch.autograd.grad(loss, x)[0].any()


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_a_small_divergence_is_not_lost(op):
    """1e-5 nats a token. A difference of two sums, which is the mutant, is wrong by more than a percent here."""
    x, _, weight = make_case(T=20, D=16, vocab=300).inputs.values()
    base = x + 1e-3 * torch.randn(20, 16, generator=torch.Generator().manual_seed(5))
    expected = all_logits_at_once(x.double(), base.double(), weight.double())
    z, b = x @ weight.T, base @ weight.T
    two_sums = (b.softmax(1) * (b - z)).sum() - (b.logsumexp(1) - z.logsumexp(1)).sum()
    assert expected / 20 < 1e-5 and relative_error(two_sums, expected) > 0.01
    assert relative_error(op(x, base, weight), expected) < 0.005


@needs_triton
def test_true_bf16():
    """With bf16 rounded as on a GPU: no worse than the reference."""
    from kernels.proof.interpreter import strict_interpreter

    case = make_case(T=20, D=32, vocab=201, dtype=torch.bfloat16)
    plain = outputs_and_gradients(case, linear_kl_reference)
    with strict_interpreter():
        actual = outputs_and_gradients(case, linear_kl_triton)
    assert_close_bf16(actual, plain, outputs_and_gradients(case, all_logits_at_once, torch.float64))


@needs_triton
def test_large_logits_do_not_overflow():
    """exp(1000) is infinite in fp32; where the base is sure, a word without any chance costs its logit's distance."""
    case = make_case(T=3, D=16, vocab=100)
    x, base, weight = (value * scale for value, scale in zip(case.inputs.values(), (300, 300, 1), strict=True))
    expected = all_logits_at_once(x.double(), base.double(), weight.double())
    assert expected.isfinite() and relative_error(linear_kl_triton(x, base, weight), expected) < 1e-5


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_backward_twice_and_no_gradient(op):
    x, base, weight = make_case(T=20, D=16, vocab=100).inputs.values()
    with torch.no_grad():
        bare = op(x, base, weight)
    x.requires_grad_()
    loss = op(x, base, weight)
    assert torch.equal(bare, loss.detach()) and not bare.requires_grad
    first, second = (torch.autograd.grad(loss, x, torch.tensor(0.25), retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second), "backward must leave the stored gradient as it is"


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_no_row_at_all(op):
    x = torch.zeros(0, 16, requires_grad=True)
    loss = op(x, torch.zeros(0, 16), torch.zeros(100, 16))
    loss.backward()
    assert loss.item() == 0 and x.grad.shape == (0, 16)


@needs_triton
def test_a_nan_reaches_the_loss_and_its_own_row_alone():
    x, base, weight = make_case(T=4, D=16, vocab=100).inputs.values()
    x[2, 3] = float("nan")
    x.requires_grad_()
    loss = linear_kl_triton(x, base, weight)
    (dx,) = torch.autograd.grad(loss, x)
    assert loss.isnan() and dx[2].isnan().all() and not dx[[0, 1, 3]].isnan().any()


def test_two_buffers_of_logits_need_no_more_than_the_cross_entropys_one():
    most = max(piece.stop - piece.start for n in range(100) for piece in cross_entropy.chunks(n))
    for n in range(100):
        pieces = cross_entropy.chunks(n, buffers=2)
        assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(n))
        assert all(2 * (piece.stop - piece.start) <= most for piece in pieces)
        assert n < 8 or pieces[0].stop >= 8


@needs_triton
def test_what_triton_allocates(monkeypatch):
    """Of logits two buffers, as long as the first chunk; beside them what is as long as x."""
    sizes, empty = [], torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *size, **k: sizes.append(size) or empty(x, *size, **k))
    outputs_and_gradients(make_case(T=40, D=16, vocab=100), linear_kl_triton)
    first = cross_entropy.chunks(40, buffers=2)[0].stop
    assert first < 16 and [size for size in sizes if len(size) == 2] == [(first, 100)] * 2


@needs_triton
def test_what_triton_refuses():
    x, base, weight = make_case(T=4, D=16, vocab=100).inputs.values()
    refused("weight requires grad", linear_kl_triton, x, base, weight.clone().requires_grad_())
    refused("base requires grad", linear_kl_triton, x, base.clone().requires_grad_(), weight)
    refused("base .2, 16.", linear_kl_triton, x, base[:2], weight)
    refused("base .* torch.bfloat16", linear_kl_triton, x, base.bfloat16(), weight)
