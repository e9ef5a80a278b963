"""The three backward kernels of the gated delta rule. The factors of the walk come first, as in the forward pass.

    recompute   a program per segment of 16 chunks: R and the state before every chunk, from the saved checkpoints
    reverse     a program per document: walks over the chunks backwards with dS in registers; writes dv, and dS of the
                state after every chunk
    gradients   a program per chunk and key head: dq, dk, da, db, summed over the value heads that share the key head

Equations: kernels/ops/gated_delta_rule.py and docs/gated-delta-rule.md. Sizes and layouts: gated_delta_rule_forward.py.
Between the kernels, for one layer at a time, as the walks have them: R^T (NC, H, V, BT), S^T and dS'^T (NC, H, V, K) in
v's dtype, and dc, one fp32 number for each token and head. S' is the state after the chunk. In names, RT is R^T.
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
    load_last,
    load_norm_factors,
    load_read,
    load_rows,
    load_write,
    options,
    precision,
    store_rows,
    tile,
    tile_descriptor,
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
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
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
    for j in range(count):
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
def _through_norm(b_dn, b_x, b_factor):
    """dx = f (dn - n (n . dn)) for n = f x with f = (|x|^2 + eps)^-1/2 = b_factor: exact with the epsilon."""
    b_dot = tl.sum(b_x * b_dn, 1) * b_factor * b_factor
    return (b_dn - b_x * b_dot[:, None]) * b_factor[:, None]


@triton.jit
def _decay_transposed(b_c, b_fine, inclusive: tl.constexpr, BT: tl.constexpr):
    """D^T: e^(c_u - c_t) in row t and column u for t <= u (t < u if not inclusive), else 0."""
    o_t = tl.arange(0, BT)
    b_exponent = (b_c[None, :] - b_c[:, None]) + (b_fine[None, :] - b_fine[:, None])
    m_upper = o_t[:, None] <= o_t[None, :] if inclusive else o_t[:, None] < o_t[None, :]
    return tl.exp(tl.where(m_upper, b_exponent, float("-inf")))


@triton.jit
def _dc_within(b_X):
    """What X gives to dc: c_t stands with + in the exponents of row t, with - in those of column t."""
    return tl.sum(b_X, 1) - tl.sum(b_X, 0)


@triton.jit
def _state_product(p_ST, p_dST, i_gate, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    """<S, dS'>, in blocks of BV columns."""
    o_k, o_v = tl.arange(0, K), tl.arange(0, BV)
    b_sum = tl.zeros((BV, K), tl.float32)
    for i_v in range(0, V, BV):
        b_ST = tl.load(tile(p_ST, i_gate, V, K, i_v + o_v, o_k)).to(tl.float32)
        b_sum += b_ST * tl.load(tile(p_dST, i_gate, V, K, i_v + o_v, o_k)).to(tl.float32)
    return tl.sum(tl.sum(b_sum, 1), 0)


@triton.jit
def _gradients_kernel(
    p_q, p_k, p_a, p_A_log, p_dt_bias, p_do, p_dv, p_gates, p_norms, p_RT, p_ST, p_dST, p_chunks,
    p_dc, p_dq, p_dk, p_da, p_db, s_q, s_k, s_a,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (key head, chunk): everything local to the chunk, from R, S, dv and dS' (section 3 of the doc).

    With q and k normalised, q scaled, Z = dv R^T, Y = -Z D and X = dP (q k^T) + Y (k k^T), both below the diagonal:

        dq = e^c do S^T + dP k,    dP = (do R^T) D                                       first pass over the heads
        dk = e^(c_last - c) R dS'^T + dP^T q + (Y + Y^T) k - e^c dv S^T                  second pass
        dc = q . (e^c do S^T) - k . (e^c dv S^T) + rowsum X - colsum X
        om = k . (e^(c_last - c) R dS'^T)
        dg_t = sum of dc over u >= t + sum of om over u < t + e^(c_last) <S, dS'>

    p_dc (NC, H, BT) hands dc from the first pass to the second.
    """
    i_g, i_chunk = tl.program_id(0), tl.program_id(1)
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, K), tl.arange(0, BV)
    i_norm = i_chunk * (H // GROUP) + i_g
    p_q += i_g * K
    p_k += i_g * K
    dtype: tl.constexpr = p_RT.dtype.element_ty

    # Two passes over the heads, first dq, then dk, so that only one (BT, K) sum is in registers. q, k and the chunk's
    # place are read again (from L2) where they are used: held in registers over the loop, they would be spilled.
    b_dq = tl.zeros((BT, K), tl.float32)
    for j in range(GROUP):
        i_h = i_g * GROUP + j
        begin, length = load_chunk(p_chunks, i_chunk)
        i_gate = i_chunk * H + i_h
        # Through o = e^c q S: e^c do S^T, and its part of dc.
        b_read = tl.zeros((BT, K), tl.float32)
        for i_v in range(0, V, BV):
            b_do = load_rows(p_do + i_h * V, begin, length, H * V, i_v + o_v, BT)
            b_ST = tl.load(tile(p_ST, i_gate, V, K, i_v + o_v, o_k))
            b_read = tl.dot(b_do, b_ST, b_read, input_precision=PRECISION)
        b_c, b_fine, _ = load_gates(p_gates, i_gate, BT)
        b_fq, b_fk = load_norm_factors(p_norms, i_norm, K, BT)
        b_read *= tl.exp(b_c + b_fine)[:, None]
        b_q = load_rows(p_q, begin, length, s_q, o_k, BT)
        b_dc = b_fq * tl.sum(b_q.to(tl.float32) * b_read, 1)
        b_dq += b_read
        # Through o = P R: dP = (do R^T) D. The factors f_k and f_q of P = f_q f_k (q k^T) D go with columns and rows.
        b_dP = tl.zeros((BT, BT), tl.float32)
        for i_v in range(0, V, BV):
            b_do = load_rows(p_do + i_h * V, begin, length, H * V, i_v + o_v, BT)
            b_RT = tl.load(tile(p_RT, i_gate, V, BT, i_v + o_v, o_t))
            b_dP = tl.dot(b_do, b_RT, b_dP, input_precision=PRECISION)
        b_dP *= decay_between(b_c, b_fine, True, BT) * b_fk[None, :]
        b_q = load_rows(p_q, begin, length, s_q, o_k, BT)
        b_k = load_rows(p_k, begin, length, s_k, o_k, BT)
        b_X = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_dP * b_fq[:, None]
        # Without the diagonal: its exponent is c_t - c_t = 0, and its O(1) values would cancel only up to rounding.
        b_X = tl.where(o_t[:, None] > o_t[None, :], b_X, 0.0)
        tl.store(p_dc + i_gate.to(tl.int64) * BT + o_t, b_dc + _dc_within(b_X))
        b_dq = tl.dot(b_dP.to(dtype), b_k, b_dq, input_precision=PRECISION)
    begin, length = load_chunk(p_chunks, i_chunk)
    # f_q holds the scale K^-1/2, which is no part of the norm: taken out of the factor, and applied to dq.
    b_raw = load_rows(p_q, begin, length, s_q, o_k, BT).to(tl.float32)
    b_fq, _ = load_norm_factors(p_norms, i_norm, K, BT)
    b_dq = _through_norm(b_dq * K**-0.5, b_raw, b_fq * K**0.5)
    store_rows(p_dq + i_g * K, b_dq, begin, length, H // GROUP * K, o_k, BT)
    tl.debug_barrier()  # p_dc, written above, is read below by other threads of this program

    # Second pass: dk, dbeta and the gates.
    b_dk = tl.zeros((BT, K), tl.float32)
    for j in range(GROUP):
        i_h = i_g * GROUP + j
        begin, length = load_chunk(p_chunks, i_chunk)
        i_gate = i_chunk * H + i_h
        m_t, o_row = o_t < length, (begin + o_t).to(tl.int64)
        # Through S' = ... + k^T (e^(c_last - c) R): e^(c_last - c) R dS'^T in b_dk_part. The same loop forms R do^T for
        # dP^T. It is not the transpose of do R^T: a transposed accumulator as an operand gave wrong numbers on Hopper.
        b_dk_part = tl.zeros((BT, K), tl.float32)
        b_tile = tl.zeros((BT, BT), tl.float32)
        for i_v in range(0, V, BV):
            b_RT = tl.load(tile(p_RT, i_gate, V, BT, i_v + o_v, o_t))
            b_do = load_rows(p_do + i_h * V, begin, length, H * V, i_v + o_v, BT)
            b_tile = tl.dot(tl.trans(b_RT), tl.trans(b_do), b_tile, input_precision=PRECISION)
            b_dST = tl.load(tile(p_dST, i_gate, V, K, i_v + o_v, o_k))
            b_dk_part = tl.dot(tl.trans(b_RT), b_dST, b_dk_part, input_precision=PRECISION)
        b_c, b_fine, b_beta = load_gates(p_gates, i_gate, BT)
        b_fq, b_fk = load_norm_factors(p_norms, i_norm, K, BT)
        last, last_fine = load_last(p_gates, i_gate, BT)
        b_dk_part *= tl.exp((last - b_c) + (last_fine - b_fine))[:, None]
        b_k = load_rows(p_k, begin, length, s_k, o_k, BT)
        # om is no part of dc: it acts on the g of later tokens, as c_last - c_t is their sum.
        b_om = b_fk * tl.sum(b_k.to(tl.float32) * b_dk_part, 1)
        b_dk += b_dk_part
        # Through P: (R do^T) D^T times the scaled q. The rows of this tile are the earlier tokens, so D is transposed.
        b_tile *= _decay_transposed(b_c, b_fine, True, BT) * b_fq[None, :]
        b_q = load_rows(p_q, begin, length, s_q, o_k, BT)
        b_dk = tl.dot(b_tile.to(dtype), b_q, b_dk, input_precision=PRECISION)

        # Through L: Z = dv R^T, and Z^T as a product of its own. Y comes from below the diagonal of Z, dbeta from the
        # diagonal.
        b_tile = tl.zeros((BT, BT), tl.float32)
        b_transposed = tl.zeros((BT, BT), tl.float32)
        for i_v in range(0, V, BV):
            b_dv = load_rows(p_dv + i_h * V, begin, length, H * V, i_v + o_v, BT)
            b_RT = tl.load(tile(p_RT, i_gate, V, BT, i_v + o_v, o_t))
            b_tile = tl.dot(b_dv, b_RT, b_tile, input_precision=PRECISION)
            b_transposed = tl.dot(tl.trans(b_RT), tl.trans(b_dv), b_transposed, input_precision=PRECISION)
        # db = (1 - beta) / beta diag(Z). 1e-30: beta = sigmoid(b) may underflow to 0, and then Z is 0 as well.
        b_dbeta = tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_tile, 0.0), 1) / tl.maximum(b_beta, 1e-30)
        p_b = p_db + o_row * H + i_h
        tl.store(p_b, ((1.0 - b_beta) * b_dbeta).to(p_db.dtype.element_ty), mask=m_t)
        b_tile *= -decay_between(b_c, b_fine, False, BT) * b_fk[None, :]
        b_k = load_rows(p_k, begin, length, s_k, o_k, BT)
        # The other half of X, Y (k k^T), and with it what is left of dc within the chunk.
        b_X = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b_tile * b_fk[:, None]
        b_dc = tl.load(p_dc + i_gate.to(tl.int64) * BT + o_t) + _dc_within(b_X)
        # Y^T lies above the diagonal: from Z^T and D^T. Then (Y + Y^T) k in one product.
        b_tile -= b_transposed * (_decay_transposed(b_c, b_fine, False, BT) * b_fk[None, :])
        b_dk = tl.dot(b_tile.to(dtype), b_k, b_dk, input_precision=PRECISION)

        # Through E = beta (v - e^c k S): -e^c dv S^T.
        b_dk_part = tl.zeros((BT, K), tl.float32)
        for i_v in range(0, V, BV):
            b_dv = load_rows(p_dv + i_h * V, begin, length, H * V, i_v + o_v, BT)
            b_ST = tl.load(tile(p_ST, i_gate, V, K, i_v + o_v, o_k))
            b_dk_part = tl.dot(b_dv, b_ST, b_dk_part, input_precision=PRECISION)
        b_dk_part *= -tl.exp(b_c + b_fine)[:, None]
        b_k = load_rows(p_k, begin, length, s_k, o_k, BT)
        b_dc += b_fk * tl.sum(b_k.to(tl.float32) * b_dk_part, 1)
        b_dk += b_dk_part

        # c_u contains g_t for u >= t, and c_last - c_u contains it for u < t. The sum of om must not be computed as all
        # om minus those of u >= t: om of the last token stays of order 1 under strong decay, and its rounding error
        # would be larger than all the others.
        b_dg = tl.sum(tl.where(o_t[None, :] >= o_t[:, None], b_dc[None, :], b_om[None, :]), 1)
        # e^(c_last) <S, dS'>, because c_last contains every g of the chunk. In half blocks, which need fewer registers.
        b_dg += tl.exp(last + last_fine) * _state_product(p_ST, p_dST, i_gate, K, V, BV // 2)
        b_a = tl.load(p_a + o_row * s_a + i_h, mask=m_t, other=0.0).to(tl.float32)
        # da = -dg exp(A_log) sigmoid(a + dt_bias), as g = -exp(A_log) softplus(a + dt_bias).
        b_slope = tl.sigmoid(b_a + tl.load(p_dt_bias + i_h).to(tl.float32))
        b_da = -b_dg * tl.exp(tl.load(p_A_log + i_h).to(tl.float32)) * b_slope
        tl.store(p_da + o_row * H + i_h, b_da.to(p_da.dtype.element_ty), mask=m_t)
    begin, length = load_chunk(p_chunks, i_chunk)
    b_raw = load_rows(p_k, begin, length, s_k, o_k, BT).to(tl.float32)
    _, b_fk = load_norm_factors(p_norms, i_norm, K, BT)
    store_rows(p_dk + i_g * K, _through_norm(b_dk, b_raw, b_fk), begin, length, H // GROUP * K, o_k, BT)


def recompute(
    k: Tensor, v: Tensor, prepared: Prepared, factors: StateFactors, initial: Tensor | None, checkpoints: Tensor,
    plan: Schedule,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """R^T (NC, H, V, BT) and S^T (NC, H, V, K), the state before every chunk, in v's dtype."""
    (G, K), (H, V), NC = k.shape[1:], v.shape[1:], len(plan.chunks)
    RT = torch.empty(NC, H, V, CHUNK, dtype=v.dtype, device=v.device)
    ST = torch.empty(NC, H, V, K, dtype=v.dtype, device=v.device)
    constants = options("recompute", v.dtype, V)
    _recompute_kernel[(V // constants["BV"], H, len(plan.segments))](
        *(*descriptors(constants["BV"], k=k, v=v), tile_descriptor("M", prepared.M)),
        *(prepared.gates, *factors, initial, checkpoints, plan.segments, RT, ST),
        HAS_INITIAL=initial is not None, H=H, GROUP=H // G, K=K, V=V, BT=CHUNK, PRECISION=precision(v),
        **constants,
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
    constants = options("reverse", do.dtype, V)
    _reverse_kernel[(V // constants["BV"], H, N)](
        *descriptors(constants["BV"], q=q, k=k, do=do),
        *(tile_descriptor("M", prepared.M), tile_descriptor("P", prepared.P)),
        *(prepared.gates, *factors, dfinal, plan.documents, dv, dST, dinitial),
        HAS_FINAL=dfinal is not None, STORE_INITIAL=initial,
        H=H, GROUP=H // G, K=K, V=V, BT=CHUNK, PRECISION=precision(do), **constants,
    )  # fmt: skip
    return dv, dST, dinitial


def gradients(
    q: Tensor, k: Tensor, a: Tensor, A_log: Tensor, dt_bias: Tensor, do: Tensor, dv: Tensor,
    prepared: Prepared, RT: Tensor, ST: Tensor, dST: Tensor, plan: Schedule,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk (T, G, K), da, db (T, H). dv and dS^T come from `reverse`, R^T and S^T from `recompute`."""
    (T, G, K), (H, V), NC = k.shape, do.shape[1:], len(plan.chunks)
    dq, dk = (torch.empty(T, G, K, dtype=k.dtype, device=k.device) for _ in range(2))
    da, db = (torch.empty(T, H, dtype=a.dtype, device=a.device) for _ in range(2))  # a and b share a dtype
    dc = torch.empty(NC, H, CHUNK, dtype=torch.float32, device=k.device)
    constants = options("gradients", do.dtype, V)
    _gradients_kernel[(G, NC)](
        *(q, k, a, A_log, dt_bias, do, dv, prepared.gates, prepared.norms, RT, ST, dST, plan.chunks),
        *(dc, dq, dk, da, db),
        *(q.stride(0), k.stride(0), a.stride(0)),
        H=H, GROUP=H // G, K=K, V=V, BT=CHUNK, PRECISION=precision(do), **constants,
    )  # fmt: skip
    return dq, dk, da, db
