"""gated_rms_norm: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

import torch
from torch import Tensor

from kernels.ops.gated_rms_norm import _backward_kernel, _blocks, _forward_kernel, gated_rms_norm_triton
from kernels.proof.closeness import Case
from kernels.proof.protocol import CompileSpec, Work

CASES = [
    {"T": 4096, "H": 48, "V": 128, "R": 0},
    {"T": 4096, "H": 48, "V": 128, "R": 1},
    {"T": 65, "H": 16, "V": 128, "R": 4},
    {"T": 63, "H": 5, "V": 96, "R": 1, "strided": True},
]


def make_case(T, H, V, R=0, strided=False, device="cpu", dtype=torch.float32, seed=0) -> Case:
    """R rows of lora_A, 0 for none; strided: o and z are slices of wider rows. Sizes of o down to 0.001: eps counts."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    sizes = 10 ** (-3 * torch.rand(T, H, 1, generator=generator, device=device))
    inputs = {"o": (draw(T, H, V) * sizes).to(dtype), "z": (2 * draw(T, H * V)).to(dtype), "weight": 1 + 0.1 * draw(V)}
    if R:
        inputs["lora_A"] = draw(R, H * V) / (H * V) ** 0.5

    def call(op, x: dict[str, Tensor]) -> dict[str, Tensor | None]:
        # Cut here, because cloning an input makes it dense.
        o, z = ((torch.cat([t, t], dim=1)[:, t.shape[1] :] if strided else t) for t in (x["o"], x["z"]))
        y, u = op(o, z, x["weight"], 1e-6, x.get("lora_A"))
        return {"x": y, "u": u}

    name = f"T {T}, H {H}, V {V}, R {R}{', strided' if strided else ''}"
    return Case(name, inputs, call, tuple(n for n in inputs if n != "weight"))


def _mutant(change):
    def op(o, z, weight, eps, lora_A=None):
        return gated_rms_norm_triton(**change(o=o, z=z, weight=weight, eps=eps, lora_A=lora_A))

    return op


def _without_u_gradient(o, z, weight, eps, lora_A=None):
    x, u = gated_rms_norm_triton(o, z, weight, eps, lora_A)
    return x, None if u is None else u.detach() + 0 * u


def _norm_over_all_heads(o, z, weight, eps, lora_A=None):
    return gated_rms_norm_triton(o.flatten(1)[:, None], z, weight.repeat(o.shape[1]), eps, lora_A)


MUTANTS = {
    "eps ten times too large": _mutant(lambda **x: x | {"eps": 10 * x["eps"]}),
    "1 + w instead of w": _mutant(lambda **x: x | {"weight": x["weight"] + 1}),
    "one norm over all heads": _norm_over_all_heads,
    "gradient of u lost": _without_u_gradient,
}


def work(T, H, V, R=0, strided=False) -> Work:
    """In bf16. Forward: o, z in, x out; backward: dx, o, z in, do, dz out."""
    row, adapter = 2 * T * H * V, 4 * R * (T + H * V)
    return Work(3 * row + adapter, 5 * row + 2 * adapter, 2 * R * T * H * V, 4 * R * T * H * V)


def compile_specs() -> list[CompileSpec]:
    """48 heads of 128, with and without an adapter on the output layer."""
    specs = []
    for R in (0, 1):
        absent = {} if R else dict.fromkeys(("p_A", "p_u", "p_du"))
        forward = {"P": 6 if R else 2, **_blocks(48, 128)}
        for kernel, sizes in ((_forward_kernel, forward), (_backward_kernel, _blocks(48, 128))):
            constexprs = absent | {"H": 48, "V": 128, "R": R, "STAGES": 3} | sizes
            constexprs = {n: v for n, v in constexprs.items() if n in kernel.arg_names}
            types = dict.fromkeys(("p_w", "p_A", "p_u", "p_du", "p_partial"), "*fp32") | {"eps": "fp32"}
            types = {n: types.get(n, "*bf16" if n[:2] == "p_" else "i32") for n in kernel.arg_names}
            signature = {n: t for n, t in types.items() if n not in constexprs}
            name = f"gated_rms_norm{kernel.__name__} R {R}"
            specs.append(CompileSpec(name, kernel, signature, constexprs, num_warps=4))
    return specs
