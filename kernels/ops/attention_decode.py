"""One new query for each sequence over its cache of keys and values: attention when text is generated token by token.

    s = q k^T / sqrt(K) over the first lengths[n] rows of the cache     o = softmax(s) v

q, o (N, H, K), caches (N, S, G, K); query head j reads key/value head j // (H/G). No gradients.

Rounding: s, softmax and sums in fp32; softmax(s), not yet divided by its sum, enters its product in the cache's dtype;
o is rounded once. The time is that of reading the cache once, 4 K G bytes a cached token in bf16. So all query heads of
a group share one read; they are padded to the 16 rows of a tensor-core tile. A cache is cut into pieces, so that a
single long sequence fills the GPU; each piece gives a softmax of its own and the log of its sum, and a second kernel
weights the pieces with these sums. The cut depends on the length of the sequence alone, not on the batch: a sequence
gives the same bits in every batch.
Source: Flash-Decoding (Dao et al. 2023).
"""

import math

import torch
from torch import Tensor

from kernels.lora_term import compute_dtype
from kernels.ops._triton import tl, triton


def attention_decode_reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """One query a sequence over its cache: q (N, H, K), caches (N, S, G, K), lengths (N,) int -> o (N, H, K).

    The query sees the first lengths[n] rows of its cache; its own key is already among them. The rows after them may
    hold any finite value. All S rows are read and then masked, so that the host does not wait for the lengths.
    """
    (N, H, K), (S, G), dtype = q.shape, k_cache.shape[1:3], compute_dtype(q)
    q = q.to(dtype).reshape(N, G, H // G, K)  # query head j reads key/value head j // (H/G)
    k, v = (x.to(dtype).transpose(1, 2) for x in (k_cache, v_cache))  # (N, G, S, K)
    visible = torch.arange(S, device=q.device) < lengths[:, None]  # (N, S)
    s = q @ k.mT / K**0.5  # (N, G, H/G, S)
    s = s.masked_fill(~visible[:, None, None], -math.inf)
    o = s.softmax(-1) @ v  # (N, G, H/G, K)
    return o.reshape(N, H, K).to(k_cache.dtype)


@triton.jit
def _split_kernel(
    p_q, p_k, p_v, p_lengths, p_parts, p_lse,
    stride_qn, stride_qh, stride_kn, stride_ks, stride_kg, stride_vn, stride_vs, stride_vg, scale,
    H: tl.constexpr, GROUP: tl.constexpr, BH: tl.constexpr, K: tl.constexpr, BS: tl.constexpr,
    SPLITS: tl.constexpr, MIN_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Piece i_s of the keys for the query heads of group i_g: p_parts (N, H, SPLITS, K) = softmax(s) v of the piece,
    p_lse (N, H, SPLITS) = log2 of the sum of its exponentials. BH is GROUP = H / G, padded to 16.
    """
    i_n, i_g, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(p_lengths + i_n).to(tl.int32)
    # Whole blocks, so that only the last piece needs a mask; a short sequence fills only the first pieces.
    size = tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BS) * BS, MIN_KEYS)
    first = i_s * size
    last = tl.minimum(first + size, length)
    o_h = i_g * GROUP + tl.arange(0, BH)
    m_h = tl.arange(0, BH) < GROUP
    o_k = tl.arange(0, K)
    o_out = (i_n * H + o_h) * SPLITS + i_s
    # -inf tells the second kernel that this piece is empty: its part is neither written nor read.
    b_m = tl.full([BH], float("-inf"), tl.float32)
    if first < last:
        b_q = tl.load(p_q + i_n * stride_qn + o_h[:, None] * stride_qh + o_k[None, :], mask=m_h[:, None], other=0.0)
        b_l = tl.zeros([BH], tl.float32)
        b_acc = tl.zeros([BH, K], tl.float32)
        for j in tl.range(first, last, BS):
            o_s = j + tl.arange(0, BS)
            # Rows past the length may hold NaN, and 0 * NaN is NaN: they are read as zero.
            m_s = o_s < last
            o_row = o_s.to(tl.int64)[:, None]
            o_k_head, o_v_head = i_n * stride_kn + i_g * stride_kg, i_n * stride_vn + i_g * stride_vg
            b_k = tl.load(p_k + o_k_head + o_row * stride_ks + o_k[None, :], mask=m_s[:, None], other=0.0)
            b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)
            b_s = tl.where(m_s[None, :], b_s * scale, float("-inf"))
            # Online softmax to base 2 (`scale` holds log2(e)): b_m is the maximum so far, b_l the sum of 2^(s - b_m).
            b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
            b_p = tl.exp2(b_s - b_m_new[:, None])
            b_alpha = tl.exp2(b_m - b_m_new)
            b_l = b_l * b_alpha + tl.sum(b_p, 1)
            b_v = tl.load(p_v + o_v_head + o_row * stride_vs + o_k[None, :], mask=m_s[:, None], other=0.0)
            b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=PRECISION)
            b_m = b_m_new
        tl.store(p_parts + o_out[:, None] * K + o_k[None, :], b_acc / b_l[:, None], mask=m_h[:, None])
        b_m += tl.log2(b_l)
    tl.store(p_lse + o_out, b_m, mask=m_h)


@triton.jit
def _combine_kernel(p_parts, p_lse, p_o, K: tl.constexpr, SPLITS: tl.constexpr):
    """o (N*H, K) = the mean of the parts, weighted with 2^lse."""
    i_h = tl.program_id(0).to(tl.int64)
    o_s, o_k = tl.arange(0, SPLITS), tl.arange(0, K)
    b_lse = tl.load(p_lse + i_h * SPLITS + o_s)
    # The parts of empty pieces were never written: masked, or what lies in memory there would be added.
    o_part = (i_h * SPLITS + o_s[:, None]) * K + o_k[None, :]
    b_parts = tl.load(p_parts + o_part, mask=(b_lse > float("-inf"))[:, None], other=0.0)
    b_w = tl.exp2(b_lse - tl.max(b_lse, 0))
    b_o = tl.sum(b_w[:, None] * b_parts, 0) / tl.sum(b_w, 0)
    tl.store(p_o + i_h * K + o_k, b_o.to(p_o.dtype.element_ty))


SPLITS = 64  # the most pieces of a sequence, with at least MIN_KEYS keys in each
MIN_KEYS = 128
HEAD_DIMS = (64, 128, 256)
# bytes per element -> keys in a step, warps, stages. Compiled for sm_90 at K = 256: three programs share an SM.
STEPS = {2: (64, 8, 2), 4: (32, 4, 1)}


def _sizes(H: int, G: int, K: int, element_size: int) -> dict[str, object]:
    return {
        "H": H, "GROUP": H // G, "BH": max(16, triton.next_power_of_2(H // G)), "K": K, "BS": STEPS[element_size][0],
        "SPLITS": SPLITS, "MIN_KEYS": MIN_KEYS, "PRECISION": "ieee" if element_size == 4 else "tf32",
    }  # fmt: skip


def attention_decode_triton(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """attention_decode_reference in two launches; lengths stay on the device. Head sizes without kernels run the
    reference. ValueError unless q and caches have one dtype, 16-bit or fp32, and a last stride of 1, and where a
    gradient would be needed.

    The caller must see to it that lengths[n] lies in 1 .. S: a check would wait for the device.
    """
    (N, H, K), G = q.shape, k_cache.shape[2]
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
    # Always SPLITS parts, also for a short sequence: the shapes must not depend on lengths, which the host never sees.
    parts = torch.empty(N, H, SPLITS, K, dtype=torch.float32, device=q.device)
    lse = torch.empty(N, H, SPLITS, dtype=torch.float32, device=q.device)
    o = torch.empty(N, H, K, dtype=q.dtype, device=q.device)
    _split_kernel[N, G, SPLITS](
        q, k_cache, v_cache, lengths, parts, lse, *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        math.log2(math.e) * K**-0.5, **sizes, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _combine_kernel[(N * H,)](parts, lse, o, K=K, SPLITS=SPLITS, num_warps=8)
    return o
