"""sigmoid_gate: the reference against the formula, the Triton kernels against the reference in fp64."""

import pytest
import torch

from kernels.ops.sigmoid_gate import sigmoid_gate_reference, sigmoid_gate_triton
from kernels.proof.cases.sigmoid_gate import OP
from kernels.proof.closeness import assert_close_fp32
from tests.kernels import triton_checks as checks

SIZES = [
    {"T": 1, "F": 64, "J": 1},
    {"T": 63, "F": 64, "J": 0},
    {"T": 64, "F": 40, "J": 3},
    {"T": 65, "F": 48, "J": 1, "strided": True},
    {"T": 5, "F": 1100, "J": 1},  # two pieces, the second one masked
    {"T": 5, "F": 2100, "J": 4, "strided": True},  # more rows than are fused: the plain projection
]


def test_reference_equals_the_formula():
    x = {name: t.double() for name, t in OP.make_case(T=7, F=24, J=2).inputs.items()}
    expected = x["o"] / (1 + (-x["gate"]).exp())
    y, u = sigmoid_gate_reference(**x)
    assert_close_fp32({"x": y, "u": u}, {"x": expected, "u": torch.einsum("tn,rn->tr", expected, x["lora_A"])})


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_triton_equals_the_reference(size):
    checks.check_against_fp64(OP, size)


@pytest.mark.parametrize("mutant", OP.mutants)
def test_mutant_is_rejected(mutant):
    checks.check_mutant_is_rejected(OP, mutant, {"T": 5, "F": 40, "J": 1})


def test_rounding_points():
    checks.check_rounding_points(OP, {"T": 33, "F": 64, "J": 1})


def test_errors_name_the_culprit():
    o = torch.randn(3, 16)
    with pytest.raises(ValueError, match=r"gate is torch.float64"):
        sigmoid_gate_triton(o, o.double())
    with pytest.raises(ValueError, match="o has strides"):
        sigmoid_gate_triton(torch.randn(16, 3).T, o)
