"""linear_cross_entropy: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

import torch
from torch import Tensor

from kernels.ops.linear_cross_entropy import BV, STAGES, WARPS, _cross_entropy_kernel, linear_cross_entropy_triton
from kernels.proof.closeness import Case
from kernels.proof.protocol import CompileSpec, Work

CASES = [
    {"N": 2048, "D": 5120, "V": 248320},
    {"N": 65, "D": 64, "V": 8209},
    {"N": 1, "D": 16, "V": 100},
]


def make_case(N, D, V, device="cpu", dtype=torch.float32, seed=0) -> Case:
    """Logits of size one around a few large ones; labels include the first and the last word."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(N, D, generator=generator, device=device)
    weight = torch.randn(V, D, generator=generator, device=device) / D**0.5
    weight[:: max(1, V // 7)] *= 10
    labels = torch.randint(V, (N,), generator=generator, device=device)
    labels[:2] = torch.tensor([V - 1, 0], device=device)[:N]

    def call(op, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": op(inputs["x"], inputs["weight"], inputs["labels"])}

    inputs = {"x": x.to(dtype), "weight": weight.to(dtype), "labels": labels}
    return Case(f"N {N}, D {D}, V {V}", inputs, call, ("x",))


MUTANTS = {
    "labels shifted by one": lambda x, weight, labels: linear_cross_entropy_triton(x, weight, labels.roll(1)),
    "last word dropped": lambda x, weight, labels: linear_cross_entropy_triton(
        x, weight[:-1], labels.clamp(max=len(weight) - 2)
    ),
    "mean instead of sum": lambda x, weight, labels: linear_cross_entropy_triton(x, weight, labels) / len(x),
    "gradient lost": lambda x, weight, labels: linear_cross_entropy_triton(x.detach(), weight, labels) + 0 * x.sum(),
}


def work(N, D, V) -> Work:
    """In bf16: x, W and dx, and the logits written, read, overwritten and read again; the gradient is made forward."""
    return Work(2 * (2 * N * D + 2 * V * D + 4 * N * V), 2 * (2 * N * D), 4 * N * D * V, N * D)


def compile_specs() -> list[CompileSpec]:
    """V = 248,320 with gradient (training) and without (validation)."""
    signature = {"p_z": "*bf16", "p_label": "*i64", "p_loss": "*fp32"}
    return [
        CompileSpec(
            f"cross_entropy_kernel{' with gradient' * gradient}", _cross_entropy_kernel, signature,
            {"V": 248320, "GRAD": gradient, "BV": BV, "STAGES": STAGES}, num_warps=WARPS, aligned=("p_z",),
        )
        for gradient in (True, False)
    ]  # fmt: skip
