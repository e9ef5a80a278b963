"""The Triton kernels of the gated delta rule, in the interpreter: against the fp64 token recurrence (outputs, final
states, every gradient) and, tensor by tensor, against the chunk equations.
"""

import pytest
import torch
from torch import Tensor

from kernels.documents import Documents
from kernels.ops import gated_delta_rule_backward as backward
from kernels.ops import gated_delta_rule_forward as forward
from kernels.ops.gated_delta_rule import gated_delta_rule_recurrent, gated_delta_rule_triton
from kernels.ops.gated_delta_rule_step import gated_delta_rule_step_reference, gated_delta_rule_step_triton
from kernels.proof.cases.gated_delta_rule import make_case
from kernels.proof.closeness import Case, assert_close_fp32, outputs_and_gradients, poisoned_empty
from tests.kernels import delta_rule_equations as equations
from tests.mistakes import refused


def gates_apart(case: Case) -> dict[str, Tensor]:
    """The inputs of a case by the operation's own names: a and b, not the tensor that holds both."""
    a, b = case.inputs["ab"].chunk(2, dim=1)
    return {name: x for name, x in case.inputs.items() if name != "ab"} | {"a": a, "b": b}


def test_every_tensor_between_the_kernels():
    """A wrong intermediate shows here by its name. Ragged: full chunk, one token, two chunks; ratio 3."""
    case = make_case(lengths=(64, 1, 67), key_heads=1, value_heads=3, K=32, V=16, state=True)
    x = gates_apart(case)
    documents = Documents(torch.tensor([0, 64, 65, 132], dtype=torch.int32))
    do, dfinal = torch.randn_like(x["v"]), torch.randn_like(x["initial_state"])
    wide = {name: t.double() for name, t in x.items()}
    expected = equations.forward(**wide, documents=documents)
    gradients = equations.backward(
        expected, wide["a"], wide["A_log"], wide["dt_bias"], documents, do.double(), dfinal.double()
    )
    with poisoned_empty():
        q, k, v, a, b, A_log, dt_bias, initial = (
            x[name] for name in ("q", "k", "v", "a", "b", "A_log", "dt_bias", "initial_state")
        )
        plan = forward.schedule(documents)
        prepared = forward.prepare(q, k, a, b, A_log, dt_bias, plan)
        factors = forward.state_factors(prepared, k.shape[2])
        o, final, checkpoints = forward.states(q, k, v, prepared, factors, initial, plan, final=True, save=True)
        RT, ST = backward.recompute(k, v, prepared, factors, initial, checkpoints, plan)
        dv, dST, dinitial = backward.reverse(q, k, do, prepared, factors, dfinal, plan, initial=True)
        dq, dk, da, db = backward.gradients(q, k, a, A_log, dt_bias, do, dv, prepared, factors, RT, ST, dST, plan)
    gates, norms = prepared.gates, prepared.norms
    assert_close_fp32(
        {
            "c": gates[:, :, 0] + gates[:, :, 1],
            "beta": gates[:, :, 2],
            "rq": norms[:, :, 0],
            "rk": norms[:, :, 1],
            **{"M": prepared.M, "P": prepared.P, "o": o, "final": final, "R": RT.mT, "S": ST.mT, "dS": dST.mT},
        },
        {
            **{name: expected[name].squeeze(-1) for name in ("c", "beta")},
            **{name: expected[name][:, ::3].squeeze(-1) for name in ("rq", "rk")},
            **{name: expected[name] for name in ("M", "P", "o", "final", "R", "S")},
            "dS": gradients["dS"],
        },
    )
    actual = {"dq": dq, "dk": dk, "dv": dv, "da": da, "db": db, "dinitial_state": dinitial}
    assert_close_fp32(actual, {name: gradients[name] for name in actual})


def test_equations_equal_autograd():
    """The oracle of the test above against autograd through the recurrence, in fp64."""

    class Equations(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, a, b, A_log, dt_bias, initial_state, documents):
            ctx.x = equations.forward(q, k, v, a, b, A_log, dt_bias, documents, initial_state)
            ctx.rest = a, A_log, dt_bias, documents
            return ctx.x["o"], ctx.x["final"]

        @staticmethod
        def backward(ctx, do, dfinal):
            g = equations.backward(ctx.x, *ctx.rest, do, dfinal)
            return g["dq"], g["dk"], g["dv"], g["da"], g["db"], None, None, g["dinitial_state"], None

    def op(documents, output_final_state, **x):
        order = ("q", "k", "v", "a", "b", "A_log", "dt_bias", "initial_state")
        return Equations.apply(*(x[name] for name in order), documents)

    case = make_case(lengths=(65, 3), key_heads=1, value_heads=2, V=8, state=True)
    actual = outputs_and_gradients(case, op, torch.float64)
    expected = outputs_and_gradients(case, gated_delta_rule_recurrent, torch.float64)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-11, atol=1e-12, msg=name)


def test_packed_documents_equal_one_by_one():
    """Bit for bit: a document's chunks do not know their neighbours."""
    case = make_case(lengths=(66, 5, 64), key_heads=1, value_heads=2)
    x = gates_apart(case)
    gates = {name: x.pop(name) for name in ("A_log", "dt_bias")}
    packed, _ = gated_delta_rule_triton(**x, **gates, documents=Documents(torch.tensor([0, 66, 71, 135])))
    for begin, end in ((0, 66), (66, 71), (71, 135)):
        one = {name: t[begin:end] for name, t in x.items()}
        alone, _ = gated_delta_rule_triton(**one, **gates, documents=Documents(torch.tensor([0, end - begin])))
        assert torch.equal(packed[begin:end], alone)


def test_only_wanted_gradients():
    case = make_case(lengths=(66,), key_heads=1, value_heads=1)
    x = gates_apart(case)
    x["v"].requires_grad_()
    o, final = gated_delta_rule_triton(**x, documents=Documents(torch.tensor([0, 66])))
    assert final is None
    (dv,) = torch.autograd.grad(o.sum(), x["v"])
    y = {name: t.detach().double() for name, t in x.items()}
    y["v"].requires_grad_()
    o, _ = gated_delta_rule_recurrent(**y, documents=Documents(torch.tensor([0, 66])))
    (expected,) = torch.autograd.grad(o.sum(), y["v"])
    assert_close_fp32({"dv": dv}, {"dv": expected})


@pytest.mark.parametrize("heads", [(1, 1), (2, 4), (1, 3)], ids=str)
def test_step_equals_its_reference(heads):
    key_heads, value_heads = heads
    x = gates_apart(make_case((1, 1, 1), key_heads, value_heads, K=32, V=64, state=True))
    state = x.pop("initial_state")
    wide = {name: t.double() for name, t in x.items()} | {"state": state.double()}
    expected = gated_delta_rule_step_reference(**wide)
    with poisoned_empty():
        o = gated_delta_rule_step_triton(**x, state=state)
    assert_close_fp32({"o": o, "state": state}, {"o": expected, "state": wide["state"]})


def test_refuses_what_it_cannot_do():
    x = gates_apart(make_case((3,), 1, 2))
    documents = Documents(torch.tensor([0, 3]))

    def call(**changes):
        return gated_delta_rule_triton(**(x | {"documents": documents} | changes))

    refused("float64", call, **{name: t.double() for name, t in x.items()})
    refused("K = 8", call, q=x["q"][..., :8].contiguous(), k=x["k"][..., :8].contiguous())
    refused("keeps A_log frozen", call, A_log=x["A_log"].clone().requires_grad_())
    refused("ends at 2, v has 3", call, documents=Documents(torch.tensor([0, 2])))
    refused("rows of v are not contiguous", call, v=x["v"].transpose(1, 2).contiguous().transpose(1, 2))
    refused(r"shape \(1, 2, 16, 16\)", call, initial_state=torch.zeros(2, 2, 16, 16))
    with pytest.raises(ValueError, match="no backward"):
        x["v"].requires_grad_()
        gated_delta_rule_step_triton(**x, state=torch.zeros(3, 2, 16, 16))


def test_no_checkpoint_for_short_documents():
    """A state is saved before every 16th chunk but the first, whose state is the initial one."""
    plan = forward.schedule(Documents(torch.tensor([0, 1024, 1030, 1030 + 2049])))
    assert plan.checkpoints == 2
    assert plan.documents.tolist() == [[2, 1030, 2049, 17, 0], [0, 0, 1024, 0, 0], [1, 1024, 6, 16, 0]]
    assert [row[1:] for row in plan.segments.tolist()] == [
        [0, 1024, 0, -1],
        [1030, 1024, 17, -1],
        [2054, 1024, 33, 0],
        [1024, 6, 16, -1],
        [3078, 1, 49, 1],
    ]
