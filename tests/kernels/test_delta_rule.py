"""The gated delta rule: the recurrence against transformers', the chunk form against the recurrence in fp64. Outputs,
final states, every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

import kernels
from kernels.documents import Documents
from kernels.ops.gated_delta_rule import gated_delta_rule_recurrent, gated_delta_rule_reference
from kernels.ops.gated_delta_rule_step import gated_delta_rule_step_reference
from kernels.proof.closeness import Case, assert_close_fp32, outputs_and_gradients


def make_case(lengths, key_heads=2, value_heads=4, K=16, V=8, shift=0.0, state=False, size=1.0, seed=0) -> Case:
    """shift moves a: about -20 of log-decay at shift 20, none at -20. size of q and k: at 0.001 eps counts."""
    torch.manual_seed(seed)
    T, n = sum(lengths), len(lengths)
    documents = Documents(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32))
    inputs = {
        "q": size * torch.randn(T, key_heads, K),
        "k": size * torch.randn(T, key_heads, K),
        "v": torch.randn(T, value_heads, V),
        "a": torch.randn(T, value_heads) + shift,
        "b": torch.randn(T, value_heads),
        "A_log": torch.rand(value_heads),
        "dt_bias": torch.rand(value_heads),
    }
    if state:
        inputs["initial_state"] = torch.randn(n, value_heads, K, V)

    def call(op, x: dict[str, Tensor]) -> dict[str, Tensor]:
        o, final = op(**x, documents=documents, output_final_state=True)
        return {"o": o, "final_state": final}

    grads = ("q", "k", "v", "a", "b") + (("initial_state",) if state else ())
    return Case(inputs, call, grads)


CASES = [
    make_case([1]),
    make_case([2, 63, 1, 64], state=True),
    make_case([65, 130], key_heads=1, value_heads=3),
    make_case([130, 1, 1, 1, 70], key_heads=2, value_heads=2),
    make_case([70, 5], shift=20.0),
    make_case([70, 5], shift=-20.0),
    make_case([9, 5], size=0.001),
]


def transformers_rule(q, k, v, a, b, A_log, dt_bias, documents, initial_state=None, output_final_state=False):
    """transformers' recurrence on every document alone, gates as `Qwen3_5GatedDeltaNet` makes them; fp32 inside."""
    g, beta = -A_log.exp() * F.softplus(a + dt_bias), b.sigmoid()
    tokens = zip(*(x[None].split(documents.lengths, dim=1) for x in (q, k, v, g, beta)), strict=True)
    results = [
        torch_recurrent_gated_delta_rule(
            *x, None if initial_state is None else initial_state[i : i + 1], True, use_qk_l2norm_in_kernel=True
        )
        for i, x in enumerate(tokens)
    ]
    outs, states = zip(*results, strict=True)
    return torch.cat(outs, dim=1)[0], torch.cat(states)


@pytest.mark.parametrize("case", CASES)
def test_recurrence_equals_transformers(case):
    expected = outputs_and_gradients(case, gated_delta_rule_recurrent, torch.float64)
    assert_close_fp32(outputs_and_gradients(case, transformers_rule), expected)


@pytest.mark.parametrize("case", CASES)
def test_reference_equals_the_recurrence(case):
    expected = outputs_and_gradients(case, gated_delta_rule_recurrent, torch.float64)
    assert_close_fp32(outputs_and_gradients(case, gated_delta_rule_reference, torch.float64), expected)


def test_reference_in_fp32():
    """fp32 alone costs about 1e-6; a sloppy order of operations would show here."""
    case = CASES[1]
    expected = outputs_and_gradients(case, gated_delta_rule_recurrent, torch.float64)
    assert_close_fp32(outputs_and_gradients(case, gated_delta_rule_reference), expected)


def test_step_continues_the_state():
    """The one-token form, in place over a batch of states, equals the recurrence carried on."""
    case = make_case([1, 1, 1], state=True)
    x = {name: t.double() for name, t in case.inputs.items()}
    documents = Documents(torch.tensor([0, 1, 2, 3], dtype=torch.int32))
    expected, final = gated_delta_rule_recurrent(**x, documents=documents, output_final_state=True)
    state = x.pop("initial_state").clone()
    o = gated_delta_rule_step_reference(**x, state=state)
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def test_switch_runs_the_reference_on_cpu(monkeypatch):
    monkeypatch.setenv("PSYSAFE_KERNELS", "reference")
    case = CASES[0]
    a = outputs_and_gradients(case, kernels.gated_delta_rule)
    b = outputs_and_gradients(case, gated_delta_rule_reference)
    assert all(torch.equal(a[name], b[name]) for name in b)
