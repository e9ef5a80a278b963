"""causal_conv1d_silu_step: the reference against the whole convolution, the Triton kernel against the reference in
fp64."""

import pytest
import torch

import kernels
from kernels.documents import Documents
from kernels.ops.causal_conv1d_silu import causal_conv1d_silu_reference
from kernels.ops.causal_conv1d_silu_step import causal_conv1d_silu_step_reference, causal_conv1d_silu_step_triton
from kernels.proof.closeness import assert_close_fp32
from tests.mistakes import refused


def step_by_step(x, weight, op):
    """x (T, C) of one sequence, a token at a time from an empty tail: c (T, C)."""
    tail = x.new_zeros(1, weight.shape[1] - 1, x.shape[1])
    return torch.cat([op(row[None], weight, tail) for row in x])


def test_steps_are_the_convolution():
    x, weight = torch.randn(9, 40, dtype=torch.float64), torch.randn(40, 4, dtype=torch.float64)
    whole = causal_conv1d_silu_reference(x, weight, Documents(torch.tensor([0, 9])), (40,))[0]
    steps = step_by_step(x, weight, causal_conv1d_silu_step_reference)
    torch.testing.assert_close(steps, whole, rtol=1e-13, atol=1e-13)


@pytest.mark.skipif(not kernels.HAS_TRITON, reason="needs Triton")
class TestTriton:
    def test_steps_follow_one_another(self):
        x, weight = torch.randn(6, 40), torch.randn(40, 4)
        expected = step_by_step(x.double(), weight.double(), causal_conv1d_silu_step_reference)
        assert_close_fp32({"c": step_by_step(x, weight, causal_conv1d_silu_step_triton)}, {"c": expected})

    def test_errors_name_the_culprit(self):
        x, weight, tail = torch.randn(2, 8), torch.randn(8, 4), torch.zeros(2, 3, 8)
        refused(r"x is torch.float64", causal_conv1d_silu_step_triton, x.double(), weight, tail)
        refused(r"tail is torch.float32 \(2, 4, 8\)", causal_conv1d_silu_step_triton, x, weight, torch.zeros(2, 4, 8))
        refused(r"tail is torch\.bfloat16", causal_conv1d_silu_step_triton, x, weight, tail.bfloat16())
        refused("no gradient", causal_conv1d_silu_step_triton, x.requires_grad_(), weight, tail)
