"""Per-head RMSNorm of q and k, rotary embedding, and the adapter terms of q, gate, k and v: everything between the
fused q|gate|k|v GEMM and attention.

    qgkv += s u B^T         each row is [q_0 gate_0 q_1 gate_1 ... | k_0 k_1 ... | v_0 v_1 ...]
    q = rope(norm(q; w_q))      k = rope(norm(k; w_k))      norm(x; w) = x rstd (1 + w), over each head
    rope: x1' = x1 cos - x2 sin,  x2' = x2 cos + x1 sin     x1, x2: dims 0 .. P-1 and P .. 2P-1; the others are copied

    dx1 = dx1' cos + dx2' sin,  dx2 = dx2' cos - dx1' sin   the transposed rotation
    dn = dx (1 + w)     dx = rstd (dn - n mean(dn n))       n = x rstd
    du = s dqgkv B      dB = s dqgkv^T u                    for each of the q|gate, k and v projections

qgkv (T, F), F = 2 (H + G) K; u (T, 3r), B (F, r); q (T, H, K), gate (T, H*K), k, v (T, G, K); cos, sin (T, P).

Rounding: fp32 from load to store; each of the four outputs and dqgkv is rounded once. A program owns a head and walks
over the tokens. A query head is the pair (q, gate), a key/value head the pair (k, v): the first of a pair gets norm and
rotation, the second only its adapter term. So the 2K rows of dB of a head stay in registers. No program sees a whole
row of 14,336 features, over which du sums: each writes one partial sum a token, (T, 3, H) fp32, and a second pass adds
them. That is 288 B a token, against 72 KB of traffic. (With a program per token, dB would have to stay in memory.)
Bytes a token at 24/4 heads of 256 in bf16: forward 57,344 B, backward 71,680 B, cos and sin 256 B. Saved for backward:
qgkv, the GEMM's own output, and u, cos, sin.
Source: transformers `Qwen3_5Attention`, `apply_rotary_pos_emb` (partial rotary, half-split pairing).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.lora_term import LoRATerm, add_lora, add_lora_by_projection
from kernels.ops._launch import check_inputs, fuses_B, persistent_programs
from kernels.ops._triton import tl, triton
from kernels.ops.residual_rms_norm import rms_norm_reference


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, H, K), cos and sin (T, P): rotates dims [0, 2P) of every head, in x's dtype."""
    P, K = cos.shape[1], x.shape[2]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # (T, 1, P): every head turns by the same angles
    x1, x2, unrotated = x.split((P, P, K - 2 * P), dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, unrotated], dim=-1)


def qk_norm_rope_reference(
    qgkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    num_heads: int, num_kv_heads: int, eps: float, lora: LoRATerm | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """qgkv (T, F) with F = H*2K + 2*G*K, q_weight and k_weight (K,), cos and sin (T, P) fp32 of each token's position,
    lora u (T, 3r), B (F, r) -> q (T, H, K), gate (T, H*K), k (T, G, K), v (T, G, K).
    """
    T, H, G, K, dtype = len(qgkv), num_heads, num_kv_heads, q_weight.shape[0], qgkv.dtype
    qg, k, v = add_lora_by_projection(qgkv, lora, (H * 2 * K, G * K, G * K))
    q, gate = qg.view(T, H, 2 * K).split(K, dim=-1)  # (T, H, K) each: q_proj puts a head's gate after its query
    k, v = k.view(T, G, K), v.view(T, G, K)
    q = rotate(rms_norm_reference(q, q_weight, eps), cos, sin)
    k = rotate(rms_norm_reference(k, k_weight, eps), cos, sin)
    return q.to(dtype), gate.flatten(1).to(dtype), k.to(dtype), v.to(dtype)


# Triton. Heads 0 .. H-1 are query heads, the pairs (q, gate); the next G are key/value heads, the pairs (k, v). `x` is
# the half of a pair with norm and rotation (q or k), `pass` the half that only gets its adapter term (gate or v).


@triton.jit
def _columns(i_h, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr):
    """The first columns of x and of pass in a row of qgkv, and their columns of u: q and gate 0, k 1, v 2."""
    is_query = i_h < H
    i_x = tl.where(is_query, 2 * i_h, H + i_h) * K
    i_pass = tl.where(is_query, 2 * i_h + 1, H + G + i_h) * K
    return i_x, i_pass, tl.where(is_query, 0, 1), tl.where(is_query, 0, 2)


@triton.jit
def _partners(o_k, P: tl.constexpr):
    """The dim that each dim is rotated with, and the sign of its sine: x1' has -x2, and x2' has +x1."""
    return tl.where(o_k < P, o_k + P, o_k - P), tl.where(o_k < P, -1.0, 1.0)


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    p_in, p_q, p_gate, p_k, p_v, p_wq, p_wk, p_cos, p_sin, p_u, p_B, T, stride_in, eps, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, P: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (head, i) takes tokens i, i + programs, ..."""
    i_h = tl.program_id(0)
    if i_h < H:
        i_head, p_x, p_pass, p_w = i_h, p_q, p_gate, p_wq
    else:
        i_head, p_x, p_pass, p_w = i_h - H, p_k, p_v, p_wk
    p_x += i_head * K
    p_pass += i_head * K
    stride_out = tl.where(i_h < H, H, G) * K
    i_x, i_pass, column_x, column_pass = _columns(i_h, H, G, K)
    o_k = tl.arange(0, BK)
    o_partner, b_sign = _partners(o_k, P)
    m_k, m_rot = o_k < K, o_k < 2 * P
    # A dim's partner lies in another lane. So each lane loads, and norms, both values.
    b_w = 1 + tl.load(p_w + o_k, mask=m_k, other=0).to(tl.float32)
    b_w_partner = b_sign * (1 + tl.load(p_w + o_partner, mask=m_rot, other=0).to(tl.float32))
    if p_B is not None:
        b_B = tl.load(p_B + i_x + o_k, mask=m_k, other=0)
        b_B_partner = tl.load(p_B + i_x + o_partner, mask=m_rot, other=0)
        b_B_pass = tl.load(p_B + i_pass + o_k, mask=m_k, other=0)
    for i_t in tl.range(tl.program_id(1), T, tl.num_programs(1), num_stages=STAGES):
        o_t = tl.cast(i_t, tl.int64)
        p_row = p_in + o_t * stride_in
        b_x = tl.load(p_row + i_x + o_k, mask=m_k, other=0).to(tl.float32)
        b_partner = tl.load(p_row + i_x + o_partner, mask=m_rot, other=0).to(tl.float32)
        b_pass = tl.load(p_row + i_pass + o_k, mask=m_k, other=0).to(tl.float32)
        if p_B is not None:
            b_u = scale * tl.load(p_u + o_t * 3 + column_x)
            b_x += b_u * b_B
            b_partner += b_u * b_B_partner
            b_pass += scale * tl.load(p_u + o_t * 3 + column_pass) * b_B_pass
        # cos = 1 and sin = 0 leave the dims beyond 2 P as they are.
        b_cos = tl.load(p_cos + o_t * P + o_k % P, mask=m_rot, other=1).to(tl.float32)
        b_sin = tl.load(p_sin + o_t * P + o_k % P, mask=m_rot, other=0).to(tl.float32)
        # The norm's mean needs the adapter's term in x, so it is taken here and not before.
        b_rstd = tl.rsqrt(tl.sum(b_x * b_x) / K + eps)
        b_x = b_x * b_rstd * b_w * b_cos + b_partner * b_rstd * b_w_partner * b_sin
        o_out = o_t * stride_out + o_k
        tl.store(p_x + o_out, b_x.to(p_x.dtype.element_ty), mask=m_k)
        tl.store(p_pass + o_out, b_pass.to(p_pass.dtype.element_ty), mask=m_k)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    p_dq, p_dgate, p_dk, p_dv, p_in, p_wq, p_wk, p_cos, p_sin, p_u, p_B, p_din, p_du, p_partial,
    T, stride_in, eps, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, P: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs as in the forward kernel. p_du (T, 3, H): columns G .. H-1 of k and v stay zero, as they have only G
    heads. p_partial (programs, F): each program sums its head's rows of dB in registers.
    """
    F: tl.constexpr = 2 * (H + G) * K
    i_h = tl.program_id(0)
    if i_h < H:
        i_head, p_dx, p_dpass, p_w = i_h, p_dq, p_dgate, p_wq
    else:
        i_head, p_dx, p_dpass, p_w = i_h - H, p_dk, p_dv, p_wk
    p_dx += i_head * K
    p_dpass += i_head * K
    stride_dx = tl.where(i_h < H, H, G) * K
    i_x, i_pass, column_x, column_pass = _columns(i_h, H, G, K)
    o_k = tl.arange(0, BK)
    o_partner, b_sign = _partners(o_k, P)
    m_k, m_rot = o_k < K, o_k < 2 * P
    b_w = 1 + tl.load(p_w + o_k, mask=m_k, other=0).to(tl.float32)
    if p_B is not None:
        b_B = tl.load(p_B + i_x + o_k, mask=m_k, other=0)
        b_B_pass = tl.load(p_B + i_pass + o_k, mask=m_k, other=0)
        b_dB = tl.zeros([BK], tl.float32)
        b_dB_pass = tl.zeros([BK], tl.float32)
    for i_t in tl.range(tl.program_id(1), T, tl.num_programs(1), num_stages=STAGES):
        o_t = tl.cast(i_t, tl.int64)
        o_dx = o_t * stride_dx
        b_x = tl.load(p_in + o_t * stride_in + i_x + o_k, mask=m_k, other=0).to(tl.float32)
        b_dx = tl.load(p_dx + o_dx + o_k, mask=m_k, other=0).to(tl.float32)
        b_dpartner = tl.load(p_dx + o_dx + o_partner, mask=m_rot, other=0).to(tl.float32)
        b_dpass = tl.load(p_dpass + o_dx + o_k, mask=m_k, other=0).to(tl.float32)
        b_cos = tl.load(p_cos + o_t * P + o_k % P, mask=m_rot, other=1).to(tl.float32)
        b_sin = tl.load(p_sin + o_t * P + o_k % P, mask=m_rot, other=0).to(tl.float32)
        if p_B is not None:
            # x with its term again, as forward normed it; saved is only the GEMM's output.
            b_u = scale * tl.load(p_u + o_t * 3 + column_x)
            b_x += b_u * b_B
        b_rstd = tl.rsqrt(tl.sum(b_x * b_x) / K + eps)
        b_n = b_x * b_rstd
        # Rotated back, where the sine has the other sign, then through the weight and the norm.
        b_dn = (b_dx * b_cos - b_sign * b_dpartner * b_sin) * b_w
        b_dx = b_rstd * (b_dn - b_n * (tl.sum(b_dn * b_n) / K))
        tl.store(p_din + o_t * F + i_x + o_k, b_dx.to(p_din.dtype.element_ty), mask=m_k)
        tl.store(p_din + o_t * F + i_pass + o_k, b_dpass.to(p_din.dtype.element_ty), mask=m_k)
        if p_B is not None:
            b_dB += b_u * b_dx
            b_dB_pass += scale * tl.load(p_u + o_t * 3 + column_pass) * b_dpass
            p_sums = p_du + o_t * 3 * H + i_head
            # q and gate belong to one projection and share a column of u; k and v have one each.
            if i_h < H:
                tl.store(p_sums, scale * tl.sum(b_dx * b_B + b_dpass * b_B_pass))
            else:
                tl.store(p_sums + H, scale * tl.sum(b_dx * b_B))
                tl.store(p_sums + 2 * H, scale * tl.sum(b_dpass * b_B_pass))
    if p_B is not None:
        o_F = tl.program_id(1).to(tl.int64) * F
        tl.store(p_partial + o_F + i_x + o_k, b_dB, mask=m_k)
        tl.store(p_partial + o_F + i_pass + o_k, b_dB_pass, mask=m_k)


# One warp a program: a head of 256 is eight elements a lane, and a sum within a warp needs no barrier. Twelve programs
# a multiprocessor: their three stages of loads are 86 KB in flight, which memory needs to be busy.
_CONSTANTS = {"STAGES": 3, "num_warps": 1}
_PER_SM = 12


class _Heads(NamedTuple):
    """The sizes of one call. dtype: that of the outputs."""

    H: int
    G: int
    K: int
    eps: float
    scale: float
    dtype: torch.dtype

    def grid(self, x: Tensor) -> tuple[int, int]:
        heads = self.H + self.G
        return heads, persistent_programs(x, len(x), per_sm=_PER_SM / heads)

    def constants(self, cos: Tensor) -> dict[str, int]:
        BK = triton.next_power_of_2(self.K)
        return {"H": self.H, "G": self.G, "K": self.K, "P": cos.shape[1], "BK": BK, **_CONSTANTS}


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qgkv, u, B, q_weight, k_weight, cos, sin, heads):
        T = len(qgkv)
        q, gate, k, v = (
            torch.empty(T, count, heads.K, dtype=heads.dtype, device=qgkv.device)
            for count in (heads.H, heads.H, heads.G, heads.G)
        )
        _forward_kernel[heads.grid(qgkv)](
            qgkv, q, gate, k, v, q_weight, k_weight, cos, sin, u, B, T, qgkv.stride(0), heads.eps, heads.scale,
            **heads.constants(cos),
        )  # fmt: skip
        ctx.save_for_backward(qgkv, u, B, q_weight, k_weight, cos, sin)
        ctx.heads = heads
        return q, gate.view(T, -1), k, v

    @staticmethod
    def backward(ctx, dq, dgate, dk, dv):
        qgkv, u, B, q_weight, k_weight, cos, sin = ctx.saved_tensors
        heads = ctx.heads
        T, F = qgkv.shape
        grid = heads.grid(qgkv)
        dqgkv = torch.empty(T, F, dtype=qgkv.dtype, device=qgkv.device)
        du = partial = None
        if B is not None:
            du = torch.zeros(T, 3, heads.H, dtype=torch.float32, device=qgkv.device)
            partial = torch.empty(grid[1], F, dtype=torch.float32, device=qgkv.device)
        _backward_kernel[grid](
            dq.contiguous(), dgate.contiguous(), dk.contiguous(), dv.contiguous(), qgkv, q_weight, k_weight, cos, sin,
            u, B, dqgkv, du, partial, T, qgkv.stride(0), heads.eps, heads.scale, **heads.constants(cos),
        )  # fmt: skip
        if B is None:
            return dqgkv, None, None, None, None, None, None, None
        return dqgkv, du.sum(2), partial.sum(0)[:, None], None, None, None, None, None


def qk_norm_rope_triton(
    qgkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    num_heads: int, num_kv_heads: int, eps: float, lora: LoRATerm | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """qk_norm_rope_reference in Triton. A term of rank 1 is fused; other ranks are added by a plain matmul before the
    kernel. qgkv may have any row stride. ValueError for another number of columns, and if a weight requires a gradient.
    """
    K = q_weight.shape[0]
    sizes = (num_heads * 2 * K, num_kv_heads * K, num_kv_heads * K)
    check_inputs("qk_norm_rope", {"qgkv": qgkv}, {"q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin})
    if qgkv.shape[1] != sum(sizes):
        raise ValueError(f"qk_norm_rope: qgkv has {qgkv.shape[1]} columns; {num_heads}/{num_kv_heads} heads of {K} "
                         f"with gates make {sum(sizes)}")  # fmt: skip
    dtype = qgkv.dtype
    if lora is not None and not fuses_B(lora):
        qgkv, lora = add_lora(qgkv, lora, sizes), None
    u, B, scale = (None, None, 0.0) if lora is None else (lora.u.contiguous(), lora.B.contiguous(), lora.scale)
    heads = _Heads(num_heads, num_kv_heads, K, eps, scale, dtype)
    return _QKNormRope.apply(qgkv, u, B, q_weight, k_weight, cos.contiguous(), sin.contiguous(), heads)
