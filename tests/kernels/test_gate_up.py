"""The fused gate|up GEMM against F.linear + the SwiGLU reference in fp64, and that reference against the plain MLP."""

import pytest
import torch
import torch.nn.functional as F

from kernels._triton import HAS_TRITON
from kernels.closeness import assert_close_fp32, outputs_and_gradients, poisoned_empty
from kernels.gate_up import MUTANTS, compile_specs, gate_up_swiglu_reference, gate_up_swiglu_triton, make_case
from kernels.seams import LoRATerm

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

CASES = [
    make_case(T=1, D=40, I=40, rank=1),
    make_case(T=63, D=16, I=64, rank=0),
    make_case(T=64, D=72, I=36, rank=4),
    make_case(T=65, D=72, I=136, rank=1),  # two tiles of tokens, three of columns, a last step of 8 features
]


def adapted_linears(x, weight, lora=None, lora_A=None):
    """gate_proj and up_proj as two PEFT layers, then the MLP's own line."""
    gate_weight, up_weight = weight.chunk(2)
    gate, up = F.linear(x, gate_weight), F.linear(x, up_weight)
    if lora is not None:
        rank = lora.B.shape[1]
        gate_B, up_B = lora.B.chunk(2)
        gate = gate + lora.scale * F.linear(lora.u[:, :rank], gate_B)
        up = up + lora.scale * F.linear(lora.u[:, rank:], up_B)
    y = F.silu(gate) * up
    return y, None if lora_A is None else F.linear(y, lora_A)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_reference_equals_the_mlp(case):
    expected = outputs_and_gradients(case, adapted_linears, torch.float64)
    assert_close_fp32(outputs_and_gradients(case, gate_up_swiglu_reference, torch.float64), expected)


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_triton_equals_reference(case):
    expected = outputs_and_gradients(case, gate_up_swiglu_reference, torch.float64)
    with poisoned_empty():
        actual = outputs_and_gradients(case, gate_up_swiglu_triton)
        again = outputs_and_gradients(case, gate_up_swiglu_triton)
    assert_close_fp32(actual, expected)
    assert all(torch.equal(actual[name], again[name]) for name in actual), "two runs, two results"


@needs_triton
def test_nothing_is_kept_without_gradient():
    """Inference takes the other branch of the kernel; its outputs are the same bits."""
    case = CASES[3]
    with torch.no_grad(), poisoned_empty():
        bare = case.call(gate_up_swiglu_triton, case.inputs)
    kept = outputs_and_gradients(case, gate_up_swiglu_triton)
    assert all(torch.equal(bare[name], kept[name]) for name in bare)


@needs_triton
def test_adapter_term_alone():
    """y with the adapter minus y without it: an error in the small term must not hide in the large one."""
    case = CASES[0]
    terms = []
    for op, dtype in ((gate_up_swiglu_triton, torch.float32), (gate_up_swiglu_reference, torch.float64)):
        x = {name: t.to(dtype) for name, t in case.inputs.items()}
        with_term, without = (op(x["x"], x["weight"], LoRATerm(x["u"], x["B"], s))[0].double() for s in (32.0, 0.0))
        terms.append({"term": with_term - without})
    assert_close_fp32(*terms)


@needs_triton
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_rejected(name):
    case = make_case(T=5, D=16, I=40)
    expected = outputs_and_gradients(case, gate_up_swiglu_reference, torch.float64)
    with pytest.raises(AssertionError):
        assert_close_fp32(outputs_and_gradients(case, MUTANTS[name]), expected)


@needs_triton
def test_what_triton_refuses():
    x, weight = torch.zeros(3, 16), torch.zeros(80, 16)
    with pytest.raises(ValueError, match="TMA"):
        gate_up_swiglu_triton(torch.zeros(3, 15), torch.zeros(80, 15))
    with pytest.raises(ValueError, match="weight requires grad"):
        gate_up_swiglu_triton(x, weight.clone().requires_grad_())
    with pytest.raises(ValueError, match="one dtype"):
        gate_up_swiglu_triton(x, weight.bfloat16())


@needs_triton
@pytest.mark.slow
def test_no_transposed_accumulator():
    """W's tiles are transposed as loaded; nothing that a dot made may be (Triton on Hopper gets that wrong)."""
    from kernels.compile_check import ttgir_of
    from kernels.ttgir import transposed_accumulators

    assert transposed_accumulators(ttgir_of(compile_specs()[0])) == []
