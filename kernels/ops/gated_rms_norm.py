"""The delta-net's gated RMSNorm, and the A projection of the output layer that reads its result.

    x = round(n w silu(z))          n = o rstd, rstd = rsqrt(mean(o^2) + eps) for each value head
    u = x A^T (fp32)

    dx += du A      dn = dx w silu(z)      do = rstd (dn - n mean(dn n))      dA = du^T x
    dz = dx n w sigmoid(z) (1 + z (1 - sigmoid(z)))

o (T, H, V); z, x (T, H*V); w (V,), shared by the heads and plain: not 1 + w; A (J, H*V), u (T, J).

Rounding: fp32 from load to store; x, do and dz are rounded once, and u reads the rounded x. Bytes a token at 48 heads
of 128 in bf16: forward reads o and z and writes x (36,864 B), backward reads dx, o, z and writes do, dz (61,440 B). The
adapter adds u, A and the partial sums of dA. Saved for backward: o and z, which exist anyway; rstd is recomputed,
because a head lies within half a warp and its sum is cheap. A forward program owns whole rows where there is an A,
because u sums over a row; otherwise it owns a few heads. A backward program owns a few heads and walks over the tokens,
with its columns of dA in registers. Source: transformers `Qwen3_5RMSNormGated` (norm first, gate second).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.lora_term import compute_dtype, lora_u
from kernels.ops._launch import adjacent, check_inputs, fuses_A, persistent_programs
from kernels.ops._triton import tl, triton


def gated_rms_norm_reference(
    o: Tensor, z: Tensor, weight: Tensor, eps: float, lora_A: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """o (T, H, V), z (T, H*V), weight (V,) fp32, lora_A (J, H*V) fp32 -> x (T, H*V), u (T, J) fp32 or None."""
    out_dtype, dtype = o.dtype, compute_dtype(o)
    o, z, weight = o.to(dtype), z.to(dtype).view(o.shape), weight.to(dtype)  # o and z (T, H, V)
    x = o * (o.square().mean(-1, keepdim=True) + eps).rsqrt() * weight * F.silu(z)
    x = x.flatten(1).to(out_dtype)  # (T, H*V)
    return x, lora_u(x, lora_A)


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    p_o, p_z, p_w, p_A, p_x, p_u, T, stride_o, stride_z, eps,
    H: tl.constexpr, V: tl.constexpr, J: tl.constexpr,
    PIECES: tl.constexpr, BH: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (c, i) takes tokens i, i + programs, ... and of each PIECES pieces of BH heads: the whole row if J > 0.

    Values lie as (BH, BV), heads by values, so that the norm's mean is a sum over axis 1.
    """
    o_h = tl.program_id(0) * PIECES * BH + tl.arange(0, BH)[:, None]
    o_v = tl.arange(0, BV)[None, :]
    b_w = tl.load(p_w + o_v, mask=o_v < V, other=0).to(tl.float32)
    b_A = ()
    for k in tl.static_range(PIECES):
        m_f = (o_h + k * BH < H) & (o_v < V)
        for j in tl.static_range(J):
            b_A += (tl.load(p_A + (j * H + o_h + k * BH) * V + o_v, mask=m_f, other=0),)
    for i_t in tl.range(tl.program_id(1), T, tl.num_programs(1), num_stages=STAGES):
        o_t = tl.cast(i_t, tl.int64)  # T * H * V can pass 2^31
        # One sum for every lane; they are added up once, after the last piece of the row.
        b_dots = ()
        for _ in tl.static_range(J):
            b_dots += (tl.zeros([BH, BV], tl.float32),)
        for k in tl.static_range(PIECES):
            o_f = (o_h + k * BH) * V + o_v
            m_f = (o_h + k * BH < H) & (o_v < V)
            b_o = tl.load(p_o + o_t * stride_o + o_f, mask=m_f, other=0).to(tl.float32)
            b_z = tl.load(p_z + o_t * stride_z + o_f, mask=m_f, other=0).to(tl.float32)
            # Lanes beyond V hold 0 and add nothing, so the mean divides by V and not by BV.
            b_rstd = tl.rsqrt(tl.sum(b_o * b_o, 1, keep_dims=True) / V + eps)
            b_x = (b_o * b_rstd * b_w * b_z * tl.sigmoid(b_z)).to(p_x.dtype.element_ty)
            tl.store(p_x + o_t * H * V + o_f, b_x, mask=m_f)
            b_new = ()
            for j in tl.static_range(J):
                b_new += (b_dots[j] + b_x.to(tl.float32) * b_A[k * J + j],)
            b_dots = b_new
        for j in tl.static_range(J):
            tl.store(p_u + o_t * J + j, tl.sum(tl.sum(b_dots[j], 1)))


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    p_dx, p_du, p_o, p_z, p_w, p_A, p_do, p_dz, p_partial, T, stride_dx, stride_o, stride_z, eps,
    H: tl.constexpr, V: tl.constexpr, J: tl.constexpr, BH: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (head block, i) takes tokens i, i + programs, ...; p_partial (programs, J, H * V)."""
    o_h = tl.program_id(0) * BH + tl.arange(0, BH)[:, None]
    o_v = tl.arange(0, BV)[None, :]
    o_f = o_h * V + o_v
    m_f = (o_h < H) & (o_v < V)
    # 0 * o_h loads a whole (BH, BV) tile, so that w gets the layout of o. With a broadcast row, the compiler would
    # change the layout of every store.
    b_w = tl.load(p_w + 0 * o_h + o_v, mask=m_f, other=0).to(tl.float32)
    b_A, b_dA = (), ()
    for j in tl.static_range(J):
        b_A += (tl.load(p_A + j * H * V + o_f, mask=m_f, other=0),)
        b_dA += (tl.zeros([BH, BV], tl.float32),)
    for i_t in tl.range(tl.program_id(1), T, tl.num_programs(1), num_stages=STAGES):
        o_t = tl.cast(i_t, tl.int64)
        b_dx = tl.load(p_dx + o_t * stride_dx + o_f, mask=m_f, other=0).to(tl.float32)
        b_o = tl.load(p_o + o_t * stride_o + o_f, mask=m_f, other=0).to(tl.float32)
        b_z = tl.load(p_z + o_t * stride_z + o_f, mask=m_f, other=0).to(tl.float32)
        b_sigmoid = tl.sigmoid(b_z)
        b_rstd = tl.rsqrt(tl.sum(b_o * b_o, 1, keep_dims=True) / V + eps)
        b_n = b_o * b_rstd
        b_new = ()
        for j in tl.static_range(J):
            # x as forward rounded it: dA is the gradient of a product with the rounded x.
            b_x = (b_n * b_w * b_z * b_sigmoid).to(p_o.dtype.element_ty).to(tl.float32)
            b_du = tl.load(p_du + o_t * J + j)
            b_dx += b_du * b_A[j]
            b_new += (b_dA[j] + b_du * b_x,)
        b_dA = b_new
        # From here on b_dx holds dx + du A.
        b_dz = b_dx * b_n * b_w * b_sigmoid * (1 + b_z * (1 - b_sigmoid))
        tl.store(p_dz + o_t * H * V + o_f, b_dz.to(p_dz.dtype.element_ty), mask=m_f)
        b_dn = b_dx * b_w * b_z * b_sigmoid
        b_do = b_rstd * (b_dn - b_n * (tl.sum(b_dn * b_n, 1, keep_dims=True) / V))
        tl.store(p_do + o_t * H * V + o_f, b_do.to(p_do.dtype.element_ty), mask=m_f)
    for j in tl.static_range(J):
        p_row = p_partial + (tl.program_id(1) * J + j).to(tl.int64) * H * V
        tl.store(p_row + o_f, b_dA[j], mask=m_f)


def _blocks(H: int, V: int) -> dict[str, int]:
    """BH and BV of a tile of about 1,024 values."""
    BV = triton.next_power_of_2(V)
    return {"BH": min(triton.next_power_of_2(H), max(1, 1024 // BV)), "BV": BV}


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o, z, lora_A, weight, eps):
        T, H, V = o.shape
        J = 0 if lora_A is None else len(lora_A)
        x = torch.empty(T, H * V, dtype=o.dtype, device=o.device)
        u = torch.empty(T, J, dtype=torch.float32, device=o.device) if J else None
        blocks = _blocks(H, V)
        pieces = triton.cdiv(H, blocks["BH"])
        # With A a program needs the whole row, because u sums over it.
        pieces_each = pieces if J else min(2, pieces)
        columns = triton.cdiv(pieces, pieces_each)
        programs = persistent_programs(o, T, per_sm=2 if J else 6 / columns)
        _forward_kernel[(columns, programs)](
            o, z, weight, lora_A, x, u, T, o.stride(0), z.stride(0), eps,
            H=H, V=V, J=J, PIECES=pieces_each, **blocks, STAGES=3, num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(o, z, lora_A, weight)
        ctx.eps = eps
        return x, u

    @staticmethod
    def backward(ctx, dx, du):
        o, z, lora_A, weight = ctx.saved_tensors
        T, H, V = o.shape
        J = 0 if lora_A is None else len(lora_A)
        do = torch.empty(T, H, V, dtype=o.dtype, device=o.device)
        dz = torch.empty(T, H * V, dtype=z.dtype, device=z.device)
        blocks = _blocks(H, V)
        columns = triton.cdiv(H, blocks["BH"])
        programs = persistent_programs(o, T, per_sm=5 / columns)
        partial = o.new_empty(programs, J, H * V, dtype=torch.float32)
        dx = adjacent(dx)
        _backward_kernel[(columns, programs)](
            dx, du.contiguous() if J else None, o, z, weight, lora_A, do, dz, partial, T,
            dx.stride(0), o.stride(0), z.stride(0), ctx.eps, H=H, V=V, J=J, **blocks, STAGES=3, num_warps=4,
        )  # fmt: skip
        return do, dz, partial.sum(0) if J else None, None, None


def gated_rms_norm_triton(
    o: Tensor, z: Tensor, weight: Tensor, eps: float, lora_A: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """gated_rms_norm_reference in Triton. Up to three fp32 rows of A are fused; for more a plain matmul runs after the
    kernel. o and z may have any stride between tokens. ValueError if the weight requires a gradient, which it does not
    get, and if a token's heads are not contiguous.
    """
    check_inputs("gated_rms_norm", {"o": o, "z": z}, {"weight": weight})
    if o.shape[1] > 1 and o.stride(1) != o.shape[2]:
        raise ValueError(f"gated_rms_norm: o has strides {o.stride()}; expected a token's heads side by side")
    A = lora_A.contiguous() if fuses_A(lora_A) else None
    x, u = _GatedRMSNorm.apply(o, z, A, weight, eps)
    return x, u if A is not None else lora_u(x, lora_A)
