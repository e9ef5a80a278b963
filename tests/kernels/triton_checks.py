"""What every Triton operation has to show, given its module (kernels/proof/protocol.py) and its name."""

from types import ModuleType

import pytest
import torch

from kernels.proof.closeness import assert_close_bf16, assert_close_fp32, outputs_and_gradients, poisoned_empty


def implementations(module: ModuleType, name: str):
    return getattr(module, f"{name}_reference"), getattr(module, f"{name}_triton")


def check_against_fp64(module: ModuleType, name: str, size: dict) -> None:
    """Every output and gradient in fp32 against the reference in fp64, memory poisoned; a second run bit for bit."""
    reference, op = implementations(module, name)
    case = module.make_case(**size)
    expected = outputs_and_gradients(case, reference, torch.float64)
    with poisoned_empty():
        actual = outputs_and_gradients(case, op)
        again = outputs_and_gradients(case, op)
    assert_close_fp32(actual, expected)
    assert all(torch.equal(actual[n], again[n]) for n in actual), "two runs differ"


def check_rounding_points(module: ModuleType, name: str, size: dict) -> None:
    """fp16, which the interpreter rounds correctly: no worse than the reference in fp16 (Triton keeps gradients in
    fp32 where autograd rounds them, so it may be better).
    """
    reference, op = implementations(module, name)
    case = module.make_case(**size, dtype=torch.float16)
    plain = outputs_and_gradients(case, reference)
    actual = outputs_and_gradients(case, op)
    assert {n: x.dtype for n, x in actual.items()} == {n: x.dtype for n, x in plain.items()}
    assert_close_bf16(actual, plain, outputs_and_gradients(case, reference, torch.float64))


def check_mutant_is_rejected(module: ModuleType, name: str, mutant: str, size: dict) -> None:
    """The assertion of check_against_fp64 fails for a wrong operation."""
    reference, _ = implementations(module, name)
    case = module.make_case(**size)
    expected = outputs_and_gradients(case, reference, torch.float64)
    with pytest.raises(AssertionError, match="out of tolerance"):
        assert_close_fp32(outputs_and_gradients(case, module.MUTANTS[mutant]), expected)


def check_adapter_alone(module: ModuleType, name: str, size: dict, outputs: tuple[str, ...]) -> None:
    """y - base, where y would hide a small or missing adapter term."""
    reference, op = implementations(module, name)

    def difference(op, dtype=None):
        case = module.make_case(**size)
        x = {n: t.to(dtype) if dtype else t for n, t in case.inputs.items()}
        y, base = case.call(op, x), case.call(op, x | {"B": torch.zeros_like(x["B"])})
        return {n: y[n].double() - base[n].double() for n in outputs}

    assert_close_fp32(difference(op), difference(reference, torch.float64))
