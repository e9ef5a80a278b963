"""qk_norm_rope: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

import torch
from torch import Tensor

from kernels.lora_term import LoRATerm
from kernels.ops import qk_norm_rope as ops
from kernels.proof.cases._shared import random_on, rows_of, with_changes
from kernels.proof.closeness import Case
from kernels.proof.contract import Op, Work
from kernels.proof.launches import launched

CASES = [
    {"T": 4096, "H": 24, "G": 4, "K": 256, "P": 32},
    {"T": 4096, "H": 24, "G": 4, "K": 256, "P": 32, "rank": 0},
    {"T": 65, "H": 8, "G": 2, "K": 256, "P": 32, "rank": 4},
    {"T": 63, "H": 3, "G": 1, "K": 96, "P": 12, "strided": True},
]


def make_case(T, H, G, K, P, rank=1, strided=False, device="cpu", dtype=torch.float32, seed=0) -> Case:
    """P rotated pairs a head; rank 0: no adapter. Heads from 1 down to 0.001, so that eps counts."""
    draw, uniform = random_on(device, seed)
    F = 2 * (H + G) * K
    sizes = 10 ** (-3 * uniform(T, 2 * (H + G), 1))
    angles = torch.arange(T, device=device)[:, None] * 1e4 ** -torch.linspace(0, 1, P, device=device)
    inputs = {
        "qgkv": (draw(T, 2 * (H + G), K) * sizes).reshape(T, F).to(dtype),
        "q_weight": (0.1 * draw(K)).to(dtype),
        "k_weight": (0.1 * draw(K)).to(dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }
    if rank:
        inputs |= {"u": 0.1 * draw(T, 3 * rank), "B": 0.01 * draw(F, rank)}

    def call(op, x: dict[str, Tensor]) -> dict[str, Tensor]:
        lora = LoRATerm(x["u"], x["B"], 32.0) if rank else None
        outputs = op(rows_of(x["qgkv"], strided), x["q_weight"], x["k_weight"], x["cos"], x["sin"], H, G, 1e-6, lora)
        return dict(zip(("q", "gate", "k", "v"), outputs, strict=True))

    return Case(inputs, call, tuple(n for n in ("qgkv", "u", "B") if n in inputs))


def _u_changed(change):
    return lambda lora, **_: {"lora": lora and lora._replace(u=change(lora.u))}


MUTANTS = with_changes(ops.qk_norm_rope_triton, {
    "adapter term dropped": lambda **_: {"lora": None},
    "u of k and v exchanged": _u_changed(lambda u: u.flip(1)),
    "rotated the other way": lambda sin, **_: {"sin": -sin},
    "positions off by one": lambda cos, sin, **_: {"cos": cos.roll(1, 0), "sin": sin.roll(1, 0)},
    "eps ten times too large": lambda eps, **_: {"eps": 10 * eps},
    "norm weights exchanged": lambda q_weight, k_weight, **_: {"q_weight": k_weight, "k_weight": q_weight},
    "gradient of u lost": _u_changed(lambda u: u.detach() + 0 * u),
})  # fmt: skip


def work(T, H, G, K, P, rank=1, strided=False) -> Work:
    """In bf16. Forward: the row in, q, gate, k, v out; backward: their gradients, q and k in, the row's out."""
    F = 2 * (H + G) * K
    adapter, angles, flops = 4 * rank * (3 * T + F), 8 * T * P, 2 * rank * T * F
    return Work(4 * T * F + adapter + angles, 5 * T * F + 2 * adapter + angles, flops, 2 * flops)


OP = Op(
    "qk_norm_rope", ops.qk_norm_rope_reference, ops.qk_norm_rope_triton, CASES, make_case, MUTANTS, work,
    launched("qk_norm_rope"),
    without_lora={"rank": 0},
)  # fmt: skip
