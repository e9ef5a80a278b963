"""sigmoid_gate: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

import torch
from torch import Tensor

from kernels.ops import sigmoid_gate as ops
from kernels.proof.cases._shared import compile_spec, random_on, with_changes, without_u_gradient
from kernels.proof.closeness import Case
from kernels.proof.contract import CompileSpec, Op, Work

CASES = [
    {"T": 4096, "N": 6144, "R": 1},
    {"T": 4096, "N": 6144, "R": 0},
    {"T": 65, "N": 2048, "R": 4},
    {"T": 63, "N": 1500, "R": 1, "strided": True},
]


def make_case(T, N, R=1, strided=False, device="cpu", dtype=torch.float32, seed=0) -> Case:
    """R rows of lora_A, 0 for none; strided: o and gate are slices of wider rows."""
    draw, _ = random_on(device, seed)
    inputs = {"o": draw(T, N).to(dtype), "gate": (3 * draw(T, N)).to(dtype)}
    if R:
        inputs["lora_A"] = draw(R, N) / N**0.5

    def call(op, x: dict[str, Tensor]) -> dict[str, Tensor | None]:
        # Cut here, because cloning an input makes it dense.
        o, gate = ((torch.cat([t, t], dim=1)[:, N:] if strided else t) for t in (x["o"], x["gate"]))
        y, u = op(o, gate, x.get("lora_A"))
        return {"x": y, "u": u}

    return Case(f"T {T}, N {N}, R {R}{', strided' if strided else ''}", inputs, call, tuple(inputs))


MUTANTS = with_changes(ops.sigmoid_gate_triton, {
    "silu instead of sigmoid": lambda o, gate, **_: {"o": o * gate},
    "o and gate exchanged": lambda o, gate, **_: {"o": gate, "gate": o},
    "gate's gradient lost": lambda gate, **_: {"gate": gate.detach() + 0 * gate},
}) | {"gradient of u lost": without_u_gradient(ops.sigmoid_gate_triton)}  # fmt: skip


def work(T, N, R=1, strided=False) -> Work:
    """In bf16. Forward: o, gate in, x out; backward: dx, o, gate in, do, dgate out."""
    row, adapter = 2 * T * N, 4 * R * (T + N)
    return Work(3 * row + adapter, 5 * row + 2 * adapter, 2 * R * T * N, 4 * R * T * N)


def compile_specs() -> list[CompileSpec]:
    """N = 6144, with and without an adapter on the output layer."""
    types = dict.fromkeys(("p_A", "p_u", "p_du", "p_partial"), "*fp32") | {"T": "i32"}
    types |= dict.fromkeys(("stride_o", "stride_gate", "stride_dx"), "i32:16")
    specs = []
    for R in (0, 1):
        absent = {} if R else dict.fromkeys(("p_A", "p_u", "p_du"))
        for kernel, sizes in ((ops._forward_kernel, {"BN": 1024, "STAGES": 3}), (ops._backward_kernel, ops._BACKWARD)):
            constants = absent | {"N": 6144, "R": R} | sizes
            specs.append(compile_spec(f"sigmoid_gate{kernel.__name__} R {R}", kernel, types, constants))
    return specs


OP = Op(
    "sigmoid_gate", ops.sigmoid_gate_reference, ops.sigmoid_gate_triton, CASES, make_case, MUTANTS, work, compile_specs,
    without_lora={"R": 0},
)  # fmt: skip
