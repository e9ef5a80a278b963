"""gated_rms_norm: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

from importlib import import_module

import torch
from torch import Tensor

from kernels.ops import gated_rms_norm as ops
from kernels.proof.cases._shared import random_on, rows_of, with_changes, without_u_gradient
from kernels.proof.closeness import Case
from kernels.proof.contract import Op, Peer, Work
from kernels.proof.launches import launched

CASES = [
    {"T": 4096, "H": 48, "V": 128, "J": 0},
    {"T": 4096, "H": 48, "V": 128, "J": 1},
    {"T": 65, "H": 16, "V": 128, "J": 4},
    {"T": 63, "H": 5, "V": 96, "J": 1, "strided": True},
]


def make_case(T, H, V, J=0, strided=False, device="cpu", dtype=torch.float32, seed=0) -> Case:
    """J rows of lora_A, 0 for none; strided: o and z are slices of wider rows. Sizes of o down to 0.001: eps counts."""
    draw, uniform = random_on(device, seed)
    sizes = 10 ** (-3 * uniform(T, H, 1))
    inputs = {"o": (draw(T, H, V) * sizes).to(dtype), "z": (2 * draw(T, H * V)).to(dtype), "weight": 1 + 0.1 * draw(V)}
    if J:
        inputs["lora_A"] = draw(J, H * V) / (H * V) ** 0.5

    def call(op, x: dict[str, Tensor]) -> dict[str, Tensor | None]:
        y, u = op(rows_of(x["o"], strided), rows_of(x["z"], strided), x["weight"], 1e-6, x.get("lora_A"))
        return {"x": y, "u": u}

    return Case(inputs, call, tuple(n for n in inputs if n != "weight"))


def _norm_over_all_heads(o, weight, **_):
    return {"o": o.flatten(1)[:, None], "weight": weight.repeat(o.shape[1])}


MUTANTS = with_changes(ops.gated_rms_norm_triton, {
    "eps ten times too large": lambda eps, **_: {"eps": 10 * eps},
    "1 + w instead of w": lambda weight, **_: {"weight": weight + 1},
    "one norm over all heads": _norm_over_all_heads,
}) | {"gradient of u lost": without_u_gradient(ops.gated_rms_norm_triton)}  # fmt: skip


def work(T, H, V, J=0, strided=False) -> Work:
    """In bf16. Forward: o, z in, x out; backward: dx, o, z in, do, dz out."""
    row, adapter = 2 * T * H * V, 4 * J * (T + H * V)
    return Work(3 * row + adapter, 5 * row + 2 * adapter, 2 * J * T * H * V, 4 * J * T * H * V)


def _fla(size: dict, device: str):
    norm = import_module("fla.modules.fused_norm_gate").rms_norm_gated
    return lambda x: norm(x["o"], x["z"].view_as(x["o"]), x["weight"], None, activation="swish", eps=1e-6).flatten(1)


OP = Op(
    "gated_rms_norm", ops.gated_rms_norm_reference, ops.gated_rms_norm_triton, CASES, make_case, MUTANTS, work,
    launched("gated_rms_norm"), without_lora={"J": 0}, peers=(Peer("flash-linear-attention", "fla", _fla),),
)  # fmt: skip
