"""sigmoid_gate: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

import torch
from torch import Tensor

from kernels.ops import sigmoid_gate as ops
from kernels.proof.cases._shared import random_on, rows_of, with_changes, without_u_gradient
from kernels.proof.closeness import Case
from kernels.proof.contract import Op, Work
from kernels.proof.launches import launched

CASES = [
    {"T": 4096, "F": 6144, "J": 1},
    {"T": 4096, "F": 6144, "J": 0},
    {"T": 65, "F": 2048, "J": 4},
    {"T": 63, "F": 1500, "J": 1, "strided": True},
]


def make_case(T, F, J=1, strided=False, device="cpu", dtype=torch.float32, seed=0) -> Case:
    """J rows of lora_A, 0 for none; strided: o and gate are slices of wider rows."""
    draw, _ = random_on(device, seed)
    inputs = {"o": draw(T, F).to(dtype), "gate": (3 * draw(T, F)).to(dtype)}
    if J:
        inputs["lora_A"] = draw(J, F) / F**0.5

    def call(op, x: dict[str, Tensor]) -> dict[str, Tensor | None]:
        y, u = op(rows_of(x["o"], strided), rows_of(x["gate"], strided), x.get("lora_A"))
        return {"x": y, "u": u}

    return Case(inputs, call, tuple(inputs))


MUTANTS = with_changes(ops.sigmoid_gate_triton, {
    "silu instead of sigmoid": lambda o, gate, **_: {"o": o * gate},
    "o and gate exchanged": lambda o, gate, **_: {"o": gate, "gate": o},
    "gate's gradient lost": lambda gate, **_: {"gate": gate.detach() + 0 * gate},
}) | {"gradient of u lost": without_u_gradient(ops.sigmoid_gate_triton)}  # fmt: skip


def work(T, F, J=1, strided=False) -> Work:
    """In bf16. Forward: o, gate in, x out; backward: dx, o, gate in, do, dgate out."""
    row, adapter = 2 * T * F, 4 * J * (T + F)
    return Work(3 * row + adapter, 5 * row + 2 * adapter, 2 * J * T * F, 4 * J * T * F)


OP = Op(
    "sigmoid_gate", ops.sigmoid_gate_reference, ops.sigmoid_gate_triton, CASES, make_case, MUTANTS, work,
    launched("sigmoid_gate"),
    without_lora={"J": 0},
)  # fmt: skip
