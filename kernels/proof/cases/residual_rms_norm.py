"""residual_rms_norm: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

from importlib import import_module

import torch
from torch import Tensor

from kernels.lora_term import LoRATerm, Pending
from kernels.ops import residual_rms_norm as ops
from kernels.proof.cases._shared import random_on, rows_of, with_changes, without_u_gradient
from kernels.proof.closeness import Case
from kernels.proof.contract import Op, Peer, Work
from kernels.proof.launches import launched

CASES = [
    {"T": 4096, "D": 5120, "J": 2},
    {"T": 4096, "D": 5120, "J": 3},
    {"T": 4096, "D": 5120, "J": 0, "rank": 0},
    {"T": 4095, "D": 5120, "J": 3, "rank": 0, "pending": False},
    {"T": 65, "D": 2560, "J": 2, "rank": 4},
    {"T": 63, "D": 1000, "J": 4, "strided": True},
]


def make_case(T, D, J=0, rank=1, pending=True, strided=False, device="cpu", dtype=torch.float32, seed=0) -> Case:
    """Rows from 1 down to 0.001, so that eps counts. J rows of lora_A; rank of the pending adapter, 0 for none."""
    draw, uniform = random_on(device, seed)
    rank = rank if pending else 0
    sizes = 10 ** (-3 * uniform(T, 1))
    inputs = {"h": (draw(T, D) * sizes).to(dtype), "weight": (0.1 * draw(D)).to(dtype)}
    if pending:
        inputs["y"] = (draw(T, D) * sizes).to(dtype)
    if rank:
        inputs |= {"u": draw(T, rank) * sizes, "B": 0.01 * draw(D, rank)}
    if J:
        inputs["lora_A"] = draw(J, D) / D**0.5

    def call(op, x: dict[str, Tensor]) -> dict[str, Tensor | None]:
        lora = LoRATerm(x["u"], x["B"], 32.0) if rank else None
        term = Pending(rows_of(x["y"], strided), lora) if pending else None
        h, y, u = op(rows_of(x["h"], strided), term, x["weight"], 1e-6, x.get("lora_A"))
        return {"h_out": h, "x": y, "u_out": u}

    return Case(inputs, call, tuple(n for n in inputs if n != "weight"))


MUTANTS = with_changes(ops.residual_rms_norm_triton, {
    "adapter term dropped": lambda pending, **_: {"pending": pending and Pending(pending.y, None)},
    "pending term dropped": lambda h, **_: {"h": h.clone(), "pending": None},
    "eps ten times too large": lambda eps, **_: {"eps": 10 * eps},
    "w instead of 1 + w": lambda weight, **_: {"weight": weight - 1},
}) | {"gradient of u lost": without_u_gradient(ops.residual_rms_norm_triton)}  # fmt: skip


def work(T, D, J=0, rank=1, pending=True, strided=False) -> Work:
    """In bf16. Forward: h, y in, h', x out (h in, x out where nothing is pending); backward: dh', dx, h' in, dh out."""
    rank = rank if pending else 0
    row, adapter = 2 * T * D, 4 * (J + rank) * (T + D)
    flops = 2 * T * D * (J + rank)
    return Work((4 if pending else 2) * row + adapter, 4 * row + 2 * adapter, flops, 2 * flops)


def _liger(size: dict, device: str):
    function = import_module("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction
    return lambda x: function.apply(x["y"], x["h"], x["weight"], 1e-6, 1.0, "gemma", False)


OP = Op(
    "residual_rms_norm", ops.residual_rms_norm_reference, ops.residual_rms_norm_triton, CASES, make_case, MUTANTS, work,
    launched("residual_rms_norm"), without_lora={"J": 0, "rank": 0}, peers=(Peer("Liger", "liger_kernel", _liger),),
)  # fmt: skip
