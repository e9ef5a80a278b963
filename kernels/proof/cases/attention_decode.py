"""attention_decode: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

import torch
from torch import Tensor

from kernels.ops.attention_decode import (
    SPLITS,
    STEPS,
    _combine_kernel,
    _sizes,
    _split_kernel,
    attention_decode_reference,
)
from kernels.proof.closeness import Case
from kernels.proof.protocol import CompileSpec, Work


def make_case(
    lengths: list[int], heads: int, kv_heads: int, head_dim: int,
    device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0,
) -> Case:  # fmt: skip
    """Caches with room for three more tokens than the longest sequence; what is behind a length is huge."""
    generator = torch.Generator().manual_seed(seed)
    capacity = max(lengths) + 3
    inputs = {"q": torch.randn(len(lengths), heads, head_dim, generator=generator)}
    for name in ("k_cache", "v_cache"):
        inputs[name] = torch.randn(len(lengths), capacity, kv_heads, head_dim, generator=generator)
        for cache, length in zip(inputs[name], lengths, strict=True):
            cache[length:] = 6e4
    inputs = {name: x.to(device, dtype) for name, x in inputs.items()}
    inputs["lengths"] = torch.tensor(lengths, device=device)
    names = ("q", "k_cache", "v_cache", "lengths")
    return Case(f"{lengths} {heads}/{kv_heads} x {head_dim}", inputs, lambda op, x: {"o": op(*(x[n] for n in names))})


_27B = {"heads": 24, "kv_heads": 4, "head_dim": 256}
CASES = [
    {"lengths": [4096], **_27B},
    {"lengths": [1, 700, 2049, 4096] * 4, **_27B},
    {"lengths": [1, 63, 130], "heads": 4, "kv_heads": 2, "head_dim": 64},
    {"lengths": [129, 2], "heads": 3, "kv_heads": 1, "head_dim": 128},
    {"lengths": [65], "heads": 6, "kv_heads": 1, "head_dim": 256},
]


def _tiled_heads(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    B, H, K = q.shape
    q = q.view(B, -1, k_cache.shape[2], K).transpose(1, 2).reshape(B, H, K)
    return attention_decode_reference(q, k_cache, v_cache, lengths)


MUTANTS = {
    "without the newest key": lambda q, k, v, n: attention_decode_reference(q, k, v, (n - 1).clamp(min=1)),
    "wrong scale": lambda q, k, v, n: attention_decode_reference(q * 1.01, k, v, n),
    "tiled heads": _tiled_heads,
}


def work(lengths: list[int], heads: int, kv_heads: int, head_dim: int) -> Work:
    """bf16: the caches up to their lengths, q and o."""
    tokens = sum(lengths)
    return Work(4 * head_dim * (tokens * kv_heads + len(lengths) * heads), 0, 4 * tokens * heads * head_dim)


def compile_specs(head_dim: int = 256, heads: int = 24, kv_heads: int = 4, dtype: str = "bf16") -> list[CompileSpec]:
    """Both kernels at the 27B sizes."""
    size = 4 if dtype == "fp32" else 2
    sizes, (_, warps, stages) = _sizes(heads, kv_heads, head_dim, size), STEPS[size]
    types = dict.fromkeys(("p_q", "p_k", "p_v", "p_o"), f"*{dtype}") | {"p_lengths": "*i64", "scale": "fp32"}
    types |= dict.fromkeys(("p_parts", "p_lse"), "*fp32")

    def signature(fn, constexprs: dict[str, object]) -> dict[str, str]:
        return {name: types.get(name, "i32") for name in fn.arg_names if name not in constexprs}

    strides = tuple(name for name in _split_kernel.arg_names if name.startswith(("stride", "p_")))
    combine = {"K": head_dim, "SPLITS": SPLITS}
    split_signature = signature(_split_kernel, sizes)
    return [
        CompileSpec("decode split", _split_kernel, split_signature, sizes, warps, stages, aligned=strides),
        CompileSpec("decode combine", _combine_kernel, signature(_combine_kernel, combine), combine, 8),
    ]
