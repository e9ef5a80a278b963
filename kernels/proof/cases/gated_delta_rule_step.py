"""gated_delta_rule_step: the sizes it is tried at, wrong versions, its work, and its kernel as launched."""

import torch
from torch import Tensor

from kernels.ops import gated_delta_rule_step as ops
from kernels.proof.cases import gated_delta_rule
from kernels.proof.closeness import Case
from kernels.proof.contract import Op, Work
from kernels.proof.launches import launched

CASES = (
    {"batch": 64, "key_heads": 16, "value_heads": 48, "K": 128},
    {"batch": 2, "key_heads": 16, "value_heads": 48, "K": 128},
    {"batch": 3, "key_heads": 1, "value_heads": 3, "K": 32},
)


def make_case(batch, key_heads, value_heads, K, device="cpu", dtype=torch.float32, seed=0) -> Case:
    """One token for each of `batch` sequences. With bf16 inputs only o is compared: the state is fp32 on both sides."""
    like = {"state": True, "device": device, "dtype": dtype, "seed": seed}
    inputs = dict(gated_delta_rule.make_case((1,) * batch, key_heads, value_heads, K, K, **like).inputs)
    inputs["state"] = inputs.pop("initial_state")

    def call(op, x: dict[str, Tensor]) -> dict[str, Tensor | None]:
        x = dict(x)
        a, b = x.pop("ab").chunk(2, dim=1)
        state = x.pop("state").clone()
        o = op(**x, a=a, b=b, state=state)
        return {"o": o, "state": None if dtype == torch.bfloat16 else state}

    return Case(inputs, call)


def _state_kept(q, k, v, a, b, A_log, dt_bias, state):
    return ops.gated_delta_rule_step_reference(q, k, v, a, b, A_log, dt_bias, state.clone())


MUTANTS = {
    "no decay": lambda q, k, v, a, *rest, **more: ops.gated_delta_rule_step_reference(q, k, v, a - 1e4, *rest, **more),
    "state not updated": _state_kept,
}


def work(batch, key_heads, value_heads, K) -> Work:
    """The fp32 states read and written, the rest in bf16. Three products with the state."""
    states = batch * value_heads * K * K
    return Work(8 * states + 2 * batch * (2 * key_heads + 2 * value_heads) * K, 0, 6 * states)


OP = Op(
    "gated_delta_rule_step", ops.gated_delta_rule_step_reference, ops.gated_delta_rule_step_triton, CASES, make_case,
    MUTANTS, work, launched("gated_delta_rule_step"),
)  # fmt: skip
