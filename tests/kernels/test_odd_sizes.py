"""Every operation at the sizes of odd_sizes.py, in fp32 and in bf16: outputs and gradients against fp64, in the strict
interpreter (every access inside its argument, no races), twice, the second time with the programs in reverse order.
"""

import pytest
import torch

import kernels
from kernels.proof.check import shown
from kernels.proof.closeness import outputs_and_gradients
from kernels.proof.registry import OPERATIONS, operations
from tests.kernels.odd_sizes import LENGTHS, ODD, odd, worst_error

pytestmark = pytest.mark.skipif(not kernels.HAS_TRITON, reason="needs Triton")


def cases() -> list:
    parameters = []
    for op in OPERATIONS:
        for sizes, marks in ((ODD[op.name].fast, []), (ODD[op.name].slow, [pytest.mark.slow])):
            for size in sizes:
                for dtype in op.dtypes:
                    name = f"{op.name}: {shown(size)}, {str(dtype).removeprefix('torch.')}"
                    parameters.append(pytest.param(op, size, dtype, id=name, marks=marks))
    return parameters


def test_every_operation_has_odd_sizes():
    assert ODD.keys() == set(kernels.OPS)
    for name, sizes in ODD.items():
        assert sizes.fast and sizes.slow and sizes.soak, name
    lengths = [size["lengths"] for size in ODD["causal_attention"].soak]
    assert all([n] in lengths for n in LENGTHS) and any(len(x) >= 24 for x in lengths)


@pytest.mark.parametrize(("op", "size", "dtype"), cases())
def test_outputs_and_gradients(op, size, dtype):
    print(f"worst RMS error against fp64: {worst_error(op, size, dtype):.1e}")


@pytest.mark.parametrize("layout", ["strided", "expanded", "transposed"])
def test_gradients_arrive_in_the_layout_that_is_named(layout):
    """What the operation's backward gets: its values, and where they lie."""
    (op,) = operations(["sigmoid_gate"])
    seen = []

    def watching(*inputs):
        y, u = op.reference(*inputs)
        y.register_hook(lambda dy: seen.append(dy))
        return y, u

    case = odd(op).make_case(T=5, F=6, J=0, gradients=layout)
    outputs_and_gradients(case, watching)
    (dy,) = seen
    assert dy.shape == (5, 6) and not dy.isnan().any()
    assert dy.stride() == {"strided": (12, 1), "expanded": (0, 1), "transposed": (1, 5)}[layout]


def test_zero_rows_and_factors_reach_the_inputs():
    (op,) = operations(["sigmoid_gate"])
    plain, changed = (
        odd(op).make_case(T=7, F=6, **more).inputs for more in ({}, {"zero_rows": True, "scaled": {"gate": 70.0}})
    )
    assert not changed["o"][::3].any() and torch.equal(changed["o"][1], plain["o"][1])
    assert torch.equal(changed["gate"][1], 70 * plain["gate"][1]) and torch.equal(changed["lora_A"], plain["lora_A"])
