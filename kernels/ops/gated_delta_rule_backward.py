"""The five backward kernels of the gated delta rule. The factors of the walk come first, as in the forward pass.

    recompute   a program per segment of 16 chunks: R and the state before every chunk, from the saved checkpoints
    reverse     a program per document: walks over the chunks backwards with dS in registers; writes dv, and dS of the
                state after every chunk
    within      a program per chunk and key head: db, and the gradients of the chunk's matrices, dP and Y
    dq, dk      a program per chunk and key head: summed over the value heads that share the key head; dk also writes da

Equations: kernels/ops/gated_delta_rule.py and docs/gated-delta-rule.md. Sizes and layouts: gated_delta_rule_forward.py.
Between the kernels, for one layer at a time, as the walks have them: R^T (NC, H, V, BT), S^T and dS'^T (NC, H, V, K) in
v's dtype. S' is the state after the chunk. In names, RT is R^T. The last three kernels hand on

    dP, Y (NC, G, BT, BT)   f_q dP f_k and f_k (Y + Y^T) f_k, summed over value heads, in v's dtype
    dc (NC, H, 3, BT)       the parts of dc in fp32: within the chunk, through what q reads, through what k erases
"""

import torch
from torch import Tensor

from kernels.ops._triton import tl, triton
from kernels.ops.gated_delta_rule_forward import (
    CHUNK,
    Prepared,
    Schedule,
    StateFactors,
    decay_between,
    descriptors,
    load_beta,
    load_chunk,
    load_erase,
    load_gates,
    load_norm_factors,
    load_read,
    load_write,
    options,
    precision,
    store_rows,
    tile,
    tile_descriptor,
    value_columns,
)


@triton.jit
def _recompute_kernel(
    desc_k, desc_v, desc_M, p_gates, p_factors, p_carry, p_initial, p_checkpoints, p_segments, p_RT, p_ST,
    HAS_INITIAL: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (BV columns of v and S, value head, segment): the forward walk again, without its output."""
    i_v, i_h, i_row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_g = i_h // GROUP
    p_row = p_segments + i_row * 5
    i_document, begin, length = tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2)
    first_chunk, i_checkpoint = tl.load(p_row + 3), tl.load(p_row + 4)
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, K), i_v * BV + tl.arange(0, BV)
    dtype: tl.constexpr = p_RT.dtype.element_ty

    b_ST = tl.zeros((BV, K), tl.float32)
    if i_checkpoint >= 0:
        b_ST += tl.load(tile(p_checkpoints, i_checkpoint * H + i_h, V, K, o_v, o_k))
    elif HAS_INITIAL:
        b_ST += tl.trans(tl.load(tile(p_initial, i_document * H + i_h, K, V, o_k, o_v)).to(tl.float32))
    for i in range(tl.cdiv(length, BT)):
        i_gate = (first_chunk + i) * H + i_h
        at = begin + i * BT
        b_erase, b_write = load_erase(p_factors, i_gate, BT), load_write(p_factors, i_gate, BT)
        carry = tl.load(p_carry + i_gate)
        b_k = desc_k.load([at, i_g * K])
        b_v = desc_v.load([at, i_h * V + i_v * BV])
        b_M = desc_M.load([i_gate * BT, 0])

        # The same products and roundings as in _states_kernel.
        b_st = b_ST.to(dtype)
        tl.store(tile(p_ST, i_gate, V, K, o_v, o_k), b_st)
        b_ET = tl.dot(b_st, tl.trans(b_k), input_precision=PRECISION)
        b_ET = (tl.trans(b_v).to(tl.float32) - b_erase[None, :] * b_ET) * load_beta(p_gates, i_gate, BT)[None, :]
        b_RT = tl.dot(b_ET.to(dtype), tl.trans(b_M), input_precision=PRECISION)
        tl.store(tile(p_RT, i_gate, V, BT, o_v, o_t), b_RT.to(dtype))
        # R is stored as P R reads it in o; the factors of the state's update are not part of it.
        b_RT *= b_write[None, :]
        b_ST *= carry
        b_ST = tl.dot(b_RT.to(dtype), b_k, b_ST, input_precision=PRECISION)


@triton.jit
def _reverse_kernel(
    desc_q, desc_k, desc_do, desc_M, desc_P, p_gates, p_factors, p_carry, p_dfinal, p_documents,
    p_dv, p_dST, p_dinitial,
    HAS_FINAL: tl.constexpr, STORE_INITIAL: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (BV columns of v and dS, value head, document): from the last chunk to the first."""
    i_v, i_h, i_row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_g = i_h // GROUP
    p_row = p_documents + i_row * 5
    i_document, begin, length = tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2)
    first_chunk = tl.load(p_row + 3)
    o_k, o_v = tl.arange(0, K), i_v * BV + tl.arange(0, BV)
    dtype: tl.constexpr = p_dv.dtype.element_ty

    b_dST = tl.zeros((BV, K), tl.float32)
    if HAS_FINAL:
        b_dST += tl.trans(tl.load(tile(p_dfinal, i_document * H + i_h, K, V, o_k, o_v)).to(tl.float32))
    count = tl.cdiv(length, BT)
    for j in tl.range(count, num_stages=STAGES):
        i = count - 1 - j
        i_gate = (first_chunk + i) * H + i_h
        at, left = begin + i * BT, length - i * BT
        b_read, b_write = load_read(p_factors, i_gate, BT), load_write(p_factors, i_gate, BT)
        carry = tl.load(p_carry + i_gate)
        b_k = desc_k.load([at, i_g * K])
        b_q = desc_q.load([at, i_g * K])
        b_do = desc_do.load([at, i_h * V + i_v * BV])
        b_M = desc_M.load([i_gate * BT, 0])
        b_P = desc_P.load([i_gate * BT, 0])

        b_dst = b_dST.to(dtype)
        tl.store(tile(p_dST, i_gate, V, K, o_v, o_k), b_dst)
        # dS = e^(c_last) dS' + q^T (e^c f_q do) - k^T (e^c f_k dv): S was carried on, read and erased from. The erased
        # part has to wait for dv.
        b_dST *= carry
        b_x = tl.trans(b_do).to(tl.float32) * b_read[None, :]
        b_dST = tl.dot(b_x.to(dtype), b_q, b_dST, input_precision=PRECISION)
        # dR = e^(c_last - c) f_k (k dS') + P^T do.
        b_dRT = tl.dot(b_dst, tl.trans(b_k), input_precision=PRECISION) * b_write[None, :]
        b_dRT = tl.dot(tl.trans(b_do), b_P, b_dRT, input_precision=PRECISION)
        # dv = beta M^T dR. Rows without a token get 0, because their beta is 0.
        b_dvT = tl.dot(b_dRT.to(dtype), b_M, input_precision=PRECISION) * load_beta(p_gates, i_gate, BT)[None, :]
        # Loaded only here: with all three factors from the start, registers are spilled.
        b_x = b_dvT * -load_erase(p_factors, i_gate, BT)[None, :]
        b_dST = tl.dot(b_x.to(dtype), b_k, b_dST, input_precision=PRECISION)
        store_rows(p_dv + i_h * V, tl.trans(b_dvT.to(dtype)), at, left, H * V, o_v, BT)
    if STORE_INITIAL:
        tl.store(tile(p_dinitial, i_document * H + i_h, K, V, o_k, o_v), tl.trans(b_dST))


@triton.jit
def _through_norm(b_dn, b_x, b_inverse):
    """dx = f (dn - n (n . dn)) for n = f x with f = b_inverse = (|x|^2 + eps)^-1/2: exact with the epsilon.

    b_dn holds f dn: the kernels apply f where they multiply with factors anyway.
    """
    b_dot = tl.sum(b_x * b_dn, 1) * b_inverse * b_inverse
    return b_dn - b_x * b_dot[:, None]


@triton.jit
def _rows_minus_columns(b_X):
    """rowsum X - colsum X: c_t stands with + in the exponents of row t, with - in those of column t."""
    return tl.sum(b_X, 1) - tl.sum(b_X, 0)


@triton.jit
def _db(b_Z, b_beta, BT: tl.constexpr):
    """db = (1 - beta) / beta diag(Z), as beta = sigmoid(b)."""
    o_t = tl.arange(0, BT)
    b_diagonal = tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_Z, 0.0), 1)
    # 1e-30: beta may underflow to 0, and then Z is 0 as well.
    return (1.0 - b_beta) * (b_diagonal / tl.maximum(b_beta, 1e-30))


@triton.jit
def _dot_of_states(p_ST, p_dST, i_gate, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    """<S, dS'>, in blocks of BV columns."""
    o_k, o_v = tl.arange(0, K), tl.arange(0, BV)
    product = 0.0
    for i_v in tl.static_range(0, V, BV):
        b_ST = tl.load(tile(p_ST, i_gate, V, K, i_v + o_v, o_k)).to(tl.float32)
        b_dST = tl.load(tile(p_dST, i_gate, V, K, i_v + o_v, o_k)).to(tl.float32)
        product += tl.sum(tl.sum(b_ST * b_dST, 1), 0)
    return product


@triton.jit
def _store_dc(p_dc, i_gate, part: tl.constexpr, b_dc, BT: tl.constexpr):
    tl.store(p_dc + i_gate.to(tl.int64) * (3 * BT) + part * BT + tl.arange(0, BT), b_dc)


@triton.jit
def _load_dc(p_dc, i_gate, BT: tl.constexpr):
    """The sum of dc's three parts."""
    p = p_dc + i_gate.to(tl.int64) * (3 * BT) + tl.arange(0, BT)
    return tl.load(p) + tl.load(p + BT) + tl.load(p + 2 * BT)


@triton.jit
def _dg(b_dc, b_om, dcarry, BT: tl.constexpr):
    """dg_t = sum of dc over u >= t + sum of om over u < t + dcarry, e^(c_last) <S, dS'>."""
    # c_u contains g_t for u >= t, and c_last - c_u contains it for u < t. The sum of om must not be computed as all om
    # minus those of u >= t: om of the last token stays of order 1 under strong decay, and its rounding error would be
    # larger than all the others.
    o_t = tl.arange(0, BT)
    return dcarry + tl.sum(tl.where(o_t[None, :] >= o_t[:, None], b_dc[None, :], b_om[None, :]), 1)


@triton.jit
def _within_kernel(
    desc_k, desc_do, desc_dv, desc_RT, desc_P, p_gates, p_norms, p_chunks, p_dP, p_Y, p_dc, p_db,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (key head, chunk): the gradients of the chunk's 64 x 64 matrices, and db.

        dP = (do R^T) D        Z = dv R^T        Y = -Z D        X = dP (q k^T) + Y (k k^T)

    Y and X are strictly below the diagonal. All value heads of a key head multiply dP and Y with the same q and k: so
    dP and Y are summed here.
    """
    i_g, i_chunk = tl.program_id(0), tl.program_id(1)
    i_norm = i_chunk * (H // GROUP) + i_g
    begin, length = load_chunk(p_chunks, i_chunk)
    o_t = tl.arange(0, BT)
    m_t, m_below = o_t < length, o_t[:, None] > o_t[None, :]
    _, b_fk = load_norm_factors(p_norms, i_norm, K, BT)
    b_k = desc_k.load([begin, i_g * K])
    b_kk = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b_fk[:, None] * b_fk[None, :]
    b_kk = tl.where(m_below, b_kk, 0.0)
    b_dP_sum = tl.zeros((BT, BT), tl.float32)
    b_Y_sum = tl.zeros((BT, BT), tl.float32)
    for j in tl.range(GROUP, num_stages=STAGES):
        i_h = i_g * GROUP + j
        i_gate = i_chunk * H + i_h
        b_RT = desc_RT.load([i_gate * V, 0])
        b_do = desc_do.load([begin, i_h * V])
        b_dv = desc_dv.load([begin, i_h * V])
        b_P = desc_P.load([i_gate * BT, 0])
        b_c, b_fine, b_beta = load_gates(p_gates, i_gate, BT)
        b_dP = tl.dot(b_do, b_RT, input_precision=PRECISION)
        b_Z = tl.dot(b_dv, b_RT, input_precision=PRECISION)
        p_b = p_db + (begin + o_t).to(tl.int64) * H + i_h
        tl.store(p_b, _db(b_Z, b_beta, BT).to(p_db.dtype.element_ty), mask=m_t)
        # D (q k^T) is P, which prepare stored. X has no diagonal: the exponent there is c_t - c_t = 0, and its O(1)
        # values would cancel only up to rounding.
        b_X = tl.where(m_below, b_dP * b_P.to(tl.float32), 0.0)
        b_D = decay_between(b_c, b_fine, True, BT)
        b_dP_sum += b_dP * b_D
        b_Y = -b_Z * b_D
        b_X += b_Y * b_kk
        b_Y_sum += b_Y
        _store_dc(p_dc, i_gate, 0, _rows_minus_columns(b_X), BT)
    b_fq, b_fk = load_norm_factors(p_norms, i_norm, K, BT)
    b_dP_sum *= b_fq[:, None] * b_fk[None, :]
    tl.store(tile(p_dP, i_norm, BT, BT, o_t, o_t), b_dP_sum.to(p_dP.dtype.element_ty))
    b_Y_sum = tl.where(m_below, b_Y_sum, 0.0) * b_fk[:, None] * b_fk[None, :]
    b_Y_sum += tl.trans(b_Y_sum)
    tl.store(tile(p_Y, i_norm, BT, BT, o_t, o_t), b_Y_sum.to(p_Y.dtype.element_ty))


@triton.jit
def _dq_kernel(
    desc_q, desc_k, desc_do, desc_ST, desc_dP, p_factors, p_norms, p_chunks, p_dc, p_dq,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (key head, chunk): dq = e^c (do S^T) + dP k, and q's half of rho, q . e^c (do S^T)."""
    i_g, i_chunk = tl.program_id(0), tl.program_id(1)
    i_norm = i_chunk * (H // GROUP) + i_g
    begin, length = load_chunk(p_chunks, i_chunk)
    o_t, o_k = tl.arange(0, BT), tl.arange(0, K)
    b_dq = tl.zeros((BT, K), tl.float32)
    for j in range(GROUP):
        i_h = i_g * GROUP + j
        i_gate = i_chunk * H + i_h
        b_do = desc_do.load([begin, i_h * V])
        b_ST = desc_ST.load([i_gate * V, 0])
        b_read = tl.dot(b_do, b_ST, input_precision=PRECISION) * load_read(p_factors, i_gate, BT)[:, None]
        b_dq += b_read
        # q is loaded for every head again (from L2): held in registers over the loop it would be spilled.
        b_q = desc_q.load([begin, i_g * K]).to(tl.float32)
        _store_dc(p_dc, i_gate, 1, tl.sum(b_q * b_read, 1), BT)
    b_dP = desc_dP.load([i_norm * BT, 0])
    b_k = desc_k.load([begin, i_g * K])
    b_dq = tl.dot(b_dP, b_k, b_dq, input_precision=PRECISION)
    b_q = desc_q.load([begin, i_g * K]).to(tl.float32)
    b_dq = _through_norm(b_dq, b_q, tl.load(p_norms + i_norm.to(tl.int64) * (2 * BT) + o_t))
    store_rows(p_dq + i_g * K, b_dq, begin, length, H // GROUP * K, o_k, BT)


@triton.jit
def _dk_kernel(
    desc_q, desc_k, desc_dv, desc_RT, desc_ST, desc_dST, desc_dP, desc_Y, p_ST, p_dST,
    p_a, p_A_log, p_dt_bias, p_factors, p_carry, p_norms, p_chunks, p_dc, p_dk, p_da, s_a,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (key head, chunk): dk = e^(c_last - c) (R dS'^T) - e^c (dv S^T) + dP^T q + (Y + Y^T) k; and with k's half
    of rho, om = k . e^(c_last - c) (R dS'^T) and e^(c_last) <S, dS'>, also da = -dg exp(A_log) sigmoid(a + dt_bias).
    """
    i_g, i_chunk = tl.program_id(0), tl.program_id(1)
    i_norm = i_chunk * (H // GROUP) + i_g
    begin, length = load_chunk(p_chunks, i_chunk)
    o_t, o_k = tl.arange(0, BT), tl.arange(0, K)
    b_dk = tl.zeros((BT, K), tl.float32)
    for j in range(GROUP):
        i_h = i_g * GROUP + j
        i_gate = i_chunk * H + i_h
        b_dv = desc_dv.load([begin, i_h * V])
        b_ST = desc_ST.load([i_gate * V, 0])
        b_erase = tl.dot(b_dv, b_ST, input_precision=PRECISION) * -load_erase(p_factors, i_gate, BT)[:, None]
        b_dk += b_erase
        b_k = desc_k.load([begin, i_g * K]).to(tl.float32)
        _store_dc(p_dc, i_gate, 2, tl.sum(b_k * b_erase, 1), BT)
    tl.debug_barrier()  # the part of dc written above is read below by other threads of this program
    for j in range(GROUP):
        i_h = i_g * GROUP + j
        i_gate = i_chunk * H + i_h
        # First in the loop, where the fewest other values are in registers.
        dcarry = tl.load(p_carry + i_gate) * _dot_of_states(p_ST, p_dST, i_gate, K, V, BV)
        b_RT = desc_RT.load([i_gate * V, 0])
        b_dST = desc_dST.load([i_gate * V, 0])
        b_write = tl.dot(tl.trans(b_RT), b_dST, input_precision=PRECISION) * load_write(p_factors, i_gate, BT)[:, None]
        b_dk += b_write
        b_k = desc_k.load([begin, i_g * K]).to(tl.float32)
        b_dg = _dg(_load_dc(p_dc, i_gate, BT), tl.sum(b_k * b_write, 1), dcarry, BT)
        m_t, o_row = o_t < length, (begin + o_t).to(tl.int64)
        b_a = tl.load(p_a + o_row * s_a + i_h, mask=m_t, other=0.0).to(tl.float32)
        b_slope = tl.sigmoid(b_a + tl.load(p_dt_bias + i_h).to(tl.float32))
        b_da = -b_dg * tl.exp(tl.load(p_A_log + i_h).to(tl.float32)) * b_slope
        tl.store(p_da + o_row * H + i_h, b_da.to(p_da.dtype.element_ty), mask=m_t)
    b_dP = desc_dP.load([i_norm * BT, 0])
    b_q = desc_q.load([begin, i_g * K])
    b_dk = tl.dot(tl.trans(b_dP), b_q, b_dk, input_precision=PRECISION)
    b_Y = desc_Y.load([i_norm * BT, 0])
    b_k = desc_k.load([begin, i_g * K])
    b_dk = tl.dot(b_Y, b_k, b_dk, input_precision=PRECISION)
    b_dk = _through_norm(b_dk, b_k.to(tl.float32), tl.load(p_norms + i_norm.to(tl.int64) * (2 * BT) + BT + o_t))
    store_rows(p_dk + i_g * K, b_dk, begin, length, H // GROUP * K, o_k, BT)


def recompute(
    k: Tensor, v: Tensor, prepared: Prepared, factors: StateFactors, initial: Tensor | None, checkpoints: Tensor,
    plan: Schedule,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """R^T (NC, H, V, BT) and S^T (NC, H, V, K), the state before every chunk, in v's dtype."""
    (G, K), (H, V), NC = k.shape[1:], v.shape[1:], len(plan.chunks)
    RT = torch.empty(NC, H, V, CHUNK, dtype=v.dtype, device=v.device)
    ST = torch.empty(NC, H, V, K, dtype=v.dtype, device=v.device)
    BV = value_columns(v.dtype, V)
    _recompute_kernel[(V // BV, H, len(plan.segments))](
        *(*descriptors(BV, k=k, v=v), tile_descriptor("M", prepared.M)),
        *(prepared.gates, *factors, initial, checkpoints, plan.segments, RT, ST),
        HAS_INITIAL=initial is not None, H=H, GROUP=H // G, K=K, V=V, BT=CHUNK, BV=BV, PRECISION=precision(v),
        **options("recompute", v.dtype),
    )  # fmt: skip
    return RT, ST


def reverse(
    q: Tensor, k: Tensor, do: Tensor, prepared: Prepared, factors: StateFactors, dfinal: Tensor | None, plan: Schedule,
    initial: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dv (T, H, V), dS^T (NC, H, V, K) of the state after every chunk, and if `initial` that of the initial states."""
    (G, K), (H, V), NC, N = k.shape[1:], do.shape[1:], len(plan.chunks), len(plan.documents)
    dv = torch.empty(do.shape, dtype=do.dtype, device=do.device)
    dST = torch.empty(NC, H, V, K, dtype=do.dtype, device=do.device)
    dinitial = torch.empty(N, H, K, V, dtype=torch.float32, device=do.device) if initial else None
    BV, constants = value_columns(do.dtype, V), options("reverse", do.dtype)
    _reverse_kernel[(V // BV, H, N)](
        *descriptors(BV, q=q, k=k, do=do),
        *(tile_descriptor("M", prepared.M), tile_descriptor("P", prepared.P)),
        *(prepared.gates, *factors, dfinal, plan.documents, dv, dST, dinitial),
        HAS_FINAL=dfinal is not None, STORE_INITIAL=initial,
        H=H, GROUP=H // G, K=K, V=V, BT=CHUNK, BV=BV, STAGES=constants["num_stages"], PRECISION=precision(do),
        **constants,
    )  # fmt: skip
    return dv, dST, dinitial


def gradients(
    q: Tensor, k: Tensor, a: Tensor, A_log: Tensor, dt_bias: Tensor, do: Tensor, dv: Tensor,
    prepared: Prepared, factors: StateFactors, RT: Tensor, ST: Tensor, dST: Tensor, plan: Schedule,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk (T, G, K), da, db (T, H). dv and dS^T come from `reverse`, R^T and S^T from `recompute`."""
    (T, G, K), (H, V), NC = k.shape, do.shape[1:], len(plan.chunks)
    dq, dk = (torch.empty(T, G, K, dtype=k.dtype, device=k.device) for _ in range(2))
    da, db = (torch.empty(T, H, dtype=a.dtype, device=a.device) for _ in range(2))  # a and b share a dtype
    dP, Y = (torch.empty(NC, G, CHUNK, CHUNK, dtype=k.dtype, device=k.device) for _ in range(2))
    dc = torch.empty(NC, H, 3, CHUNK, dtype=torch.float32, device=k.device)
    sizes = {"H": H, "GROUP": H // G, "K": K, "V": V, "BT": CHUNK, "PRECISION": precision(do)}
    desc_q, desc_k, desc_do, desc_dv = descriptors(V, q=q, k=k, do=do, dv=dv)
    tiles = {"P": prepared.P, "RT": RT, "ST": ST, "dST": dST, "dP": dP, "Y": Y}
    desc_P, desc_RT, desc_ST, desc_dST, desc_dP, desc_Y = (tile_descriptor(name, x) for name, x in tiles.items())
    within = options("within", do.dtype)
    _within_kernel[(G, NC)](
        *(desc_k, desc_do, desc_dv, desc_RT, desc_P, prepared.gates, prepared.norms, plan.chunks, dP, Y, dc, db),
        **sizes, STAGES=within["num_stages"], **within,
    )  # fmt: skip
    _dq_kernel[(G, NC)](
        *(desc_q, desc_k, desc_do, desc_ST, desc_dP, factors.rows, prepared.norms, plan.chunks, dc, dq),
        **sizes, **options("dq", do.dtype),
    )  # fmt: skip
    _dk_kernel[(G, NC)](
        *(desc_q, desc_k, desc_dv, desc_RT, desc_ST, desc_dST, desc_dP, desc_Y, ST, dST, a, A_log, dt_bias),
        *(*factors, prepared.norms, plan.chunks, dc, dk, da, a.stride(0)),
        **sizes, BV=value_columns(do.dtype, V), **options("dk", do.dtype),
    )  # fmt: skip
    return dq, dk, da, db
