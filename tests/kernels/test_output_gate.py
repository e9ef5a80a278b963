"""sigmoid_gate: the reference against the formula, the Triton kernels against the reference in fp64."""

import torch

from kernels.ops.sigmoid_gate import sigmoid_gate_reference, sigmoid_gate_triton
from kernels.proof.cases.sigmoid_gate import OP
from kernels.proof.closeness import assert_close_fp32
from tests.mistakes import refused


def test_reference_equals_the_formula():
    x = {name: t.double() for name, t in OP.make_case(T=7, F=24, J=2).inputs.items()}
    expected = x["o"] / (1 + (-x["gate"]).exp())
    y, u = sigmoid_gate_reference(**x)
    assert_close_fp32({"x": y, "u": u}, {"x": expected, "u": torch.einsum("tn,rn->tr", expected, x["lora_A"])})


def test_errors_name_the_culprit():
    o = torch.randn(3, 16)
    refused(r"gate is torch.float64", sigmoid_gate_triton, o, o.double())
    refused("o has strides", sigmoid_gate_triton, torch.randn(16, 3).T, o)
