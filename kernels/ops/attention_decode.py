"""One new query per sequence over its cache of keys and values: attention when text is generated token by token.

    s = q k^T / sqrt(K) over the first lengths[b] rows of the cache     o = softmax(s) v

q, o (B, H, K), caches (B, S, G, K); query head j reads key/value head j // (H/G). No gradients.

Bound by reading the cache once, 4 K G bytes a cached token in bf16: the query heads of a group share one read, padded
to the 16 rows of a tensor-core tile. A cache is cut into pieces, so that a single long sequence fills the GPU; the
pieces' fp32 results are then weighted with their sums. How a sequence is cut depends on its own length alone, never
on the batch: the same sequence gives the same bits in any company.
Source: Flash-Decoding (Dao et al. 2023).
"""

import math

import torch
from torch import Tensor

from kernels.lora_term import compute_dtype
from kernels.ops._triton import tl, triton


def attention_decode_reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """One query a sequence over its cache: q (B, H, K), caches (B, S, G, K), lengths (B,) int -> o (B, H, K).

    The query sees the first lengths[b] rows of its cache; its own key is already among them. What lies behind may be
    anything finite. All S rows are read, and those masked, so that nothing here waits for the lengths.
    """
    (B, H, K), (S, G), dtype = q.shape, k_cache.shape[1:3], compute_dtype(q)
    q = q.to(dtype).reshape(B, G, H // G, K)  # query head j reads key/value head j // (H/G)
    k, v = (x.to(dtype).transpose(1, 2) for x in (k_cache, v_cache))  # (B, G, S, K)
    visible = torch.arange(S, device=q.device) < lengths[:, None]  # (B, S)
    s = q @ k.mT / K**0.5  # (B, G, H/G, S)
    s = s.masked_fill(~visible[:, None, None], -math.inf)
    o = s.softmax(-1) @ v  # (B, G, H/G, K)
    return o.reshape(B, H, K).to(k_cache.dtype)


SPLITS = 64  # pieces at most; a fixed number, and at least MIN_KEYS keys in each
MIN_KEYS = 128
HEAD_DIMS = (64, 128, 256)
# bytes per element -> keys in a step, warps, stages. Compiled for sm_90 at K = 256: three programs share an SM.
STEPS = {2: (64, 8, 2), 4: (32, 4, 1)}


@triton.jit
def _split_kernel(
    p_q, p_k, p_v, p_lengths, p_parts, p_lse,
    stride_qb, stride_qh, stride_kb, stride_ks, stride_kg, stride_vb, stride_vs, stride_vg, scale,
    H: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, BS: tl.constexpr,
    SPLITS: tl.constexpr, MIN_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys of one piece for the query heads of one group: parts (B, H, SPLITS, K), log2-sum lse (B, H, SPLITS)."""
    i_b, i_g, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(p_lengths + i_b).to(tl.int32)
    size = tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BS) * BS, MIN_KEYS)
    first = i_s * size
    last = tl.minimum(first + size, length)
    o_h = i_g * GROUP + tl.arange(0, ROWS)
    m_h = tl.arange(0, ROWS) < GROUP
    o_x = tl.arange(0, K)
    o_out = (i_b * H + o_h) * SPLITS + i_s
    # -inf tells the combination that this piece is empty: its part is never written, nor read.
    b_m = tl.full([ROWS], float("-inf"), tl.float32)
    if first < last:
        b_q = tl.load(p_q + i_b * stride_qb + o_h[:, None] * stride_qh + o_x[None, :], mask=m_h[:, None], other=0.0)
        b_l = tl.zeros([ROWS], tl.float32)
        b_acc = tl.zeros([ROWS, K], tl.float32)
        for j in tl.range(first, last, BS):
            o_s = j + tl.arange(0, BS)
            # Rows behind the length may hold NaN; read as zero they cannot reach a sum as 0 * NaN.
            m_s = o_s < last
            o_row = o_s.to(tl.int64)[:, None]
            o_k, o_v = i_b * stride_kb + i_g * stride_kg, i_b * stride_vb + i_g * stride_vg
            b_k = tl.load(p_k + o_k + o_row * stride_ks + o_x[None, :], mask=m_s[:, None], other=0.0)
            b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)
            b_s = tl.where(m_s[None, :], b_s * scale, float("-inf"))
            b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
            b_p = tl.exp2(b_s - b_m_new[:, None])
            b_alpha = tl.exp2(b_m - b_m_new)
            b_l = b_l * b_alpha + tl.sum(b_p, 1)
            b_v = tl.load(p_v + o_v + o_row * stride_vs + o_x[None, :], mask=m_s[:, None], other=0.0)
            b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=PRECISION)
            b_m = b_m_new
        tl.store(p_parts + o_out[:, None] * K + o_x[None, :], b_acc / b_l[:, None], mask=m_h[:, None])
        b_m += tl.log2(b_l)
    tl.store(p_lse + o_out, b_m, mask=m_h)


@triton.jit
def _combine_kernel(p_parts, p_lse, p_o, K: tl.constexpr, SPLITS: tl.constexpr):
    """o (B*H, K) = sum of the parts weighted with 2^lse."""
    i_h = tl.program_id(0).to(tl.int64)
    o_s, o_x = tl.arange(0, SPLITS), tl.arange(0, K)
    b_lse = tl.load(p_lse + i_h * SPLITS + o_s)
    o_part = (i_h * SPLITS + o_s[:, None]) * K + o_x[None, :]
    b_parts = tl.load(p_parts + o_part, mask=(b_lse > float("-inf"))[:, None], other=0.0)
    b_w = tl.exp2(b_lse - tl.max(b_lse, 0))
    b_o = tl.sum(b_w[:, None] * b_parts, 0) / tl.sum(b_w, 0)
    tl.store(p_o + i_h * K + o_x, b_o.to(p_o.dtype.element_ty))


def _sizes(H: int, G: int, K: int, element_size: int) -> dict[str, object]:
    return {
        "H": H, "GROUP": H // G, "ROWS": max(16, triton.next_power_of_2(H // G)), "K": K, "BS": STEPS[element_size][0],
        "SPLITS": SPLITS, "MIN_KEYS": MIN_KEYS, "PRECISION": "ieee" if element_size == 4 else "tf32",
    }  # fmt: skip


def attention_decode_triton(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """As the reference; lengths stay on the device. Caches and q of one dtype, 16-bit or fp32, last stride 1.

    lengths[b] in 1 .. S is the caller's promise: checking it would wait for the device.
    Head sizes without kernels run the reference.
    """
    (B, H, K), G = q.shape, k_cache.shape[2]
    if K not in HEAD_DIMS:
        return attention_decode_reference(q, k_cache, v_cache, lengths)
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or {k_cache.dtype, v_cache.dtype} != {q.dtype}:
        raise ValueError(
            f"attention kernels take q and caches of one dtype, 16-bit or fp32; "
            f"got {q.dtype, k_cache.dtype, v_cache.dtype}"
        )
    if H % G:
        raise ValueError(f"{H} query heads cannot share {G} key/value heads: expected a multiple")
    if any(x.stride(-1) != 1 for x in (q, k_cache, v_cache)):
        raise ValueError("attention_decode: the last dimension of q and of the caches must be contiguous")
    if torch.is_grad_enabled() and (q.requires_grad or k_cache.requires_grad or v_cache.requires_grad):
        raise ValueError("attention_decode has no gradient: call it under torch.no_grad()")
    sizes, (_, warps, stages) = _sizes(H, G, K, q.element_size()), STEPS[q.element_size()]
    parts = torch.empty(B, H, SPLITS, K, dtype=torch.float32, device=q.device)
    lse = torch.empty(B, H, SPLITS, dtype=torch.float32, device=q.device)
    o = torch.empty(B, H, K, dtype=q.dtype, device=q.device)
    _split_kernel[B, G, SPLITS](
        q, k_cache, v_cache, lengths, parts, lse, *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        math.log2(math.e) * K**-0.5, **sizes, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _combine_kernel[(B * H,)](parts, lse, o, K=K, SPLITS=SPLITS, num_warps=8)
    return o
