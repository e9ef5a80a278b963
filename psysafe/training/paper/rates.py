"""The time of a traced operation at best: the larger of its arithmetic and its traffic, at the rates of one table.

Everything here is on paper: nothing was measured by this program. A rate is what a good kernel sustains, and the table
says where it is from. Kernels run one after the other; none overlaps with another, and the host always keeps up.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from kernels.paper import H100_MULTIPROCESSORS
from psysafe.model.config import DELTA_CHUNK
from psysafe.training.paper.trace import Op
from psysafe.training.roofline import SPEEDS, Speed

KINDS = ("GEMM", "attention", "delta rule", "elementwise", "loss", "sums", "optimizer", "other")

LAUNCH = 3e-6  # seconds in which a launch fills and empties the GPU, and nothing else can run
TILES = ((128, 256), (128, 128), (128, 64))  # rows and columns that one multiprocessor computes of a GEMM at a time


class Rate(NamedTuple):
    """FLOP/s of one kernel with the whole GPU busy."""

    flops: float
    source: str


_COMPILED = "static model of the code compiled for sm_90"
_ATTENTION, _RULE = f"{_COMPILED}, +-20 %", f"{_COMPILED}, +-30 %"
# Attention's and the delta rule's kernels. A walk over chunks has a program for a document, head and half of the
# columns, so a single long document leaves multiprocessors idle: `busy` accounts for that, and the rate does not.
RATES = {
    "causal_attention forward": Rate(393e12, _ATTENTION),
    "causal_attention backward_dq": Rate(571e12, _ATTENTION),
    "causal_attention backward_dk": Rate(568e12, _ATTENTION),
    "causal_attention backward_dv": Rate(511e12, _ATTENTION),
    "gated_delta_rule_forward prepare": Rate(144e12, _RULE),
    "gated_delta_rule_forward states": Rate(367e12, _RULE),
    "gated_delta_rule_backward recompute": Rate(199e12, _RULE),
    "gated_delta_rule_backward reverse": Rate(337e12, _RULE),
    "gated_delta_rule_backward within": Rate(108e12, _RULE),
    "gated_delta_rule_backward dq": Rate(108e12, _RULE),
    "gated_delta_rule_backward dk": Rate(102e12, _RULE),
}
# Products of a delta-rule kernel per chunk and value head: (64, K) x (K, V); (64, 64) x (64, V); (64, 64) x (64, 64).
# And per chunk and key head, where matrices of its value heads are summed before: (64, 64) x (64, K).
_PRODUCTS = {
    "prepare": (0, 2, 4),
    "states": (3, 2, 0),
    "recompute": (2, 1, 0),
    "reverse": (3, 2, 0),
    "within": (0, 2, 0),
    "dq": (1, 0, 0),
    "dk": (2, 0, 0),
}
_KEY_PRODUCTS = {"within": 1, "dq": 1, "dk": 2}
_DOTS = {"forward": 2, "backward_dq": 3, "backward_dk": 3, "backward_dv": 2}  # of attention, per pair of query and key
_WALKS = ("states", "reverse")


def kind(op: Op) -> str:
    """Which of KINDS an operation belongs to."""
    if op.phase == "optimizer":
        return "optimizer"
    if op.launch is None:
        return "GEMM" if op.flops else "sums" if op.name in ("sum", "_foreach_add_") else "other"
    module = op.name.partition(" ")[0]
    kinds = {"attention": "attention", "delta_rule": "delta rule", "cross_entropy": "loss", "linear_kl": "loss"}
    return next((name for part, name in kinds.items() if part in module), "elementwise")


class Total(NamedTuple):
    ops: int = 0
    launches: int = 0  # Triton's among them
    flops: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Total") -> "Total":
        return Total(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class PaperGPU:
    """A GPU's rates, and the mean length of the document that a token lies in, on which attention's work depends."""

    name: str
    context: float

    @property
    def speed(self) -> Speed:
        return SPEEDS[self.name]

    def flops(self, op: Op) -> int:
        """FLOP of an operation; 0 of one whose traffic decides."""
        if op.launch is None:
            return op.flops
        _, _, kernel = op.name.partition(" ")
        constants = op.launch.variant.constants
        if op.name.startswith("causal_attention") and kernel in _DOTS:
            pairs = op.launch.tensors["p_lse"].shape[1] * (self.context + 1) / 2
            return round(_DOTS[kernel] * 2 * pairs * constants["H"] * constants["K"])
        if op.name.startswith("gated_delta_rule") and kernel in _PRODUCTS:
            wide, square, small = _PRODUCTS[kernel]
            C, K, V = DELTA_CHUNK, constants["K"], constants.get("V", constants["K"])
            per_value_head = wide * K * V + square * C * V + small * C * C
            per_key_head = _KEY_PRODUCTS.get(kernel, 0) * C * K
            H, tensors = constants["H"], op.launch.tensors
            chunks = tensors["p_gates" if "p_gates" in tensors else "p_factors"].shape[0]
            return chunks * 2 * C * (H * per_value_head + H // constants["GROUP"] * per_key_head)
        return 0

    def seconds(self, op: Op) -> float:
        """The time of an operation at best, its launch included."""
        rate = self.speed.gemm
        if op.name in RATES:
            rate = RATES[op.name].flops * busy(op)
        elif op.launch is None and op.flops and len(op.shape) > 1:
            rate = self.speed.gemm * gemm_share(*op.shape[-2:])
        return max(self.flops(op) / rate, op.bytes / self.speed.bandwidth) + LAUNCH

    def total(self, ops: Iterable[Op], key: Callable[[Op], object] = lambda op: "") -> dict[object, Total]:
        """Sums over operations with the same key, in order of first appearance."""
        sums: dict[object, Total] = {}
        for op in ops:
            one = Total(1, int(op.launch is not None), self.flops(op), op.bytes, self.seconds(op))
            sums[key(op)] = sums.get(key(op), Total()) + one
        return sums

    def assumptions(self) -> list[tuple[str, str, str]]:
        """(what, rate, source) of every number that a time on paper rests on."""
        tiles = ", ".join(f"{m} x {n}" for m, n in TILES)
        speed, SMs = self.speed, H100_MULTIPROCESSORS
        rows = [
            ("GEMM, whole waves of tiles", f"{speed.gemm / 1e12:,.0f} TFLOP/s", "cuBLAS (training/roofline.py)"),
            ("GEMM, other shapes", "less", f"share of whole waves: arithmetic, the best of {tiles} on {SMs} SMs"),
            ("traffic", f"{speed.bandwidth / 1e12:.1f} TB/s", "streaming kernels (training/roofline.py)"),
            ("a launch", f"{1e6 * LAUNCH:.0f} us", "assumed: filling and emptying the GPU"),
        ]
        return rows + [(kernel, f"{rate.flops / 1e12:,.0f} TFLOP/s", rate.source) for kernel, rate in RATES.items()]


def busy(op: Op) -> float:
    """The share of the multiprocessors that a kernel uses: a walk over chunks may have too few programs for all."""
    return min(1.0, math.prod(op.launch.grid) / H100_MULTIPROCESSORS) if op.name.endswith(_WALKS) else 1.0


def gemm_share(m: int, n: int) -> float:
    """The share of its rate that a GEMM of m x n outputs reaches: tiles are whole, and so are waves of tiles."""
    return max(_share(m, n, *tile) for tile in TILES)


def _share(m: int, n: int, rows: int, columns: int) -> float:
    tiles = -(-m // rows) * -(-n // columns)
    waves = -(-tiles // H100_MULTIPROCESSORS)
    return m * n / (waves * H100_MULTIPROCESSORS * rows * columns)
