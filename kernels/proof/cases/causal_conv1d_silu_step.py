"""causal_conv1d_silu_step: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

import torch
from torch import Tensor

from kernels.ops import causal_conv1d_silu_step as ops
from kernels.proof.cases._shared import random_on, rows_of, with_changes
from kernels.proof.closeness import Case
from kernels.proof.contract import Op, Work
from kernels.proof.launches import launched

CASES = [
    {"batch": 64, "channels": 10240},
    {"batch": 1, "channels": 10240, "strided": True},
    {"batch": 3, "channels": 300, "taps": 3, "strided": True},
    {"batch": 2, "channels": 40, "taps": 2},
]


def make_case(batch, channels, taps=4, strided=False, device="cpu", dtype=torch.float32, seed=0) -> Case:
    """One token for each of `batch` sequences; `strided`: x is cut out of wider rows, as the in-projection's are."""
    draw, _ = random_on(device, seed)
    inputs = {"x": draw(batch, channels), "weight": draw(channels, taps), "tail": draw(batch, taps - 1, channels)}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    inputs["weight"] = inputs["weight"] / taps**0.5

    def call(op, x: dict[str, Tensor]) -> dict[str, Tensor]:
        tail = x["tail"].clone()
        return {"c": op(rows_of(x["x"], strided), x["weight"], tail), "tail": tail}

    return Case(inputs, call)


def _shifted_first(x, weight, tail):
    ops.causal_conv1d_silu_step_reference(x, weight, tail)
    return ops.causal_conv1d_silu_step_reference(x, weight, tail.clone())


MUTANTS = with_changes(ops.causal_conv1d_silu_step_reference, {
    "tail not updated": lambda tail, **_: {"tail": tail.clone()},
    "taps reversed": lambda weight, **_: {"weight": weight.flip(1)},
    "without the oldest row": lambda weight, **_: {"weight": torch.cat([0 * weight[:, :1], weight[:, 1:]], 1)},
}) | {"tail overwritten before it is read": _shifted_first}  # fmt: skip


def work(batch, channels, taps=4, strided=False) -> Work:
    """In bf16: x and tail in, c and tail out, and the weights."""
    return Work(4 * batch * channels * taps + 2 * channels * taps, 0, 2 * batch * channels * taps)


OP = Op(
    "causal_conv1d_silu_step", ops.causal_conv1d_silu_step_reference, ops.causal_conv1d_silu_step_triton, CASES,
    make_case, MUTANTS, work, launched("causal_conv1d_silu_step"),
)  # fmt: skip
