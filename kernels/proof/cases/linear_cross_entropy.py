"""linear_cross_entropy: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

from importlib import import_module

import torch
from torch import Tensor

from kernels.ops import linear_cross_entropy as ops
from kernels.proof.cases._shared import random_on, with_changes
from kernels.proof.closeness import Case
from kernels.proof.contract import Op, Peer, Work
from kernels.proof.launches import launched

CASES = [
    {"T": 2048, "D": 5120, "vocab": 248320},
    {"T": 65, "D": 64, "vocab": 8209},
    {"T": 1, "D": 16, "vocab": 100},
]


def make_case(T, D, vocab, device="cpu", dtype=torch.float32, seed=0) -> Case:
    """Logits of size one around a few large ones; labels include the first and the last word."""
    draw, uniform = random_on(device, seed)
    x, weight = draw(T, D), draw(vocab, D) / D**0.5
    weight[:: max(1, vocab // 7)] *= 10
    labels = (vocab * uniform(T)).long()
    labels[:2] = torch.tensor([vocab - 1, 0], device=device)[:T]

    def call(op, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": op(inputs["x"], inputs["weight"], inputs["labels"])}

    inputs = {"x": x.to(dtype), "weight": weight.to(dtype), "labels": labels}
    return Case(inputs, call, ("x",))


MUTANTS = with_changes(ops.linear_cross_entropy_triton, {
    "labels shifted by one": lambda labels, **_: {"labels": labels.roll(1)},
    "last word dropped": lambda weight, labels, **_: {
        "weight": weight[:-1], "labels": labels.clamp(max=len(weight) - 2),
    },
}) | {
    "mean instead of sum": lambda x, weight, labels: ops.linear_cross_entropy_triton(x, weight, labels) / len(x),
    "gradient lost": lambda x, *rest: ops.linear_cross_entropy_triton(x.detach(), *rest) + 0 * x.sum(),
}  # fmt: skip


def work(T, D, vocab) -> Work:
    """In bf16: x, W and dx, and the logits written, read, overwritten and read again; the gradient is made forward."""
    return Work(2 * (2 * T * D + 2 * vocab * D + 4 * T * vocab), 2 * (2 * T * D), 4 * T * D * vocab, T * D)


def _liger(size: dict, device: str):
    function = import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    options = (None, None, -100, 0.0, 0.0, "sum")  # bias, class weights, ignore_index, z loss, smoothing, reduction
    return lambda x: function.apply(x["x"], x["weight"], x["labels"], *options)[0]


OP = Op(
    "linear_cross_entropy", ops.linear_cross_entropy_reference, ops.linear_cross_entropy_triton, CASES, make_case,
    MUTANTS, work, launched("linear_cross_entropy"), peers=(Peer("Liger", "liger_kernel", _liger),),
)  # fmt: skip
