"""Per-head RMSNorm of q and k, rotary embedding, and the adapter terms of q, gate, k and v: everything between the
fused q|gate|k|v GEMM and attention.

    row   = [q_0 gate_0 q_1 gate_1 ... | k_0 ... | v_0 ...] + s u B^T      (q_proj interleaves query and gate by head)
    q, k  = rope(N(q; w_q)), rope(N(k; w_k))      N(x; w) = x rsqrt(mean(x^2) + eps) (1 + w) over the head
    rope  : x1' = x1 cos - x2 sin,  x2' = x2 cos + x1 sin   on the first 2 R dims (halves), the rest passes

fp32 from load to store, one rounding at each of the four outputs. Backward rotates dq, dk by the transpose, goes
through the norm as in rms_norm.py, and yields du = s dy B, dB = s dy^T u from the same registers.
Source: transformers `Qwen3_5Attention`, `apply_rotary_pos_emb` (partial rotary, half-split pairing).
"""

import torch
from torch import Tensor

from kernels.rms_norm import rms_norm_reference
from kernels.seams import LoRATerm, add_lora


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, H, K), cos and sin (T, R): rotates dims [0, 2R) of every head, in x's dtype."""
    R = cos.shape[1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    x1, x2 = x[..., :R], x[..., R : 2 * R]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, x[..., 2 * R :]], dim=-1)


def qk_norm_rope_reference(
    qgkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    lora: LoRATerm | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qgkv (T, H*2K + 2*G*K), q_weight and k_weight (K,), cos and sin (T, R) fp32 of every token's position,
    lora u (T, 3r), B (H*2K + 2*G*K, r) -> q (T, H, K), gate (T, H*K), k (T, G, K), v (T, G, K).
    """
    T, K = len(qgkv), q_weight.shape[0]
    sizes = (num_heads * 2 * K, num_kv_heads * K, num_kv_heads * K)
    qg, k, v = add_lora(qgkv, lora, sizes).split(sizes, dim=1)
    q, gate = qg.view(T, num_heads, 2 * K).chunk(2, dim=-1)
    q = rotate(rms_norm_reference(q, q_weight, eps), cos, sin)
    k = rotate(rms_norm_reference(k.view(T, num_kv_heads, K), k_weight, eps), cos, sin)
    gate, v = gate.reshape(T, num_heads * K), v.view(T, num_kv_heads, K)
    return q.to(qgkv.dtype), gate.to(qgkv.dtype), k.to(qgkv.dtype), v.to(qgkv.dtype)
