"""linear_kl: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

import torch
from torch import Tensor

from kernels.ops import linear_kl as ops
from kernels.proof.cases._shared import random_on, with_changes
from kernels.proof.closeness import Case
from kernels.proof.contract import Op, Work
from kernels.proof.launches import launched

CASES = [
    {"T": 1024, "D": 5120, "vocab": 248320},
    {"T": 65, "D": 64, "vocab": 8209},
    {"T": 1, "D": 16, "vocab": 100},
]


def make_case(T, D, vocab, device="cpu", dtype=torch.float32, seed=0) -> Case:
    """Logits of size one around a few large ones; the base's are related to the model's, and not the same."""
    draw, _ = random_on(device, seed)
    x, weight = draw(T, D), draw(vocab, D) / D**0.5
    weight[:: max(1, vocab // 7)] *= 10
    base = 0.5 * x + draw(T, D)

    def call(op, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": op(inputs["x"], inputs["base"], inputs["weight"])}

    return Case({"x": x.to(dtype), "base": base.to(dtype), "weight": weight.to(dtype)}, call, ("x",))


def _logarithms(*rows: Tensor, weight: Tensor) -> list[Tensor]:
    return [(x @ weight.T).log_softmax(1) for x in rows]


def _exchanged(x: Tensor, base: Tensor, weight: Tensor) -> Tensor:
    log_p, log_q = _logarithms(x, base, weight=weight)
    return (log_p.exp() * (log_p - log_q)).sum()


def _without_entropy(x: Tensor, base: Tensor, weight: Tensor) -> Tensor:
    log_p, log_q = _logarithms(x, base, weight=weight)
    return -(log_q.exp() * log_p).sum()


MUTANTS = with_changes(ops.linear_kl_triton, {
    "rows of the base shifted by one": lambda base, **_: {"base": base.roll(1, 0)},
    "last word dropped": lambda weight, **_: {"weight": weight[:-1]},
}) | {
    "KL(model || base)": _exchanged,
    "cross-entropy, the base's entropy left out": _without_entropy,
    "mean instead of sum": lambda x, *rest: ops.linear_kl_triton(x, *rest) / len(x),
    "gradient lost": lambda x, *rest: ops.linear_kl_triton(x.detach(), *rest) + 0 * x.sum(),
}  # fmt: skip


def work(T, D, vocab) -> Work:
    """In bf16: x, the base, dx, W for three GEMMs; z written, read, overwritten and read again, the base's logits
    written and read. The gradient is made forward.
    """
    return Work(2 * (3 * T * D + 3 * vocab * D + 6 * T * vocab), 2 * (2 * T * D), 6 * T * D * vocab, T * D)


OP = Op(
    "linear_kl", ops.linear_kl_reference, ops.linear_kl_triton, CASES, make_case, MUTANTS, work, launched("linear_kl")
)
