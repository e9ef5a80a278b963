"""The three backward kernels of the gated delta rule.

    recompute   one program per segment of 16 chunks: R and the state before every chunk, from the saved checkpoints
    reverse     one program per document: walks the chunks backwards with dS in registers; dv and the gradient of the
                state after every chunk
    gradients   one program per chunk and key head: dq, dk, da, db, summed over the value heads that share the key head

Equations: kernels/ops/gated_delta_rule.py and docs/gated-delta-rule.md. Sizes and layouts: gated_delta_rule_forward.py.
Scratch, shared by all layers: R (NC, H, BT, DV), S and dS (NC, H, DK, DV) in v's dtype, one fp32 number per token and
head.
"""

import torch
from torch import Tensor

from kernels.ops._triton import tl, triton
from kernels.ops.gated_delta_rule_forward import (
    CHUNK,
    Prepared,
    Schedule,
    decay_between,
    load_chunk,
    load_factors,
    load_gates,
    load_last,
    load_rows,
    options,
    precision,
    store_rows,
    tile,
)


@triton.jit
def _recompute_kernel(
    p_k,
    p_v,
    p_gates,
    p_norms,
    p_M,
    p_initial,
    p_checkpoints,
    p_segments,
    p_R,
    p_S,
    s_k,
    s_v,
    HAS_INITIAL: tl.constexpr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_v, i_h, i_row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_hk = i_h // GROUP
    p_row = p_segments + i_row * 5
    i_document, begin, length = tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2)
    first_chunk, i_checkpoint = tl.load(p_row + 3), tl.load(p_row + 4)
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, DK), i_v * BV + tl.arange(0, BV)
    dtype: tl.constexpr = p_R.dtype.element_ty

    b_S = tl.zeros((DK, BV), tl.float32)
    if i_checkpoint >= 0:
        b_S += tl.load(tile(p_checkpoints, i_checkpoint * H + i_h, DK, DV, o_k, o_v))
    elif HAS_INITIAL:
        b_S += tl.load(tile(p_initial, i_document * H + i_h, DK, DV, o_k, o_v)).to(tl.float32)
    for i in range(tl.cdiv(length, BT)):
        i_gate = (first_chunk + i) * H + i_h
        at, left = begin + i * BT, length - i * BT
        b_c, b_fine, b_beta = load_gates(p_gates, i_gate, BT)
        _, b_fk = load_factors(p_norms, (first_chunk + i) * (H // GROUP) + i_hk, DK, BT)
        last, last_fine = load_last(p_gates, i_gate, BT)
        b_k = load_rows(p_k + i_hk * DK, at, left, s_k, o_k, BT)
        b_v = load_rows(p_v + i_h * DV, at, left, s_v, o_v, BT)
        b_M = tl.load(tile(p_M, i_gate, BT, BT, o_t, o_t))

        b_s = b_S.to(dtype)
        tl.store(tile(p_S, i_gate, DK, DV, o_k, o_v), b_s)
        b_E = tl.dot(b_k, b_s, input_precision=PRECISION)
        b_E = b_beta[:, None] * (b_v.to(tl.float32) - (tl.exp(b_c + b_fine) * b_fk)[:, None] * b_E)
        b_R = tl.dot(b_M, b_E.to(dtype), input_precision=PRECISION)
        tl.store(tile(p_R, i_gate, BT, DV, o_t, o_v), b_R.to(dtype))
        b_R *= (tl.exp((last - b_c) + (last_fine - b_fine)) * b_fk)[:, None]
        b_S *= tl.exp(last + last_fine)
        b_S = tl.dot(tl.trans(b_k), b_R.to(dtype), b_S, input_precision=PRECISION)


@triton.jit
def _reverse_kernel(
    p_q,
    p_k,
    p_do,
    p_gates,
    p_norms,
    p_M,
    p_P,
    p_dfinal,
    p_documents,
    p_dv,
    p_dS,
    p_dinitial,
    s_q,
    s_k,
    HAS_FINAL: tl.constexpr,
    STORE_INITIAL: tl.constexpr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_v, i_h, i_row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_hk = i_h // GROUP
    p_row = p_documents + i_row * 5
    i_document, begin, length = tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2)
    first_chunk = tl.load(p_row + 3)
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, DK), i_v * BV + tl.arange(0, BV)
    dtype: tl.constexpr = p_dv.dtype.element_ty

    b_dS = tl.zeros((DK, BV), tl.float32)
    if HAS_FINAL:
        b_dS += tl.load(tile(p_dfinal, i_document * H + i_h, DK, DV, o_k, o_v)).to(tl.float32)
    count = tl.cdiv(length, BT)
    for j in range(count):
        i = count - 1 - j
        i_gate = (first_chunk + i) * H + i_h
        at, left = begin + i * BT, length - i * BT
        b_c, b_fine, b_beta = load_gates(p_gates, i_gate, BT)
        b_fq, b_fk = load_factors(p_norms, (first_chunk + i) * (H // GROUP) + i_hk, DK, BT)
        last, last_fine = load_last(p_gates, i_gate, BT)
        b_decay = tl.exp(b_c + b_fine)
        b_k = load_rows(p_k + i_hk * DK, at, left, s_k, o_k, BT)
        b_q = load_rows(p_q + i_hk * DK, at, left, s_q, o_k, BT)
        b_do = load_rows(p_do + i_h * DV, at, left, H * DV, o_v, BT)
        b_M = tl.load(tile(p_M, i_gate, BT, BT, o_t, o_t))
        b_P = tl.load(tile(p_P, i_gate, BT, BT, o_t, o_t))

        b_ds = b_dS.to(dtype)
        tl.store(tile(p_dS, i_gate, DK, DV, o_k, o_v), b_ds)
        b_dR = tl.dot(b_k, b_ds, input_precision=PRECISION)
        b_dR *= (tl.exp((last - b_c) + (last_fine - b_fine)) * b_fk)[:, None]
        b_dR = tl.dot(tl.trans(b_P), b_do, b_dR, input_precision=PRECISION)
        b_dv = tl.dot(tl.trans(b_M), b_dR.to(dtype), input_precision=PRECISION) * b_beta[:, None]
        store_rows(p_dv + i_h * DV, b_dv, at, left, H * DV, o_v, BT)
        b_dS *= tl.exp(last + last_fine)
        b_read = b_do.to(tl.float32) * (b_decay * b_fq)[:, None]
        b_dS = tl.dot(tl.trans(b_q), b_read.to(dtype), b_dS, input_precision=PRECISION)
        b_erase = b_dv * -(b_decay * b_fk)[:, None]
        b_dS = tl.dot(tl.trans(b_k), b_erase.to(dtype), b_dS, input_precision=PRECISION)
    if STORE_INITIAL:
        tl.store(tile(p_dinitial, i_document * H + i_h, DK, DV, o_k, o_v), b_dS)


@triton.jit
def _through_norm(b_dn, b_x, b_r):
    """The gradient of x from that of n = r x, r = (|x|^2 + eps)^-1/2: r (dn - n (n . dn)), exact with the epsilon."""
    b_dot = tl.sum(b_x * b_dn, 1) * b_r * b_r
    return (b_dn - b_x * b_dot[:, None]) * b_r[:, None]


@triton.jit
def _gradients_kernel(
    p_q,
    p_k,
    p_a,
    p_A_log,
    p_dt_bias,
    p_do,
    p_dv,
    p_gates,
    p_norms,
    p_R,
    p_S,
    p_dS,
    p_chunks,
    p_dc,
    p_dq,
    p_dk,
    p_da,
    p_db,
    s_q,
    s_k,
    s_a,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_hk, i_chunk = tl.program_id(0), tl.program_id(1)
    o_t, o_k, o_j = tl.arange(0, BT), tl.arange(0, DK), tl.arange(0, BV)
    i_norm = i_chunk * (H // GROUP) + i_hk
    p_q += i_hk * DK
    p_k += i_hk * DK
    dtype: tl.constexpr = p_R.dtype.element_ty

    # Two passes over the heads, dq then dk, so that only one (BT, DK) sum stays in registers. q, k and where the chunk
    # lies are read again (from L2) where they are used: held, they and their addresses are spilled.
    b_dq = tl.zeros((BT, DK), tl.float32)
    for i_g in range(GROUP):
        i_h = i_hk * GROUP + i_g
        begin, length = load_chunk(p_chunks, i_chunk)
        i_gate = i_chunk * H + i_h
        # What was read from the state: e^c dO S^T.
        b_read = tl.zeros((BT, DK), tl.float32)
        for i_v in range(0, DV, BV):
            b_do = load_rows(p_do + i_h * DV, begin, length, H * DV, i_v + o_j, BT)
            b_S = tl.load(tile(p_S, i_gate, DK, DV, o_k, i_v + o_j))
            b_read = tl.dot(b_do, tl.trans(b_S), b_read, input_precision=PRECISION)
        b_c, b_fine, _ = load_gates(p_gates, i_gate, BT)
        b_fq, b_fk = load_factors(p_norms, i_norm, DK, BT)
        b_read *= tl.exp(b_c + b_fine)[:, None]
        b_q = load_rows(p_q, begin, length, s_q, o_k, BT)
        b_dc = b_fq * tl.sum(b_q.to(tl.float32) * b_read, 1)
        b_dq += b_read
        # dP = (dO R^T) D.
        b_dP = tl.zeros((BT, BT), tl.float32)
        for i_v in range(0, DV, BV):
            b_do = load_rows(p_do + i_h * DV, begin, length, H * DV, i_v + o_j, BT)
            b_R = tl.load(tile(p_R, i_gate, BT, DV, o_t, i_v + o_j))
            b_dP = tl.dot(b_do, tl.trans(b_R), b_dP, input_precision=PRECISION)
        b_dP *= decay_between(b_c, b_fine, True, BT) * b_fk[None, :]
        b_q = load_rows(p_q, begin, length, s_q, o_k, BT)
        b_k = load_rows(p_k, begin, length, s_k, o_k, BT)
        b_X = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_dP * b_fq[:, None]
        b_X = tl.where(o_t[:, None] > o_t[None, :], b_X, 0.0)
        tl.store(p_dc + i_gate.to(tl.int64) * BT + o_t, b_dc + tl.sum(b_X, 1) - tl.sum(b_X, 0))
        b_dq = tl.dot(b_dP.to(dtype), b_k, b_dq, input_precision=PRECISION)
    begin, length = load_chunk(p_chunks, i_chunk)
    b_raw = load_rows(p_q, begin, length, s_q, o_k, BT).to(tl.float32)
    b_fq, _ = load_factors(p_norms, i_norm, DK, BT)
    b_dq = _through_norm(b_dq * DK**-0.5, b_raw, b_fq * DK**0.5)
    store_rows(p_dq + i_hk * DK, b_dq, begin, length, H // GROUP * DK, o_k, BT)
    tl.debug_barrier()  # p_dc, written above, is read below by other threads of this program

    b_dk = tl.zeros((BT, DK), tl.float32)
    for i_g in range(GROUP):
        i_h = i_hk * GROUP + i_g
        begin, length = load_chunk(p_chunks, i_chunk)
        i_gate = i_chunk * H + i_h
        m_t, o_row = o_t < length, (begin + o_t).to(tl.int64)
        # What wrote into the state: e^(cl - c) R dS'^T ...
        b_wide = tl.zeros((BT, DK), tl.float32)
        b_tile = tl.zeros((BT, BT), tl.float32)
        for i_v in range(0, DV, BV):
            b_R = tl.load(tile(p_R, i_gate, BT, DV, o_t, i_v + o_j))
            b_do = load_rows(p_do + i_h * DV, begin, length, H * DV, i_v + o_j, BT)
            b_tile = tl.dot(b_R, tl.trans(b_do), b_tile, input_precision=PRECISION)
            b_dS = tl.load(tile(p_dS, i_gate, DK, DV, o_k, i_v + o_j))
            b_wide = tl.dot(b_R, tl.trans(b_dS), b_wide, input_precision=PRECISION)
        b_c, b_fine, b_beta = load_gates(p_gates, i_gate, BT)
        b_fq, b_fk = load_factors(p_norms, i_norm, DK, BT)
        last, last_fine = load_last(p_gates, i_gate, BT)
        b_wide *= tl.exp((last - b_c) + (last_fine - b_fine))[:, None]
        b_k = load_rows(p_k, begin, length, s_k, o_k, BT)
        b_om = b_fk * tl.sum(b_k.to(tl.float32) * b_wide, 1)
        b_dk += b_wide
        # ... and dP^T D^T times the scaled q: this tile's rows are the earlier tokens.
        b_x = (b_c[None, :] - b_c[:, None]) + (b_fine[None, :] - b_fine[:, None])
        b_tile *= tl.exp(tl.where(o_t[:, None] <= o_t[None, :], b_x, float("-inf"))) * b_fq[None, :]
        b_q = load_rows(p_q, begin, length, s_q, o_k, BT)
        b_dk = tl.dot(b_tile.to(dtype), b_q, b_dk, input_precision=PRECISION)

        # Z = dV R^T: its strict triangle times D is -N, its diagonal gives dbeta.
        b_tile = tl.zeros((BT, BT), tl.float32)
        b_transposed = tl.zeros((BT, BT), tl.float32)
        for i_v in range(0, DV, BV):
            b_dv = load_rows(p_dv + i_h * DV, begin, length, H * DV, i_v + o_j, BT)
            b_R = tl.load(tile(p_R, i_gate, BT, DV, o_t, i_v + o_j))
            b_tile = tl.dot(b_dv, tl.trans(b_R), b_tile, input_precision=PRECISION)
            b_transposed = tl.dot(b_R, tl.trans(b_dv), b_transposed, input_precision=PRECISION)
        b_dbeta = tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_tile, 0.0), 1) / tl.maximum(b_beta, 1e-30)
        p_b = p_db + o_row * H + i_h
        tl.store(p_b, ((1.0 - b_beta) * b_dbeta).to(p_db.dtype.element_ty), mask=m_t)
        b_tile *= -decay_between(b_c, b_fine, False, BT) * b_fk[None, :]
        b_k = load_rows(p_k, begin, length, s_k, o_k, BT)
        b_X = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b_tile * b_fk[:, None]
        b_dc = tl.load(p_dc + i_gate.to(tl.int64) * BT + o_t) + tl.sum(b_X, 1) - tl.sum(b_X, 0)
        b_x = (b_c[None, :] - b_c[:, None]) + (b_fine[None, :] - b_fine[:, None])
        b_x = tl.exp(tl.where(o_t[:, None] < o_t[None, :], b_x, float("-inf"))) * b_fk[None, :]
        b_tile -= b_transposed * b_x
        b_dk = tl.dot(b_tile.to(dtype), b_k, b_dk, input_precision=PRECISION)

        # What erased from the state: e^c dV S^T.
        b_wide = tl.zeros((BT, DK), tl.float32)
        for i_v in range(0, DV, BV):
            b_dv = load_rows(p_dv + i_h * DV, begin, length, H * DV, i_v + o_j, BT)
            b_S = tl.load(tile(p_S, i_gate, DK, DV, o_k, i_v + o_j))
            b_wide = tl.dot(b_dv, tl.trans(b_S), b_wide, input_precision=PRECISION)
        b_wide *= -tl.exp(b_c + b_fine)[:, None]
        b_k = load_rows(p_k, begin, length, s_k, o_k, BT)
        b_dc += b_fk * tl.sum(b_k.to(tl.float32) * b_wide, 1)
        b_dk += b_wide

        # dg_t = sum of dc over s >= t, plus the sum of om over s < t: never as a difference of two sums, whose O(1)
        # last element would bury the rest under strong decay.
        b_dg = tl.sum(tl.where(o_t[None, :] >= o_t[:, None], b_dc[None, :], b_om[None, :]), 1)
        o_n = tl.arange(0, BV // 2)
        b_SdS = tl.zeros((DK, BV // 2), tl.float32)
        for i_v in range(0, DV, BV // 2):
            b_S = tl.load(tile(p_S, i_gate, DK, DV, o_k, i_v + o_n)).to(tl.float32)
            b_SdS += b_S * tl.load(tile(p_dS, i_gate, DK, DV, o_k, i_v + o_n)).to(tl.float32)
        b_dg += tl.exp(last + last_fine) * tl.sum(tl.sum(b_SdS, 1), 0)
        b_a = tl.load(p_a + o_row * s_a + i_h, mask=m_t, other=0.0).to(tl.float32)
        b_slope = tl.sigmoid(b_a + tl.load(p_dt_bias + i_h).to(tl.float32))
        b_da = -b_dg * tl.exp(tl.load(p_A_log + i_h).to(tl.float32)) * b_slope
        tl.store(p_da + o_row * H + i_h, b_da.to(p_da.dtype.element_ty), mask=m_t)
    begin, length = load_chunk(p_chunks, i_chunk)
    b_raw = load_rows(p_k, begin, length, s_k, o_k, BT).to(tl.float32)
    _, b_fk = load_factors(p_norms, i_norm, DK, BT)
    store_rows(p_dk + i_hk * DK, _through_norm(b_dk, b_raw, b_fk), begin, length, H // GROUP * DK, o_k, BT)


def recompute(
    k: Tensor, v: Tensor, x: Prepared, initial: Tensor | None, checkpoints: Tensor, plan: Schedule
) -> tuple[Tensor, Tensor]:
    """R (NC, H, BT, dv) and S (NC, H, dk, dv), the state before every chunk, in v's dtype."""
    (Hk, dk), (H, dv), NC = k.shape[1:], v.shape[1:], len(plan.chunks)
    R = torch.empty(NC, H, CHUNK, dv, dtype=v.dtype, device=v.device)
    S = torch.empty(NC, H, dk, dv, dtype=v.dtype, device=v.device)
    how = options("recompute", v.dtype, dv)
    _recompute_kernel[(dv // how["BV"], H, len(plan.segments))](
        *(k, v, x.gates, x.norms, x.M, initial, checkpoints, plan.segments, R, S),
        *(k.stride(0), v.stride(0)),
        HAS_INITIAL=initial is not None, H=H, GROUP=H // Hk, DK=dk, DV=dv, BT=CHUNK, PRECISION=precision(v), **how,
    )  # fmt: skip
    return R, S


def reverse(
    q: Tensor, k: Tensor, do: Tensor, x: Prepared, dfinal: Tensor | None, plan: Schedule, initial: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dv (T, H, dv), dS (NC, H, dk, dv) of the state after every chunk, and if `initial` that of the initial state."""
    (Hk, dk), (H, dv), NC = k.shape[1:], do.shape[1:], len(plan.chunks)
    grad_v = torch.empty(do.shape, dtype=do.dtype, device=do.device)
    dS = torch.empty(NC, H, dk, dv, dtype=do.dtype, device=do.device)
    n = len(plan.documents)
    dinitial = torch.empty(n, H, dk, dv, dtype=torch.float32, device=do.device) if initial else None
    how = options("reverse", do.dtype, dv)
    _reverse_kernel[(dv // how["BV"], H, n)](
        *(q, k, do, *x, dfinal, plan.documents, grad_v, dS, dinitial),
        *(q.stride(0), k.stride(0)),
        HAS_FINAL=dfinal is not None, STORE_INITIAL=initial,
        H=H, GROUP=H // Hk, DK=dk, DV=dv, BT=CHUNK, PRECISION=precision(do), **how,
    )  # fmt: skip
    return grad_v, dS, dinitial


def gradients(
    q: Tensor,
    k: Tensor,
    a: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    do: Tensor,
    grad_v: Tensor,
    x: Prepared,
    R: Tensor,
    S: Tensor,
    dS: Tensor,
    plan: Schedule,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk (T, Hk, dk), da, db (T, H)."""
    (T, Hk, dk), (H, dv), NC = k.shape, do.shape[1:], len(plan.chunks)
    dq, dk_ = (torch.empty(T, Hk, dk, dtype=k.dtype, device=k.device) for _ in range(2))
    da, db = (torch.empty(T, H, dtype=a.dtype, device=a.device) for _ in range(2))  # a and b share a dtype
    dc = torch.empty(NC, H, CHUNK, dtype=torch.float32, device=k.device)
    how = options("gradients", do.dtype, dv)
    _gradients_kernel[(Hk, NC)](
        *(q, k, a, A_log, dt_bias, do, grad_v, x.gates, x.norms, R, S, dS, plan.chunks, dc, dq, dk_, da, db),
        *(q.stride(0), k.stride(0), a.stride(0)),
        H=H, GROUP=H // Hk, DK=dk, DV=dv, BT=CHUNK, PRECISION=precision(do), **how,
    )  # fmt: skip
    return dq, dk_, da, db
