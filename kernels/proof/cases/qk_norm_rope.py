"""qk_norm_rope: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

import torch
from torch import Tensor

from kernels.lora_term import LoRATerm
from kernels.ops.qk_norm_rope import _CONSTANTS, _backward_kernel, _forward_kernel, qk_norm_rope_triton
from kernels.proof.closeness import Case
from kernels.proof.protocol import CompileSpec, Work

CASES = [
    {"T": 4096, "H": 24, "G": 4, "K": 256, "RD": 32},
    {"T": 4096, "H": 24, "G": 4, "K": 256, "RD": 32, "rank": 0},
    {"T": 65, "H": 8, "G": 2, "K": 256, "RD": 32, "rank": 4},
    {"T": 63, "H": 3, "G": 1, "K": 96, "RD": 12, "strided": True},
]


def make_case(T, H, G, K, RD, rank=1, strided=False, device="cpu", dtype=torch.float32, seed=0) -> Case:
    """RD rotated pairs a head; rank 0: no adapter. Heads from 1 down to 0.001, so that eps counts."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    N = 2 * (H + G) * K
    sizes = 10 ** (-3 * torch.rand(T, 2 * (H + G), 1, generator=generator, device=device))
    angles = torch.arange(T, device=device)[:, None] * 1e4 ** -torch.linspace(0, 1, RD, device=device)
    inputs = {
        "qgkv": (draw(T, 2 * (H + G), K) * sizes).reshape(T, N).to(dtype),
        "q_weight": (0.1 * draw(K)).to(dtype),
        "k_weight": (0.1 * draw(K)).to(dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }
    if rank:
        inputs |= {"u": 0.1 * draw(T, 3 * rank), "B": 0.01 * draw(N, rank)}

    def call(op, x: dict[str, Tensor]) -> dict[str, Tensor]:
        # Cut here, because cloning an input makes it dense.
        row = torch.cat([x["qgkv"], x["qgkv"]], dim=1)[:, :N] if strided else x["qgkv"]
        lora = LoRATerm(x["u"], x["B"], 32.0) if rank else None
        outputs = op(row, x["q_weight"], x["k_weight"], x["cos"], x["sin"], H, G, 1e-6, lora)
        return dict(zip(("q", "gate", "k", "v"), outputs, strict=True))

    name = f"T {T}, heads {H}/{G} of {K}, rotated {2 * RD}, rank {rank}{', strided' if strided else ''}"
    return Case(name, inputs, call, tuple(n for n in ("qgkv", "u", "B") if n in inputs))


def _mutant(change):
    def op(qgkv, q_weight, k_weight, cos, sin, num_heads, num_kv_heads, eps, lora=None):
        x = {"qgkv": qgkv, "q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin, "eps": eps, "lora": lora}
        return qk_norm_rope_triton(**x | change(**x), num_heads=num_heads, num_kv_heads=num_kv_heads)

    return op


MUTANTS = {
    "adapter term dropped": _mutant(lambda lora, **x: {"lora": None}),
    "u of k and v exchanged": _mutant(lambda lora, **x: {"lora": lora and lora._replace(u=lora.u.flip(1))}),
    "rotated the other way": _mutant(lambda sin, **x: {"sin": -sin}),
    "positions off by one": _mutant(lambda cos, sin, **x: {"cos": cos.roll(1, 0), "sin": sin.roll(1, 0)}),
    "eps ten times too large": _mutant(lambda eps, **x: {"eps": 10 * eps}),
    "norm weights exchanged": _mutant(lambda q_weight, k_weight, **x: {"q_weight": k_weight, "k_weight": q_weight}),
    "gradient of u lost": _mutant(lambda lora, **x: {"lora": lora and lora._replace(u=lora.u.detach() + 0 * lora.u)}),
}


def work(T, H, G, K, RD, rank=1, strided=False) -> Work:
    """In bf16. Forward: the row in, q, gate, k, v out; backward: their gradients, q and k in, the row's out."""
    N = 2 * (H + G) * K
    adapter, angles, flops = 4 * rank * (3 * T + N), 8 * T * RD, 2 * rank * T * N
    return Work(4 * T * N + adapter + angles, 5 * T * N + 2 * adapter + angles, flops, 2 * flops)


def compile_specs() -> list[CompileSpec]:
    """24/4 heads of 256, 64 dims rotated, with and without adapters."""
    specs = []
    for adapted in (True, False):
        absent = {} if adapted else dict.fromkeys(("p_u", "p_B", "p_du", "p_partial"))
        for kernel in (_forward_kernel, _backward_kernel):
            constexprs = absent | {"H": 24, "G": 4, "K": 256, "RD": 32, "BK": 256, "STAGES": _CONSTANTS["STAGES"]}
            constexprs = {n: v for n, v in constexprs.items() if n in kernel.arg_names}
            types = dict.fromkeys(("p_cos", "p_sin", "p_u", "p_B", "p_du", "p_partial"), "*fp32")
            types |= {"T": "i32", "stride_in": "i32", "eps": "fp32", "scale": "fp32"}
            signature = {n: types.get(n, "*bf16") for n in kernel.arg_names if n not in constexprs}
            name = f"qk_norm_rope{kernel.__name__}{' rank 1' if adapted else ''}"
            specs.append(CompileSpec(name, kernel, signature, constexprs, num_warps=1))
    return specs
