"""The causal convolution: reference against torch's conv1d document by document, Triton against the reference."""

import pytest
import torch
import torch.nn.functional as F

from kernels.ops._triton import HAS_TRITON
from kernels.ops.causal_conv1d_silu import causal_conv1d_silu_reference, causal_conv1d_silu_triton
from kernels.proof.cases.causal_conv1d_silu import make_case
from kernels.proof.closeness import Case, assert_close_fp32, outputs_and_gradients
from tests.kernels.trials import TRIALS
from tests.mistakes import refused

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


def conv1d_of_each_document(x, weight, documents, splits, initial_state=None):
    """torch's own convolution on every document alone, as transformers runs it."""
    outputs, taps = [], weight.shape[1]
    for i, rows in enumerate(x.split(documents.lengths)):
        before = x.new_zeros(taps - 1, x.shape[1]) if initial_state is None else initial_state[i]
        padded = torch.cat([before, rows]).T
        outputs.append(F.silu(F.conv1d(padded, weight[:, None], groups=x.shape[1])).T)
    return torch.cat(outputs).split(splits, dim=1)


@pytest.mark.parametrize("size", TRIALS["causal_conv1d_silu"].sizes, ids=str)
def test_reference_equals_torch_conv1d(size):
    case = make_case(**size)
    expected = outputs_and_gradients(case, conv1d_of_each_document, torch.float64)
    assert_close_fp32(outputs_and_gradients(case, causal_conv1d_silu_reference, torch.float64), expected)


@needs_triton
def test_a_boundary_shows_in_the_gradient_alone():
    """A forgotten restart in backward: dx of a document must not see the next one's gradient."""
    case = make_case((4, 4), (8, 8, 24))

    def second_document_only(op, x):
        return {name: c[4:] for name, c in case.call(op, x).items()}

    second = Case(case.inputs, second_document_only, case.grads)
    dx = outputs_and_gradients(second, causal_conv1d_silu_triton)["dx"]
    assert dx[:4].count_nonzero() == 0 and dx[4:].count_nonzero() == dx[4:].numel()


@needs_triton
def test_outputs_are_dense():
    """The delta rule reads q, k and v as they are: each must own its rows."""
    case = make_case(**TRIALS["causal_conv1d_silu"].sizes[1])
    outputs = case.call(causal_conv1d_silu_triton, case.inputs)
    assert all(c.is_contiguous() for c in outputs.values())


@needs_triton
def test_what_triton_refuses():
    for name in ("weight", "initial_state"):
        case = make_case((3,), (4, 4), state=True)
        trained = {n: x.clone().requires_grad_(n == name) for n, x in case.inputs.items()}
        refused(name, case.call, causal_conv1d_silu_triton, trained)
    case = make_case((3,), (2, 2, 2, 2))
    refused("4 splits", case.call, causal_conv1d_silu_triton, case.inputs)
