"""causal_attention: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

import torch
from torch import Tensor

from kernels.documents import Documents
from kernels.ops.causal_attention import (
    TILES,
    _add_parts_kernel,
    _backward_dk_kernel,
    _backward_dq_kernel,
    _backward_dv_kernel,
    _delta_kernel,
    _forward_kernel,
    _Sizes,
)
from kernels.proof.closeness import Case
from kernels.proof.protocol import CompileSpec, Work


def make_case(
    lengths: list[int], heads: int, kv_heads: int, head_dim: int,
    device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0, logits: float = 1.0,
) -> Case:  # fmt: skip
    """Documents of these lengths with normal q, k, v; `logits` multiplies q, so that the softmax gets sharp."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(sum(lengths), n, head_dim, generator=generator).to(device, dtype)  # noqa: E731
    documents = Documents(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32), device)
    inputs = {"q": draw(heads) * logits, "k": draw(kv_heads), "v": draw(kv_heads)}
    # A lone token's dq and dk are zero: what is computed of them is rounding, which has no relative error.
    grads = ("v",) if max(lengths) == 1 else ("q", "k", "v")
    name = f"{lengths if len(lengths) < 9 else len(lengths)} {heads}/{kv_heads} x {head_dim}"
    return Case(name, inputs, lambda op, x: {"o": op(x["q"], x["k"], x["v"], documents)}, grads)


_27B = {"heads": 24, "kv_heads": 4, "head_dim": 256}
CASES = [
    {"lengths": [4096], **_27B},
    {"lengths": [650] * 6 + [196], **_27B},
    {"lengths": [1], "heads": 2, "kv_heads": 1, "head_dim": 64},
    {"lengths": [63, 64, 65], "heads": 4, "kv_heads": 2, "head_dim": 64},
    {"lengths": [1, 2, 3, 1, 1, 5, 8, 31, 1, 33], "heads": 3, "kv_heads": 1, "head_dim": 128},
    {"lengths": [40, 1, 37], "heads": 6, "kv_heads": 1, "head_dim": 256},
    {"lengths": [70, 30], "heads": 2, "kv_heads": 2, "head_dim": 64, "logits": 8.0},
]


def _mutant(change: str):
    """The op by its definition, with one mistake."""

    def op(q: Tensor, k: Tensor, v: Tensor, documents: Documents, key_documents: Documents | None = None) -> Tensor:
        (T, H, K), G = q.shape, k.shape[1]
        heads = torch.arange(H, device=q.device)
        heads = heads % G if change == "tiled heads" else heads // (H // G)
        k, v = k[:, heads], v[:, heads]
        if change == "missing group sum":
            first = (torch.arange(H, device=q.device) % (H // G) == 0)[:, None]
            k, v = torch.where(first, k, k.detach()), torch.where(first, v, v.detach())
        t = torch.arange(T, device=q.device)
        hidden = t[:, None] < t
        if change == "strictly causal":  # a document's first token must see something: itself
            hidden |= (t[:, None] == t) & (documents.positions > 0)
        if change != "no document boundaries":
            hidden |= documents.index[:, None] != documents.index
        s = torch.einsum("qhk,shk->hqs", q, k) * K**-0.5 * (1.01 if change == "wrong scale" else 1)
        return torch.einsum("hqs,shk->qhk", s.masked_fill(hidden, float("-inf")).softmax(-1), v)

    return op


_MISTAKES = "strictly causal", "missing group sum", "no document boundaries", "wrong scale", "tiled heads"
MUTANTS = {change: _mutant(change) for change in _MISTAKES}


def work(lengths: list[int], heads: int, kv_heads: int, head_dim: int, **_: object) -> Work:
    """bf16. Forward: two dots over the causal half, q, k, v, o, lse once. Backward: five, do, dq, dk, dv and these."""
    T, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    queries, keys, lse = 2 * T * heads * head_dim, 2 * T * kv_heads * head_dim, 4 * T * heads
    dot = 2 * pairs * heads * head_dim
    return Work(2 * queries + 2 * keys + lse, 4 * queries + 4 * keys + lse, 2 * dot, 5 * dot)


def compile_specs(head_dim: int = 256, heads: int = 24, kv_heads: int = 4, dtype: str = "bf16") -> list[CompileSpec]:
    """Every kernel at the 27B sizes; dK and dV also with the fp32 output of several parts."""
    size, precision = (4, "ieee") if dtype == "fp32" else (2, "tf32")
    s = _Sizes(heads, heads // kv_heads, head_dim, TILES[size, head_dim], precision)
    block = s.tiles.block
    arguments = {"p_lse": "*fp32", "p_delta": "*fp32", "p_items": "*i32", "scale": "fp32", "factor": "fp32"}
    arguments |= dict.fromkeys(("T", "inner", "parts"), "i32")

    def spec(name: str, fn, queries: int, keys: int, out: str, out_dtype: str = dtype) -> CompileSpec:
        boxes = {"desc_q": queries, "desc_do": queries, "desc_k": keys, "desc_v": keys}
        types = {d: f"tensordesc<{dtype}[{rows},{head_dim}]>" for d, rows in boxes.items()}
        types |= arguments | {out: f"*{out_dtype}"}
        options = s.options(queries, keys)
        warps, stages = options.pop("num_warps"), options.pop("num_stages")
        signature = {n: types[n] for n in fn.arg_names if n not in options}
        return CompileSpec(f"attention {name}", fn, signature, options, warps, stages)

    plain = {"p_o": f"*{dtype}", "p_do": f"*{dtype}", "p_delta": "*fp32", "T": "i32", "stride_do": "i32"}
    sums = {"p_parts": "*fp32", "p_sum": f"*{dtype}", "n": "i32", "parts": "i32"}
    return [
        spec("forward", _forward_kernel, block, s.tiles.forward, "p_o"),
        spec("dv", _backward_dv_kernel, s.tiles.dv, block, "p_dv"),
        spec("dv parts", _backward_dv_kernel, s.tiles.dv, block, "p_dv", "fp32"),
        spec("dk", _backward_dk_kernel, s.tiles.dk, block, "p_dk"),
        spec("dk parts", _backward_dk_kernel, s.tiles.dk, block, "p_dk", "fp32"),
        spec("dq", _backward_dq_kernel, block, s.tiles.dq, "p_dq"),
        CompileSpec("attention delta", _delta_kernel, plain, {"H": heads, "K": head_dim, "BT": 32}),
        CompileSpec("attention add parts", _add_parts_kernel, sums, {"BLOCK": 2048}),
    ]
