"""residual_rms_norm: the reference against transformers, the Triton kernels against the reference in fp64."""

import pytest
import torch
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm

from kernels.lora_term import LoRATerm, Pending
from kernels.ops.residual_rms_norm import residual_rms_norm_reference, residual_rms_norm_triton
from kernels.proof.cases.residual_rms_norm import OP
from kernels.proof.closeness import assert_close_fp32
from tests.mistakes import refused


def test_reference_equals_transformers():
    """h + (y + s u B^T) through Qwen3_5RMSNorm, which computes in fp32 whatever it is given."""
    case = OP.make_case(T=7, D=96, J=2)
    x = case.inputs
    norm = Qwen3_5RMSNorm(96, eps=1e-6)
    norm.weight.data = x["weight"]
    h = x["h"].double() + x["y"] + 32 * torch.outer(x["u"][:, 0].double(), x["B"][:, 0].double())
    normed = norm(h.float())
    theirs = {"h_out": h, "x": normed, "u_out": normed.double() @ x["lora_A"].double().T}
    double = {name: t.double() for name, t in x.items()}
    assert_close_fp32(theirs, case.call(residual_rms_norm_reference, double))


def test_one_gradient_serves_h_and_y():
    """dh and dy are the same numbers; a copy would cost a pass over memory."""
    h, y = (torch.randn(3, 16, requires_grad=True) for _ in range(2))
    out, x, _ = residual_rms_norm_triton(h, Pending(y, None), torch.zeros(16), 1e-6)
    dh, dy = torch.autograd.grad([out, x], [h, y], [torch.ones(3, 16), torch.ones(3, 16)])
    assert dh.data_ptr() == dy.data_ptr()


def test_only_what_is_needed():
    """The first layer of a frozen model: A has a gradient, the embedding has none."""
    h, A = torch.randn(5, 16), torch.randn(2, 16, requires_grad=True)
    results = []
    for op in (residual_rms_norm_triton, residual_rms_norm_reference):
        out, _, u = op(h, None, torch.zeros(16), 1e-6, A)
        assert out is h or torch.equal(out, h)
        results.append(torch.autograd.grad(u, A, torch.ones(5, 2))[0])
    torch.testing.assert_close(*results)
    # B alone: the layers before it are frozen.
    y, u, B = torch.randn(5, 16), torch.randn(5, 1), torch.randn(16, 1, requires_grad=True)
    results = []
    for op in (residual_rms_norm_triton, residual_rms_norm_reference):
        out, x, _ = op(h, Pending(y, LoRATerm(u, B, 2.0)), torch.zeros(16), 1e-6)
        results.append(torch.autograd.grad(out.sum() + x.square().sum(), B)[0])
    torch.testing.assert_close(*results)


def test_errors_name_the_culprit():
    h, w = torch.randn(3, 16), torch.zeros(16)
    refused(r"h is torch.float64", residual_rms_norm_triton, h.double(), None, w, 1e-6)
    refused("weight requires grad", residual_rms_norm_triton, h, None, w.requires_grad_(), 1e-6)
    with pytest.raises(ValueError, match=r"pending\.y has strides"):
        residual_rms_norm_triton(h, Pending(torch.randn(16, 3).T, None), w.detach(), 1e-6)
