"""SwiGLU: the reference against the plain formula with PEFT's way of adding adapters, Triton against the reference."""

import pytest
import torch

from kernels.lora_term import LoRATerm
from kernels.ops._triton import HAS_TRITON
from kernels.ops.swiglu import swiglu_reference, swiglu_triton
from kernels.proof.cases.swiglu import make_case
from kernels.proof.closeness import assert_close_fp32, outputs_and_gradients, poisoned_empty
from tests.kernels.trials import TRIALS
from tests.mistakes import refused

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


def plain_swiglu(gate_up, lora=None, lora_A=None):
    """One token at a time, gate and up apart; shares no code with the reference."""
    size, rank = gate_up.shape[1] // 2, 0 if lora is None else lora.B.shape[1]
    rows, us = [], []
    for t in range(len(gate_up)):
        gate, up = gate_up[t, :size], gate_up[t, size:]
        if lora is not None:
            gate = gate + lora.scale * lora.B[:size].mv(lora.u[t, :rank])
            up = up + lora.scale * lora.B[size:].mv(lora.u[t, rank:])
        rows.append(gate / (1 + torch.exp(-gate)) * up)
        us.append(None if lora_A is None else lora_A.mv(rows[-1]))
    return torch.stack(rows), None if lora_A is None else torch.stack(us)


@pytest.mark.parametrize("size", TRIALS["swiglu"].sizes, ids=str)
def test_reference_equals_the_formula(size):
    case = make_case(**size)
    expected = outputs_and_gradients(case, plain_swiglu, torch.float64)
    assert_close_fp32(outputs_and_gradients(case, swiglu_reference, torch.float64), expected)


@needs_triton
def test_only_wanted_gradients():
    """Adapters of down alone, frozen: the rest of the gradients must not depend on who else asks."""
    case = make_case(T=9, I=40, rank=1)
    for names in (("gate_up",), ("gate_up", "B"), ("gate_up", "lora_A"), ("gate_up", "u")):
        wanted = case.__class__(case.inputs, case.call, names)
        expected = outputs_and_gradients(wanted, swiglu_reference, torch.float64)
        with poisoned_empty():
            assert_close_fp32(outputs_and_gradients(wanted, swiglu_triton), expected)


@needs_triton
def test_what_triton_refuses():
    refused("float64", swiglu_triton, torch.zeros(2, 8, dtype=torch.float64))
    refused("strides", swiglu_triton, torch.zeros(8, 2).T, LoRATerm(torch.zeros(2, 2), torch.zeros(8, 1), 1.0))
