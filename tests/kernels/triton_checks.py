"""What every Triton operation has to show, given its record (kernels/proof/contract.py)."""

import pytest
import torch

from kernels.proof.closeness import assert_close_bf16, assert_close_fp32, outputs_and_gradients, poisoned_empty
from kernels.proof.contract import Op


def check_against_fp64(op: Op, size: dict) -> None:
    """Every output and gradient in fp32 against the reference in fp64, memory poisoned; a second run bit for bit."""
    case = op.make_case(**size)
    expected = outputs_and_gradients(case, op.reference, torch.float64)
    with poisoned_empty():
        actual = outputs_and_gradients(case, op.triton)
        again = outputs_and_gradients(case, op.triton)
    assert_close_fp32(actual, expected)
    assert all(torch.equal(actual[n], again[n]) for n in actual), "two runs differ"


def check_rounding_points(op: Op, size: dict) -> None:
    """fp16, which the interpreter rounds correctly: no worse than the reference in fp16 (Triton keeps gradients in
    fp32 where autograd rounds them, so it may be better).
    """
    case = op.make_case(**size, dtype=torch.float16)
    plain = outputs_and_gradients(case, op.reference)
    actual = outputs_and_gradients(case, op.triton)
    assert {n: x.dtype for n, x in actual.items()} == {n: x.dtype for n, x in plain.items()}
    assert_close_bf16(actual, plain, outputs_and_gradients(case, op.reference, torch.float64))


def check_mutant_is_rejected(op: Op, mutant: str, size: dict) -> None:
    """The assertion of check_against_fp64 fails for a wrong operation."""
    case = op.make_case(**size)
    expected = outputs_and_gradients(case, op.reference, torch.float64)
    with pytest.raises(AssertionError, match="out of tolerance"):
        assert_close_fp32(outputs_and_gradients(case, op.mutants[mutant]), expected)


def check_adapter_alone(op: Op, size: dict, outputs: tuple[str, ...]) -> None:
    """y - base, where y would hide a small or missing adapter term."""

    def difference(implementation, dtype=None):
        case = op.make_case(**size)
        x = {n: t.to(dtype) if dtype else t for n, t in case.inputs.items()}
        y, base = case.call(implementation, x), case.call(implementation, x | {"B": torch.zeros_like(x["B"])})
        return {n: y[n].double() - base[n].double() for n in outputs}

    assert_close_fp32(difference(op.triton), difference(op.reference, torch.float64))
