"""attention_decode: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import attention_decode as ops
from kernels.proof.cases._shared import random_on, with_changes
from kernels.proof.closeness import Case
from kernels.proof.contract import Op, Work
from kernels.proof.launches import launched


def make_case(
    lengths: list[int], heads: int, kv_heads: int, head_dim: int,
    device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0,
) -> Case:  # fmt: skip
    """Caches with room for three more tokens than the longest sequence; what lies past a length is huge."""
    draw, _ = random_on(device, seed)
    inputs = {"q": draw(len(lengths), heads, head_dim)}
    for name in ("k_cache", "v_cache"):
        inputs[name] = draw(len(lengths), max(lengths) + 3, kv_heads, head_dim)
        for cache, length in zip(inputs[name], lengths, strict=True):
            cache[length:] = 6e4
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    inputs["lengths"] = torch.tensor(lengths, device=device)
    names = ("q", "k_cache", "v_cache", "lengths")
    return Case(inputs, lambda op, x: {"o": op(*(x[n] for n in names))})


_27B = {"heads": 24, "kv_heads": 4, "head_dim": 256}
CASES = [
    {"lengths": [4096], **_27B},
    {"lengths": [1, 700, 2049, 4096] * 4, **_27B},
    {"lengths": [1, 63, 130], "heads": 4, "kv_heads": 2, "head_dim": 64},
    {"lengths": [129, 2], "heads": 3, "kv_heads": 1, "head_dim": 128},
    {"lengths": [65], "heads": 6, "kv_heads": 1, "head_dim": 256},
]


def _tiled_heads(q, k_cache, **_):
    B, H, K = q.shape
    return {"q": q.view(B, -1, k_cache.shape[2], K).transpose(1, 2).reshape(B, H, K)}


MUTANTS = with_changes(ops.attention_decode_reference, {
    "without the newest key": lambda lengths, **_: {"lengths": (lengths - 1).clamp(min=1)},
    "wrong scale": lambda q, **_: {"q": q * 1.01},
    "tiled heads": _tiled_heads,
})  # fmt: skip


def work(lengths: list[int], heads: int, kv_heads: int, head_dim: int) -> Work:
    """bf16: the caches up to their lengths, q and o."""
    tokens = sum(lengths)
    return Work(4 * head_dim * (tokens * kv_heads + len(lengths) * heads), 0, 4 * tokens * heads * head_dim)


def sdpa_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """attention_decode by torch's scaled_dot_product_attention, one call a sequence: P enters its dot in 16 bits."""
    outs = [
        F.scaled_dot_product_attention(
            q[i][None, :, None], *(x[i, :n].transpose(0, 1)[None] for x in (k_cache, v_cache)), enable_gqa=True
        )[0, :, 0]
        for i, n in enumerate(lengths.tolist())
    ]
    return torch.stack(outs)


OP = Op(
    "attention_decode", ops.attention_decode_reference, ops.attention_decode_triton, CASES, make_case, MUTANTS, work,
    launched("attention_decode"), plain=sdpa_decode,
)  # fmt: skip
