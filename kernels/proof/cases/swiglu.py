"""swiglu: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

import torch
from torch import Tensor

from kernels.lora_term import LoRATerm
from kernels.ops.swiglu import BACKWARD_BT, BI, FORWARD_BT, STAGES, _backward_kernel, _forward_kernel, swiglu_triton
from kernels.proof.closeness import Case
from kernels.proof.protocol import CompileSpec, Work

CASES = [
    {"T": 4096, "I": 17408, "rank": 1},
    {"T": 4095, "I": 17408, "rank": 0},
    {"T": 65, "I": 1100, "rank": 1, "strided": True},
    {"T": 63, "I": 40, "rank": 4},
]


def make_case(T, I, rank=1, strided=False, device="cpu", dtype=torch.float32, seed=0) -> Case:
    """Gate and up of unit size; adapters as after some training (B near 0.01)."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    inputs = {"gate_up": draw(T, 2 * I).to(dtype)}
    if rank:
        inputs |= {"u": draw(T, 2 * rank), "B": 0.01 * draw(2 * I, rank), "lora_A": draw(rank, I) / I**0.5}

    def call(op, x: dict[str, Tensor]) -> dict[str, Tensor | None]:
        # A slice of a wider row, as a fused GEMM's output is; cloning inputs would make it dense, so it is cut here.
        gate_up = torch.cat([x["gate_up"]] * 2, 1)[:, : 2 * I] if strided else x["gate_up"]
        out, u = op(gate_up, LoRATerm(x["u"], x["B"], 32.0) if rank else None, x.get("lora_A"))
        return {"x": out, "u_out": u}

    return Case(f"T {T}, I {I}, rank {rank}{', strided' if strided else ''}", inputs, call, tuple(inputs))


def _mutant(change):
    return lambda gate_up, lora=None, lora_A=None: swiglu_triton(**change(gate_up=gate_up, lora=lora, lora_A=lora_A))


def _swap_halves(gate_up, lora, lora_A):
    swapped = lora and lora._replace(u=lora.u.roll(lora.u.shape[1] // 2, 1))
    return {"gate_up": gate_up, "lora": swapped, "lora_A": lora_A}


def _without_u_gradient(gate_up, lora=None, lora_A=None):
    x, u = swiglu_triton(gate_up, lora, lora_A)
    return x, None if u is None else u.detach() + 0 * u


MUTANTS = {
    "adapter term dropped": _mutant(lambda **x: x | {"lora": None}),
    "u of gate and up swapped": _mutant(_swap_halves),
    "gate and up swapped": _mutant(lambda **x: x | {"gate_up": x["gate_up"].roll(x["gate_up"].shape[1] // 2, 1)}),
    "gradient of u lost": _without_u_gradient,
}


def work(T, I, rank=1, strided=False) -> Work:
    """In bf16: gate_up in, x out; backward dx and gate_up in, dgate_up out; the adapter's u, B, A and gradients."""
    adapter = 4 * rank * (3 * T + 3 * I)
    return Work(6 * T * I + adapter, 10 * T * I + 2 * adapter, 6 * rank * T * I, 14 * rank * T * I)


def compile_specs() -> list[CompileSpec]:
    """I = 17,408, with rank-1 adapters on all three and with none."""
    bf16 = ("p_gate_up", "p_x", "p_dx", "p_dgate_up")
    scalars = {"T": "i32", "stride": "i32", "stride_dx": "i32", "scale": "fp32"}
    specs = []
    for kernel, BT in ((_forward_kernel, FORWARD_BT), (_backward_kernel, BACKWARD_BT)):
        for adapted in (True, False):
            absent = () if adapted else ("p_u", "p_B", "p_A", "p_u_parts", "p_du_out", "p_du_parts")
            constexprs = dict.fromkeys(absent) | {
                "I": 17408, "DA": adapted, "BT": BT, "BI": BI, "STAGES": STAGES
            }  # fmt: skip
            constexprs = {n: v for n, v in constexprs.items() if n in kernel.arg_names}
            types = {n: scalars.get(n, "*bf16" if n in bf16 else "*fp32") for n in kernel.arg_names}
            signature = {n: t for n, t in types.items() if n not in constexprs}
            name = f"swiglu{kernel.__name__}{' rank 1' if adapted else ''}"
            specs.append(CompileSpec(name, kernel, signature, constexprs, num_warps=4))
    return specs
