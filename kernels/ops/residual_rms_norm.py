"""Residual addition and RMSNorm, with the adapter term of the GEMM before and the A projections of the GEMM after.

    h' = round(h + y + s u B^T)            the residual stream, in the activation dtype
    x  = round(h' rstd (1 + w))            rstd = rsqrt(mean(h'^2) + eps)
    u' = x A^T                             fp32, J numbers a token

Backward, with n = h' rstd and the gradients dh' (from the residual path), dx and du':

    dx += du' A          dn = dx (1 + w)         dh = dh' + rstd (dn - n mean(dn n))
    dA = du'^T x         dy = dh                 du = s dh B            dB = s dh^T u

h, y, h', x (T, D); w (D,); u (T, r), B (D, r) of the GEMM before; A (J, D), u' (T, J) of the GEMM after.

Rounding: everything between loads and stores is fp32; only h' and x are rounded. u' reads the rounded x, as the GEMM
does. Bytes a token at D = 5,120 in bf16: forward reads h and y and writes h' and x (40,960 B), backward reads dh', dx
and h' and writes dh (40,960 B). The adapter adds u, A and B once, and in backward the fp32 partial sums of dA and dB:
each multiprocessor writes one row of D for each sum. Saved for backward: h', which is the residual stream itself, and
rstd, 4 B a token; x is recomputed from them. dh and dy are one tensor.
Source: transformers `Qwen3_5RMSNorm`, whose weight is zero-centred: it multiplies by 1 + w.
"""

import torch
from torch import Tensor

from kernels.lora_term import Pending, add_lora, compute_dtype, lora_u
from kernels.ops._launch import adjacent, check_inputs, fuses_A, fuses_B, persistent_programs
from kernels.ops._triton import tl, triton


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x rsqrt(mean(x^2) + eps) (1 + w) over the last dimension, not yet rounded."""
    # To fp32 before 1 is added: in bf16, 1 + w has a resolution of 1/128 and most of a small w would be lost.
    x, weight = x.to(compute_dtype(x)), weight.to(compute_dtype(x))
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (1 + weight)


def residual_rms_norm_reference(
    h: Tensor, pending: Pending | None, weight: Tensor, eps: float, lora_A: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """h (T, D), pending.y (T, D), weight (D,), lora_A (J, D) fp32 -> h' (T, D), x (T, D), u (T, J) fp32 or None.

    With `pending` None, as in the first layer, h' is h.
    """
    if pending is not None:
        h = (h + add_lora(pending.y, pending.lora, (h.shape[1],))).to(h.dtype)
    x = rms_norm_reference(h, weight, eps).to(h.dtype)
    return h, x, lora_u(x, lora_A)


# Triton. A block has a power of two of elements, and 5,120 is none: one block of 8,192 spills registers. So a row is
# a tuple of ceil(D / BD) pieces; 5 x 1,024 leaves no lane idle. The functions up to _dot compute with such rows.
# Programs are persistent: each walks over many rows with w, A and B in registers, and the loads of its next rows are in
# flight (`num_stages`) while one row is summed.


@triton.jit
def _load_row(p_row, D: tl.constexpr, BD: tl.constexpr):
    """A row in fp32, with zeros behind its end."""
    b_row = ()
    for k in tl.static_range((D + BD - 1) // BD):
        o_d = k * BD + tl.arange(0, BD)
        b_row += (tl.load(p_row + o_d, mask=o_d < D, other=0).to(tl.float32),)
    return b_row


@triton.jit
def _store_row(p_row, b_row, D: tl.constexpr, BD: tl.constexpr):
    for k in tl.static_range((D + BD - 1) // BD):
        o_d = k * BD + tl.arange(0, BD)
        tl.store(p_row + o_d, b_row[k].to(p_row.dtype.element_ty), mask=o_d < D)


@triton.jit
def _zeros(D: tl.constexpr, BD: tl.constexpr):
    b_row = ()
    for _ in tl.static_range((D + BD - 1) // BD):
        b_row += (tl.zeros([BD], tl.float32),)
    return b_row


@triton.jit
def _load_matrix(p_x, J: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """J rows."""
    b_rows = ()
    for j in tl.static_range(J):
        b_rows += (_load_row(p_x + j * D, D, BD),)
    return b_rows


@triton.jit
def _rounded(b_x, dtype: tl.constexpr):
    b_out = ()
    for k in tl.static_range(len(b_x)):
        b_out += (b_x[k].to(dtype).to(tl.float32),)
    return b_out


@triton.jit
def _scaled(b_x, number):
    b_out = ()
    for k in tl.static_range(len(b_x)):
        b_out += (b_x[k] * number,)
    return b_out


@triton.jit
def _product(b_x, b_y):
    b_out = ()
    for k in tl.static_range(len(b_x)):
        b_out += (b_x[k] * b_y[k],)
    return b_out


@triton.jit
def _plus(b_x, number, b_y):
    """x + number y."""
    b_out = ()
    for k in tl.static_range(len(b_x)):
        b_out += (b_x[k] + number * b_y[k],)
    return b_out


@triton.jit
def _dot(b_x, b_y):
    # Pieces are added up first: one sum over the threads, instead of one for each piece.
    b_dot = b_x[0] * b_y[0]
    for k in tl.static_range(1, len(b_x)):
        b_dot += b_x[k] * b_y[k]
    return tl.sum(b_dot)


@triton.jit
def _one_plus(b_x):
    b_out = ()
    for k in tl.static_range(len(b_x)):
        b_out += (1 + b_x[k],)
    return b_out


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    p_h, p_y, p_u, p_B, p_w, p_A, p_h_out, p_x, p_u_out, p_rstd, T, stride_h, stride_y, eps, scale,
    D: tl.constexpr, J: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program i takes rows i, i + programs, ... p_y None: nothing pending; p_B None: no adapter term in it."""
    b_w = _one_plus(_load_row(p_w, D, BD))
    b_A = _load_matrix(p_A, J, D, BD)
    if p_B is not None:
        b_B = _scaled(_load_row(p_B, D, BD), scale)
    for i_t in tl.range(tl.program_id(0), T, tl.num_programs(0), num_stages=STAGES):
        o_t = tl.cast(i_t, tl.int64)  # T * D can pass 2^31
        b_h = _load_row(p_h + o_t * stride_h, D, BD)
        if p_y is not None:
            b_h = _plus(b_h, 1.0, _load_row(p_y + o_t * stride_y, D, BD))
            if p_B is not None:
                b_h = _plus(b_h, tl.load(p_u + o_t), b_B)
            # The norm reads the rounded h', because backward will find only that.
            b_h = _rounded(b_h, p_h_out.dtype.element_ty)
            _store_row(p_h_out + o_t * D, b_h, D, BD)
        b_rstd = tl.rsqrt(_dot(b_h, b_h) / D + eps)
        tl.store(p_rstd + o_t, b_rstd)
        b_x = _rounded(_product(_scaled(b_h, b_rstd), b_w), p_x.dtype.element_ty)
        _store_row(p_x + o_t * D, b_x, D, BD)
        for j in tl.static_range(J):
            tl.store(p_u_out + o_t * J + j, _dot(b_x, b_A[j]))


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    p_dh, p_dx, p_du_out, p_h, p_rstd, p_u, p_B, p_w, p_A, p_dy, p_du, p_partial,
    T, stride_dh, stride_dx, stride_h, scale,
    D: tl.constexpr, J: tl.constexpr, WANTS_DA: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """WANTS_DA: dA is wanted. p_B None: neither du nor dB is wanted. p_dy None: dA alone is wanted.

    p_partial (programs, SUMS, D): J rows of dA if WANTS_DA, then one row of dB if p_B is given.
    """
    DA_ROWS: tl.constexpr = J if WANTS_DA else 0
    SUMS: tl.constexpr = DA_ROWS + (p_B is not None)
    b_w = _one_plus(_load_row(p_w, D, BD))
    b_A = _load_matrix(p_A, J, D, BD)
    b_dA = ()
    for _ in tl.static_range(DA_ROWS):
        b_dA += (_zeros(D, BD),)
    b_dB = ()
    if p_B is not None:
        b_B, b_dB = _load_row(p_B, D, BD), _zeros(D, BD)
    for i_t in tl.range(tl.program_id(0), T, tl.num_programs(0), num_stages=STAGES):
        o_t = tl.cast(i_t, tl.int64)
        b_rstd = tl.load(p_rstd + o_t)
        b_n = _scaled(_load_row(p_h + o_t * stride_h, D, BD), b_rstd)
        b_new = ()
        for j in tl.static_range(DA_ROWS):
            # x as forward rounded it: dA is the gradient of a product with the rounded x.
            b_x = _rounded(_product(b_n, b_w), p_h.dtype.element_ty)
            b_new += (_plus(b_dA[j], tl.load(p_du_out + o_t * J + j), b_x),)
        b_dA = b_new
        if p_dy is not None:
            b_dx = _load_row(p_dx + o_t * stride_dx, D, BD)
            for j in tl.static_range(J):
                b_dx = _plus(b_dx, tl.load(p_du_out + o_t * J + j), b_A[j])
            b_dn = _product(b_dx, b_w)
            b_mean = _dot(b_dn, b_n) / D
            b_dh = _load_row(p_dh + o_t * stride_dh, D, BD)
            b_dh = _plus(b_dh, b_rstd, _plus(b_dn, -b_mean, b_n))
            _store_row(p_dy + o_t * D, b_dh, D, BD)
            if p_B is not None:
                # dB and du need dh before it is rounded.
                b_dB = _plus(b_dB, scale * tl.load(p_u + o_t), b_dh)
                tl.store(p_du + o_t, scale * _dot(b_dh, b_B))
    p_partial += tl.program_id(0).to(tl.int64) * SUMS * D
    for j in tl.static_range(DA_ROWS):
        _store_row(p_partial + j * D, b_dA[j], D, BD)
    if p_B is not None:
        _store_row(p_partial + DA_ROWS * D, b_dB, D, BD)


def _launch(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Grid and constants for rows of x's length."""
    T, D = x.shape
    # Eight warps a multiprocessor and no more: with three rows of A, a thread needs up to 245 of its 255 registers.
    BD = min(1024, triton.next_power_of_2(D))
    num_warps = 8 if D > 2048 else 4 if D > 512 else 1
    return (persistent_programs(x, T, per_sm=8 / num_warps),), {"BD": BD, "STAGES": 3, "num_warps": num_warps}


class _ResidualRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, y, u, B, lora_A, weight, eps, scale):
        T, D = h.shape
        J = 0 if lora_A is None else len(lora_A)
        h_out = h if y is None else torch.empty(T, D, dtype=h.dtype, device=h.device)
        x = torch.empty(T, D, dtype=h.dtype, device=h.device)
        u_out = torch.empty(T, J, dtype=torch.float32, device=h.device) if J else None
        rstd = torch.empty(T, dtype=torch.float32, device=h.device)
        grid, constants = _launch(h)
        _forward_kernel[grid](
            h, y, u, B, weight, lora_A, h_out, x, u_out, rstd, T, h.stride(0), 0 if y is None else y.stride(0), eps,
            scale, D=D, J=J, **constants,
        )  # fmt: skip
        ctx.save_for_backward(h_out, rstd, u, B, lora_A, weight)
        ctx.scale = scale
        return h_out, x, u_out

    @staticmethod
    def backward(ctx, dh_out, dx, du_out):
        h, rstd, u, B, lora_A, weight = ctx.saved_tensors
        needs_h, needs_y, needs_u, needs_B, needs_A = ctx.needs_input_grad[:5]
        T, D = h.shape
        J = 0 if lora_A is None else len(lora_A)
        if not (needs_u or needs_B):
            u = B = None
        grid, constants = _launch(h)
        dh = torch.empty(T, D, dtype=h.dtype, device=h.device) if needs_h or needs_y or B is not None else None
        du = None if B is None else torch.empty_like(u)
        partial = h.new_empty(*grid, J * needs_A + (B is not None), D, dtype=torch.float32)
        dh_out, dx = adjacent(dh_out), adjacent(dx)
        _backward_kernel[grid](
            dh_out, dx, du_out.contiguous() if J else None, h, rstd, u, B, weight, lora_A, dh, du, partial,
            T, dh_out.stride(0), dx.stride(0), h.stride(0), ctx.scale, D=D, J=J, WANTS_DA=needs_A, **constants,
        )  # fmt: skip
        sums = partial.sum(0)
        dA = sums[:J] if needs_A else None
        dB = None if B is None else sums[-1:].T
        return dh, dh if needs_y else None, du, dB, dA, None, None, None


def residual_rms_norm_triton(
    h: Tensor, pending: Pending | None, weight: Tensor, eps: float, lora_A: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """residual_rms_norm_reference in Triton. A pending term of rank 1 and up to three rows of A are fused; for others
    plain matmuls run before and after the kernel. h and pending.y may have any row stride. The weight gets no gradient:
    ValueError if it requires one.
    """
    y, lora = (None, None) if pending is None else pending
    check_inputs("residual_rms_norm", {"h": h, "pending.y": y}, {"weight": weight})
    if lora is not None and not fuses_B(lora):
        y, lora = add_lora(y, lora, (h.shape[1],)), None
    u, B, scale = (None, None, 0.0) if lora is None else (lora.u.contiguous(), lora.B.contiguous(), lora.scale)
    A = lora_A.contiguous() if fuses_A(lora_A) else None
    h_out, x, u_out = _ResidualRMSNorm.apply(h, y, u, B, A, weight, eps, scale)
    return h_out, x, u_out if A is not None else lora_u(x, lora_A)
