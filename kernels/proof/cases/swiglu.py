"""swiglu: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

from importlib import import_module

import torch
from torch import Tensor

from kernels.lora_term import LoRATerm
from kernels.ops import swiglu as ops
from kernels.proof.cases._shared import random_on, rows_of, with_changes, without_u_gradient
from kernels.proof.closeness import Case
from kernels.proof.contract import Op, Peer, Work
from kernels.proof.launches import launched

CASES = [
    {"T": 4096, "I": 17408, "rank": 1},
    {"T": 4095, "I": 17408, "rank": 0},
    {"T": 65, "I": 1100, "rank": 1, "strided": True},
    {"T": 63, "I": 40, "rank": 4},
]


def make_case(T, I, rank=1, strided=False, device="cpu", dtype=torch.float32, seed=0) -> Case:
    """Gate and up of unit size; adapters as after some training (B near 0.01)."""
    draw, _ = random_on(device, seed)
    inputs = {"gate_up": draw(T, 2 * I).to(dtype)}
    if rank:
        inputs |= {"u": draw(T, 2 * rank), "B": 0.01 * draw(2 * I, rank), "lora_A": draw(rank, I) / I**0.5}

    def call(op, x: dict[str, Tensor]) -> dict[str, Tensor | None]:
        lora = LoRATerm(x["u"], x["B"], 32.0) if rank else None
        out, u = op(rows_of(x["gate_up"], strided), lora, x.get("lora_A"))
        return {"x": out, "u_out": u}

    return Case(inputs, call, tuple(inputs))


def _swap_halves(lora, **_):
    return {"lora": lora and lora._replace(u=lora.u.roll(lora.u.shape[1] // 2, 1))}


MUTANTS = with_changes(ops.swiglu_triton, {
    "adapter term dropped": lambda **_: {"lora": None},
    "u of gate and up swapped": _swap_halves,
    "gate and up swapped": lambda gate_up, **_: {"gate_up": gate_up.roll(gate_up.shape[1] // 2, 1)},
}) | {"gradient of u lost": without_u_gradient(ops.swiglu_triton)}  # fmt: skip


def work(T, I, rank=1, strided=False) -> Work:
    """In bf16: gate_up in, x out; backward dx and gate_up in, dgate_up out; the adapter's u, B, A and gradients."""
    adapter = 4 * rank * (3 * T + 3 * I)
    return Work(6 * T * I + adapter, 10 * T * I + 2 * adapter, 6 * rank * T * I, 14 * rank * T * I)


def _liger(size: dict, device: str):
    function = import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    return lambda x: function.apply(*x["gate_up"].chunk(2, dim=1))


OP = Op(
    "swiglu", ops.swiglu_reference, ops.swiglu_triton, CASES, make_case, MUTANTS, work, launched("swiglu"),
    without_lora={"rank": 0}, peers=(Peer("Liger", "liger_kernel", _liger),),
)  # fmt: skip
