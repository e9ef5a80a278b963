"""Sizes and inputs that break kernels, for every operation: compared with fp64 in fp32 and in bf16.

Beside the arguments of an operation's own make_case a size may hold
    scaled     input -> factor: gates that saturate, logits that leave one word
    zero_rows  every third row of every input with a row a token is zero
    gradients  how the outputs' gradients lie in memory: "strided" (columns of wider rows, NaN beside them), "expanded"
               (one row for all, as a sum passes it back) or "transposed" (the elements of a row are not adjacent)
    amplifies  the mathematics multiplies rounding errors: fp32 is held to the reference in fp32, not to 1e-5
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.proof.check import closeness_of
from kernels.proof.closeness import Case
from kernels.proof.contract import Op

LENGTHS = (1, 2, 31, 33, 96, 127, 129, 191, 257)
ROWS = (1, 2, 31, 33, 97, 129)  # for operations that know no neighbouring token: a few rows a program
TINY_DOCUMENTS = (1, 2, 1, 3, 1, 1, 4, 2) * 5


class Odd(NamedTuple):
    """fast: in every run of the tests. slow: with `-m slow`. soak: tests/kernels/soak_odd_sizes.py runs all three."""

    fast: list[dict]
    slow: list[dict]
    soak: list[dict]


class _Relaid(torch.autograd.Function):
    """y itself; its gradient is passed on in another layout."""

    @staticmethod
    def forward(ctx, y: Tensor, layout: str) -> Tensor:
        ctx.layout = layout
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        if dy.dim() < 2:
            return dy, None
        if ctx.layout == "expanded":
            return dy[:1].expand_as(dy), None
        if ctx.layout == "transposed":
            return dy.transpose(0, -1).contiguous().transpose(0, -1), None
        wide = dy.new_full((len(dy), 2, *dy.shape[1:]), float("nan"))
        wide[:, 1] = dy
        return wide[:, 1], None


def _make_case(make_case: Callable[..., Case], *, scaled=None, zero_rows=False, gradients=None, **size) -> Case:
    case = make_case(**size)
    inputs = {name: x * (scaled or {}).get(name, 1) for name, x in case.inputs.items()}
    if zero_rows:
        T = size.get("T") or sum(size["lengths"])
        for x in inputs.values():
            if len(x) == T and x.is_floating_point():
                x[::3] = 0

    def call(op: Callable, x: dict[str, Tensor]) -> dict[str, Tensor | None]:
        outputs = case.call(op, x)
        if gradients is None:
            return outputs
        return {name: y if y is None else _Relaid.apply(y, gradients) for name, y in outputs.items()}

    return Case(inputs, call, case.grads)


def odd(op: Op) -> Op:
    """The operation with cases that take the keys above."""
    return dataclasses.replace(op, make_case=lambda **size: _make_case(op.make_case, **size))


def worst_error(op: Op, size: dict, dtype: torch.dtype) -> float:
    """The worst error against fp64; AssertionError unless the case holds."""
    size = dict(size)
    plain = op.reference if size.pop("amplifies", False) and dtype == torch.float32 else None
    # The gradients of the delta rule's gates are sums that cancel: of one input alone, their largest error is luck.
    seeds = 3 if op.name == "gated_delta_rule" and dtype == torch.bfloat16 else 1
    return closeness_of(odd(op), size, dtype, seeds, "cpu", plain)


def _heads(group: int, G: int = 2) -> dict[str, int]:
    return {"heads": group * G, "kv_heads": G, "head_dim": 64}


_TRAINED = {"heads": 6, "kv_heads": 1, "head_dim": 256}  # the tiles and the group of the 27B model
_STATES = {"K": 128, "V": 128}
_ATTENTION_GRADIENTS = ("strided", "expanded", "transposed")
ODD = {
    "residual_rms_norm": Odd(
        [
            {"T": 31, "D": 129, "J": 3, "zero_rows": True, "gradients": "strided"},
            {"T": 2, "D": 5120, "J": 3},
        ],
        [{"T": 33, "D": 96, "J": 2, "gradients": "expanded"}, {"T": 96, "D": 257, "J": 1, "zero_rows": True}],
        [{"T": T, "D": 191, "J": 2, "strided": T % 3 == 0} for T in ROWS]
        + [{"T": 9, "D": D, "J": 3, "gradients": "transposed"} for D in (1, 2, 33, 127, 1025, 5121)]
        + [{"T": 17, "D": 64, "J": 2, "scaled": {"h": 1e4, "y": 1e4}}],
    ),
    "qk_norm_rope": Odd(
        [
            {"T": 11, "H": 6, "G": 1, "K": 24, "P": 5, "zero_rows": True, "gradients": "strided"},
            {"T": 2, "H": 3, "G": 1, "K": 256, "P": 32},
        ],
        [{"T": 33, "H": 8, "G": 1, "K": 40, "P": 8}, {"T": 31, "H": 3, "G": 3, "K": 64, "P": 32, "rank": 0}],
        [{"T": T, "H": 1, "G": 1, "K": 33, "P": 7} for T in ROWS]
        + [{"T": 5, "H": 2 * g, "G": 2, "K": 96, "P": 12, "gradients": "expanded"} for g in (1, 2, 3, 6, 8)]
        + [{"T": 5, "H": 24, "G": 4, "K": 256, "P": 32, "gradients": "transposed", "strided": True}],
    ),
    "causal_attention": Odd(
        [
            {"lengths": [129, 2], "heads": 2, "kv_heads": 1, "head_dim": 256, "gradients": "strided"},
            {"lengths": [33, 1], **_heads(8, 1), "zero_rows": True, "gradients": "expanded"},
            {"lengths": [97], **_heads(1, 1), "logits": 30.0},
        ],
        [
            {"lengths": list(TINY_DOCUMENTS[:25]), **_heads(2, 1)},
            {"lengths": [191], **_TRAINED},
            {"lengths": [127, 1, 96], **_heads(3, 1), "gradients": "transposed"},
        ],
        [{"lengths": [T], "heads": 2, "kv_heads": 1, "head_dim": 256} for T in LENGTHS]
        + [{"lengths": [31, 96, 2], **_heads(g)} for g in (1, 2, 3, 6, 8)]
        + [{"lengths": [130], "heads": 2, "kv_heads": 1, "head_dim": K, "logits": 30.0, "amplifies": True}
           for K in (64, 128, 256)]
        + [{"lengths": [100, 30], **_TRAINED, "zero_rows": True, "gradients": g} for g in _ATTENTION_GRADIENTS]
        + [{"lengths": list(TINY_DOCUMENTS), "heads": 2, "kv_heads": 1, "head_dim": 128}],
    ),
    "attention_decode": Odd(
        [{"lengths": [1, 33], **_heads(3, 1)}, {"lengths": [257], "heads": 6, "kv_heads": 1, "head_dim": 256}],
        [{"lengths": [2, 31, 127], **_heads(8, 1)}, {"lengths": [191], **_heads(1, 1), "scaled": {"q": 30.0}}],
        [{"lengths": [T], "heads": 6, "kv_heads": 1, "head_dim": 256} for T in LENGTHS]
        + [{"lengths": [130, 9], **_heads(g)} for g in (1, 2, 3, 6, 8)]
        + [{"lengths": [8300], **_heads(2, 1)}],
    ),
    "sigmoid_gate": Odd(
        [
            {"T": 11, "F": 129, "J": 1, "scaled": {"gate": 70.0}, "gradients": "strided"},
            {"T": 2, "F": 6144, "J": 1, "zero_rows": True},
        ],
        [{"T": 33, "F": 1025, "J": 2, "gradients": "expanded"}, {"T": 31, "F": 7, "J": 1}],
        [{"T": T, "F": 191, "J": 1, "strided": T % 3 == 0} for T in ROWS]
        + [{"T": 9, "F": F, "J": J, "gradients": "transposed"} for F in (1, 33, 1023, 6144) for J in (0, 3, 5)],
    ),
    "causal_conv1d_silu": Odd(
        [
            {"lengths": (31, 1, 2), "splits": (33, 7), "taps": 2, "gradients": "strided"},
            {"lengths": (5, 1), "splits": (8, 24), "state": True, "scaled": {"x": 100.0}, "zero_rows": True},
        ],
        [
            {"lengths": TINY_DOCUMENTS, "splits": (16, 16, 48), "state": True},
            {"lengths": (96,), "splits": (1025,), "taps": 6, "gradients": "expanded"},
        ],
        [{"lengths": (T,), "splits": (24,)} for T in LENGTHS]
        + [{"lengths": (7, 1, 9), "splits": (9, 17), "taps": M, "state": True} for M in (2, 3, 4, 5, 6)]
        + [{"lengths": (1,) * 40, "splits": (20,), "state": s, "gradients": "transposed"} for s in (False, True)],
    ),
    "causal_conv1d_silu_step": Odd(
        [{"batch": 31, "channels": 33}, {"batch": 2, "channels": 257, "taps": 6, "scaled": {"x": 100.0}}],
        [{"batch": 33, "channels": 1025, "taps": 2, "strided": True}],
        [{"batch": n, "channels": 129, "taps": M} for n in (1, 2, 31, 96, 127) for M in (2, 3, 4)],
    ),
    "gated_delta_rule": Odd(
        [
            {"lengths": (65,), "key_heads": 1, "value_heads": 1, **_STATES, "gradients": "strided"},
            {"lengths": (33, 2), "key_heads": 1, "value_heads": 2, "state": True, "scaled": {"ab": 50.0}},
            {"lengths": (31,), "key_heads": 1, "value_heads": 1, "K": 64, "zero_rows": True, "gradients": "expanded"},
        ],
        [
            {"lengths": (129,), "key_heads": 1, "value_heads": 1, **_STATES, "shift": -20.0, "state": True},
            {"lengths": (33,), "key_heads": 1, "value_heads": 8, "V": 32, "zero_rows": True},
        ],
        # Of one or two tokens several documents: the largest error of a handful of numbers is luck.
        [{"lengths": (T,) * (1 if T > 2 else 6), "key_heads": 1, "value_heads": 1, "K": 64, "V": 64, "state": True}
         for T in LENGTHS]
        + [{"lengths": (33,), "key_heads": 1, "value_heads": g, "K": 32, "V": 32} for g in (3, 6)]
        + [{"lengths": TINY_DOCUMENTS[:25], "key_heads": 1, "value_heads": 1, "state": True}]
        + [{"lengths": (130, 3), "key_heads": 1, "value_heads": 2, **_STATES, "shift": s, "state": True}
           for s in (-20.0, 800.0)]
        + [{"lengths": (1100,), "key_heads": 1, "value_heads": 1, "K": 32, "V": 32, "state": True}],
    ),
    "gated_delta_rule_step": Odd(
        [{"batch": 2, "key_heads": 1, "value_heads": 6, "K": 32}],
        [{"batch": 31, "key_heads": 1, "value_heads": 1, "K": 16, "scaled": {"ab": 50.0}}],
        [{"batch": 3, "key_heads": 2, "value_heads": 2 * g, "K": K} for g in (1, 2, 3, 6, 8) for K in (16, 128)]
        + [{"batch": 3, "key_heads": 1, "value_heads": 2, "K": 64, "scaled": {"k": 0.0}}],
    ),
    "gated_rms_norm": Odd(
        [
            {"T": 7, "H": 3, "V": 33, "J": 1, "scaled": {"z": 100.0}, "gradients": "strided"},
            {"T": 2, "H": 48, "V": 128, "J": 1, "zero_rows": True},
        ],
        [{"T": 31, "H": 9, "V": 96, "J": 2, "gradients": "expanded"}, {"T": 33, "H": 1, "V": 7}],
        [{"T": T, "H": 2, "V": 24, "J": T % 2} for T in ROWS]
        + [{"T": 5, "H": H, "V": V, "J": 1, "gradients": "transposed"} for H in (1, 8, 17) for V in (1, 96, 128)],
    ),
    "swiglu": Odd(
        [
            {"T": 11, "I": 129, "rank": 1, "scaled": {"gate_up": 70.0}, "gradients": "strided"},
            {"T": 2, "I": 17408, "rank": 1, "zero_rows": True},
        ],
        [{"T": 33, "I": 1025, "rank": 1, "gradients": "expanded"}, {"T": 31, "I": 7, "rank": 2}],
        [{"T": T, "I": 191, "rank": 1, "strided": T % 3 == 0} for T in ROWS]
        + [{"T": 9, "I": I, "rank": r, "gradients": "transposed"} for I in (1, 33, 1023) for r in (0, 1, 5)],
    ),
    "linear_cross_entropy": Odd(
        [
            {"T": 31, "D": 16, "vocab": 129, "zero_rows": True},
            {"T": 2, "D": 16, "vocab": 24833, "scaled": {"x": 30.0}},
        ],
        [{"T": 96, "D": 24, "vocab": 257}, {"T": 33, "D": 24, "vocab": 16385, "scaled": {"x": 30.0}}],
        [{"T": T, "D": 24, "vocab": 191} for T in ROWS]
        + [{"T": 5, "D": 16, "vocab": V} for V in (1, 2, 9, 97, 8191, 8193)],
    ),
    "linear_kl": Odd(
        [
            {"T": 31, "D": 16, "vocab": 129, "zero_rows": True},
            {"T": 2, "D": 16, "vocab": 24833, "scaled": {"x": 30.0}, "amplifies": True},
        ],
        [
            {"T": 96, "D": 24, "vocab": 257},
            {"T": 33, "D": 24, "vocab": 16385, "scaled": {"base": 30.0}, "amplifies": True},
        ],
        # Of a single row that is sure of its word the divergence is a small number and its error is luck: flat ones.
        [{"T": T, "D": 24, "vocab": 191, "scaled": {"weight": 0.2}} for T in ROWS]
        + [{"T": 5, "D": 16, "vocab": V} for V in (2, 9, 97, 4095, 4097)],
    ),
    "adamw_8bit": Odd(
        [{"sizes": [1, 31, 257, 4096]}],
        [{"sizes": [127, 129, 191, 5000, 255, 256], "min_8bit_size": 1}],
        [{"sizes": [n, 4096 + n], "min_8bit_size": m} for n in LENGTHS for m in (1, 4096)],
    ),
}  # fmt: skip
