"""sigmoid_gate: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

import torch
from torch import Tensor

from kernels.ops.sigmoid_gate import _BACKWARD, _backward_kernel, _forward_kernel, sigmoid_gate_triton
from kernels.proof.closeness import Case
from kernels.proof.protocol import CompileSpec, Work

CASES = [
    {"T": 4096, "N": 6144, "R": 1},
    {"T": 4096, "N": 6144, "R": 0},
    {"T": 65, "N": 2048, "R": 4},
    {"T": 63, "N": 1500, "R": 1, "strided": True},
]


def make_case(T, N, R=1, strided=False, device="cpu", dtype=torch.float32, seed=0) -> Case:
    """R rows of lora_A, 0 for none; strided: o and gate are slices of wider rows."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    inputs = {"o": draw(T, N).to(dtype), "gate": (3 * draw(T, N)).to(dtype)}
    if R:
        inputs["lora_A"] = draw(R, N) / N**0.5

    def call(op, x: dict[str, Tensor]) -> dict[str, Tensor | None]:
        # Cut here, because cloning an input makes it dense.
        o, gate = ((torch.cat([t, t], dim=1)[:, N:] if strided else t) for t in (x["o"], x["gate"]))
        y, u = op(o, gate, x.get("lora_A"))
        return {"x": y, "u": u}

    return Case(f"T {T}, N {N}, R {R}{', strided' if strided else ''}", inputs, call, tuple(inputs))


def _without_u_gradient(o, gate, lora_A=None):
    x, u = sigmoid_gate_triton(o, gate, lora_A)
    return x, None if u is None else u.detach() + 0 * u


MUTANTS = {
    "silu instead of sigmoid": lambda o, gate, lora_A=None: sigmoid_gate_triton(o * gate, gate, lora_A),
    "o and gate exchanged": lambda o, gate, lora_A=None: sigmoid_gate_triton(gate, o, lora_A),
    "gate's gradient lost": lambda o, gate, lora_A=None: sigmoid_gate_triton(o, gate.detach() + 0 * gate, lora_A),
    "gradient of u lost": _without_u_gradient,
}


def work(T, N, R=1, strided=False) -> Work:
    """In bf16. Forward: o, gate in, x out; backward: dx, o, gate in, do, dgate out."""
    row, adapter = 2 * T * N, 4 * R * (T + N)
    return Work(3 * row + adapter, 5 * row + 2 * adapter, 2 * R * T * N, 4 * R * T * N)


def compile_specs() -> list[CompileSpec]:
    """N = 6144, with and without an adapter on the output layer."""
    specs = []
    for R in (0, 1):
        absent = {} if R else dict.fromkeys(("p_A", "p_u", "p_du"))
        backward = {n: v for n, v in _BACKWARD.items() if n != "num_warps"}
        for kernel, sizes in ((_forward_kernel, {"BN": 1024, "STAGES": 3}), (_backward_kernel, backward)):
            constexprs = {n: v for n, v in (absent | {"N": 6144, "R": R} | sizes).items() if n in kernel.arg_names}
            fp32 = ("p_A", "p_u", "p_du", "p_partial")
            types = {n: "*fp32" if n in fp32 else "*bf16" if n[:2] == "p_" else "i32" for n in kernel.arg_names}
            signature = {n: t for n, t in types.items() if n not in constexprs}
            name = f"sigmoid_gate{kernel.__name__} R {R}"
            specs.append(CompileSpec(name, kernel, signature, constexprs, num_warps=4))
    return specs
