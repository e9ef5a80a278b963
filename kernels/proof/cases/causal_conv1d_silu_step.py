"""causal_conv1d_silu_step: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

import torch
from torch import Tensor

from kernels.ops.causal_conv1d_silu_step import BC, WARPS, _step_kernel, causal_conv1d_silu_step_reference
from kernels.proof.closeness import Case
from kernels.proof.protocol import CompileSpec, Work

CASES = [
    {"batch": 64, "channels": 10240},
    {"batch": 1, "channels": 10240, "strided": True},
    {"batch": 3, "channels": 300, "taps": 3, "strided": True},
    {"batch": 2, "channels": 40, "taps": 2},
]


def make_case(batch, channels, taps=4, strided=False, device="cpu", dtype=torch.float32, seed=0) -> Case:
    """One token for each of `batch` sequences; `strided`: x is cut out of wider rows, as the in-projection's are."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    inputs = {
        "x": draw(batch, channels),
        "weight": draw(channels, taps) / taps**0.5,
        "tail": draw(batch, taps - 1, channels),
    }

    def call(op, x: dict[str, Tensor]) -> dict[str, Tensor]:
        row, tail = torch.cat([x["x"]] * 2, 1)[:, :channels] if strided else x["x"], x["tail"].clone()
        return {"c": op(row, x["weight"], tail), "tail": tail}

    return Case(f"{batch} sequences, {channels} channels, {taps} taps{', strided' * strided}", inputs, call)


def _tail_kept(x, weight, tail):
    return causal_conv1d_silu_step_reference(x, weight, tail.clone())


def _shifted_first(x, weight, tail):
    causal_conv1d_silu_step_reference(x, weight, tail)
    return causal_conv1d_silu_step_reference(x, weight, tail.clone())


MUTANTS = {
    "tail not updated": _tail_kept,
    "tail overwritten before it is read": _shifted_first,
    "taps reversed": lambda x, w, tail: causal_conv1d_silu_step_reference(x, w.flip(1), tail),
    "without the oldest row": lambda x, w, tail: causal_conv1d_silu_step_reference(
        x, torch.cat([0 * w[:, :1], w[:, 1:]], 1), tail
    ),
}


def work(batch, channels, taps=4, strided=False) -> Work:
    """In bf16: x and tail in, c and tail out, and the weights."""
    return Work(4 * batch * channels * taps + 2 * channels * taps, 0, 2 * batch * channels * taps)


def compile_specs() -> list[CompileSpec]:
    """C = 10,240 and four taps."""
    signature = dict.fromkeys(("p_x", "p_w", "p_tail", "p_c"), "*bf16") | {"stride_x": "i32"}
    constexprs = {"C": 10240, "M": 4, "BC": BC}
    return [CompileSpec("causal_conv1d_silu_step", _step_kernel, signature, constexprs, num_warps=WARPS)]
