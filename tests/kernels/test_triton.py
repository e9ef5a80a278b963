"""Every Triton operation against its definition in fp64: outputs and gradients, mutants, roundings, the adapter's term.

The sizes stand in tests/kernels/trials.py; what is special to one operation, in its own file. The optimiser, whose
oracle is bitsandbytes as well, has all its tests in test_adamw.py.
"""

import pytest
import torch

import kernels
from kernels.ops import linear_cross_entropy
from kernels.ops.gated_delta_rule import gated_delta_rule_recurrent
from kernels.proof.cases import gated_delta_rule
from kernels.proof.closeness import assert_close_bf16, assert_close_fp32, outputs_and_gradients, poisoned_empty
from kernels.proof.registry import OPERATIONS
from tests.kernels.test_attention import naive, naive_decode
from tests.kernels.trials import TRIALS

if not kernels.HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from kernels.proof.interpreter import strict_interpreter

# Where the reference is a faster form itself. For the others it is the definition.
DEFINITIONS = {
    "causal_attention": naive,
    "attention_decode": naive_decode,
    "gated_delta_rule": gated_delta_rule_recurrent,
}
TRIED = [(op, TRIALS[op.name]) for op in OPERATIONS if op.name in TRIALS]


def tried(of_trial, soaked=()):
    """Test parameters: (operation, x) for every x of of_trial(operation, trial)."""
    marks = (SLOW, pytest.mark.slow), (soaked, pytest.mark.soak)
    return [
        pytest.param(op, x, id=f"{op.name}-{x}", marks=[mark for xs, mark in marks if x in xs])
        for op, trial in TRIED
        for x in of_trial(op, trial)
    ]


SLOW = [size for size in TRIALS["gated_delta_rule"].sizes if sum(size["lengths"]) > 1000]
# In bf16 one mutant of the delta rule runs in every test; the others take two seconds each.
SOAKED = list(gated_delta_rule.MUTANTS)[1:]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_ROWS", 16)


def in_fp64(op, case):
    return outputs_and_gradients(case, DEFINITIONS.get(op.name, op.reference), torch.float64)


def test_every_operation_is_tried():
    assert TRIALS.keys() | {"gated_delta_rule_step", "adamw_8bit"} == set(kernels.OPS)


@pytest.mark.parametrize(("op", "size"), tried(lambda op, trial: trial.sizes))
def test_equals_the_definition(op, size):
    """Every output and gradient in fp32, memory poisoned; the programs in reverse order give the same bits."""
    case = op.make_case(**size)
    with poisoned_empty():
        actual = outputs_and_gradients(case, op.triton)
    with poisoned_empty(), strict_interpreter(backwards=True):
        again = outputs_and_gradients(case, op.triton)
    assert_close_fp32(actual, in_fp64(op, case))
    assert all(torch.equal(actual[n], again[n]) for n in actual), "two runs differ"


@pytest.mark.parametrize(("op", "mutant"), tried(lambda op, trial: op.mutants))
def test_mutants_are_rejected(op, mutant):
    """The assertion of the test above fails for a wrong operation, and for its numbers."""
    case = op.make_case(**TRIALS[op.name].mutant)
    with poisoned_empty():
        actual = outputs_and_gradients(case, op.mutants[mutant])
    with pytest.raises(AssertionError, match="out of tolerance") as error:
        assert_close_fp32(actual, in_fp64(op, case))
    assert "nan" not in str(error.value)


@pytest.mark.parametrize(("op", "mutant"), tried(lambda op, trial: op.mutants, SOAKED))
def test_mutants_are_rejected_in_bf16(op, mutant):
    """What training runs in. At least one tensor's largest error is beyond twice that of plain PyTorch: an RMS error a
    little above its limit could be another order of summation.
    """
    case = op.make_case(**TRIALS[op.name].mutant, dtype=torch.bfloat16)
    plain, expected = outputs_and_gradients(case, op.plain or op.reference), in_fp64(op, case)
    with poisoned_empty():
        actual = outputs_and_gradients(case, op.mutants[mutant])
    messages = []
    for name in expected:
        try:
            assert_close_bf16(*({name: results[name]} for results in (actual, plain, expected)))
        except AssertionError as error:
            messages.append(str(error))
    rejected = [message for message in messages if "max error" in message]
    print("; ".join(rejected))
    assert rejected and not any("nan" in message for message in messages), messages


@pytest.mark.parametrize(("op", "size"), tried(lambda op, trial: [trial.rounded] if trial.rounded else []))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_points(op, size, dtype):
    """No worse than the reference in that dtype (Triton keeps gradients in fp32 where autograd rounds them, so it may
    be better).
    """
    case = op.make_case(**size, dtype=dtype)
    plain = outputs_and_gradients(case, op.reference)
    with poisoned_empty():
        actual = outputs_and_gradients(case, op.triton)
    assert {n: x.dtype for n, x in actual.items()} == {n: x.dtype for n, x in plain.items()}
    assert_close_bf16(actual, plain, in_fp64(op, case))


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize(("op", "outputs"), tried(lambda op, trial: [trial.terms] if trial.adapter else []))
def test_adapter_term_alone(op, outputs, rank):
    """y - base, where y would hide a small or missing adapter term."""

    def difference(implementation, dtype):
        case = op.make_case(**TRIALS[op.name].adapter, rank=rank)
        x = {n: t.to(dtype) for n, t in case.inputs.items()}
        y, base = case.call(implementation, x), case.call(implementation, x | {"B": torch.zeros_like(x["B"])})
        return {n: y[n].double() - base[n].double() for n in outputs}

    assert_close_fp32(difference(op.triton, torch.float32), difference(op.reference, torch.float64))
