"""The two forward kernels of the gated delta rule, and the schedule that all its kernels share.

    prepare   one program per chunk and value head: gates, norms, M and P
    states    one program per document, value head and block of dv: walks the chunks with the state in registers

Equations and names: gated_delta_rule.py. Sizes: T tokens, NC chunks of BT = 64 tokens (none crosses a document), Hk
key heads, H value heads, GROUP = H / Hk, DK and DV head sizes, BV columns of v and the state per program.

Per chunk the kernels exchange, in fp32, `gates (NC, H, 3, BT)`: c in two parts and beta, `norms (NC, Hk, 2, BT)`: r_q
and r_k; and in v's dtype `M, P (NC, H, BT, BT)`. Rows past the end of a document hold c = its last value, beta = r_q =
r_k = 0, rows of the identity in M and zero in P: the following kernels need no mask for them. (A c that were zero there
would give e^(c_t - c_s) = inf and inf * 0 = NaN under strong decay.)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.documents import Documents
from kernels.ops._triton import tl, triton

CHUNK = 64
L2_EPS = 1e-6
SEGMENT = 16  # chunks between two saved states


class Schedule(NamedTuple):
    """Who works on what. int32 tables on the device; the longest come first, so that no long one starts last."""

    chunks: Tensor  # (NC, 2): first token, tokens
    documents: Tensor  # (n, 5): document, first token, tokens, first chunk, its first checkpoint
    segments: Tensor  # (ns, 5): document, first token, tokens, first chunk, checkpoint (-1: the initial state)
    checkpoints: int  # saved states: one before every 16th chunk of a document but the first


def schedule(documents: Documents) -> Schedule:
    """The tables of a packed batch, built on the host once and shared by all layers."""
    return documents.table("delta rule schedule", _build_schedule)


def _build_schedule(documents: Documents) -> Schedule:
    chunks, rows, segments = [], [], []
    saved = 0
    for i, (begin, length) in enumerate(zip(documents.bounds[:-1], documents.lengths, strict=True)):
        rows.append((i, begin, length, len(chunks), saved))
        for offset in range(0, length, CHUNK * SEGMENT):
            tokens = min(CHUNK * SEGMENT, length - offset)
            checkpoint = saved + offset // (CHUNK * SEGMENT) - 1 if offset else -1
            segments.append((i, begin + offset, tokens, len(chunks) + offset // CHUNK, checkpoint))
        saved += -(-length // (CHUNK * SEGMENT)) - 1
        chunks += [(begin + offset, min(CHUNK, length - offset)) for offset in range(0, length, CHUNK)]

    def table(rows: list[tuple[int, ...]]) -> Tensor:
        return documents.to_device(torch.tensor(rows, dtype=torch.int32))

    by_length = [sorted(rows, key=lambda row: -row[2]) for rows in (rows, segments)]
    return Schedule(table(chunks), table(by_length[0]), table(by_length[1]), saved)


@triton.jit
def _log1p_exp(b_x):
    """log(1 + e^x). The hardware's log is not accurate near 1, so: log(1 + y) = 2 artanh(y / (2 + y)), y <= 1."""
    b_y = tl.exp(-tl.abs(b_x))
    b_r = b_y / (2.0 + b_y)
    b_s = b_r * b_r
    b_p = 1.0 / 17
    b_p = b_p * b_s + 1.0 / 15
    b_p = b_p * b_s + 1.0 / 13
    b_p = b_p * b_s + 1.0 / 11
    b_p = b_p * b_s + 1.0 / 9
    b_p = b_p * b_s + 1.0 / 7
    b_p = b_p * b_s + 1.0 / 5
    b_p = b_p * b_s + 1.0 / 3
    return tl.maximum(b_x, 0.0) + 2.0 * (b_r + b_r * b_s * b_p)


@triton.jit
def log_decay(b_a, A_log, dt_bias):
    return -tl.exp(A_log.to(tl.float32)) * _log1p_exp(b_a.to(tl.float32) + dt_bias.to(tl.float32))


@triton.jit
def load_chunk(p_chunks, i_chunk):
    """A chunk's first token and its number of tokens."""
    return tl.load(p_chunks + i_chunk * 2), tl.load(p_chunks + i_chunk * 2 + 1)


@triton.jit
def load_gates(p_gates, i_gate, BT: tl.constexpr):
    """c as its coarse and its fine part, and beta, (BT,) each."""
    p = p_gates + i_gate.to(tl.int64) * (3 * BT) + tl.arange(0, BT)
    return tl.load(p), tl.load(p + BT), tl.load(p + 2 * BT)


@triton.jit
def load_factors(p_norms, i_norm, DK: tl.constexpr, BT: tl.constexpr):
    """f_q = r_q dk^-1/2 and f_k = r_k, (BT,) each."""
    p = p_norms + i_norm.to(tl.int64) * (2 * BT) + tl.arange(0, BT)
    return tl.load(p) * DK**-0.5, tl.load(p + BT)


@triton.jit
def load_last(p_gates, i_gate, BT: tl.constexpr):
    """The coarse and the fine part of c at the chunk's end."""
    p = p_gates + i_gate.to(tl.int64) * (3 * BT) + BT - 1
    return tl.load(p), tl.load(p + BT)


@triton.jit
def decay_between(b_c, b_fine, inclusive: tl.constexpr, BT: tl.constexpr):
    """D_ts = e^(c_t - c_s) for s <= t (s < t if not inclusive), else 0. -inf before exp: c_t - c_s > 0 above."""
    o_t = tl.arange(0, BT)
    b_x = (b_c[:, None] - b_c[None, :]) + (b_fine[:, None] - b_fine[None, :])
    m_x = o_t[:, None] >= o_t[None, :] if inclusive else o_t[:, None] > o_t[None, :]
    return tl.exp(tl.where(m_x, b_x, float("-inf")))


@triton.jit
def load_rows(p_x, begin, length, stride, o_d, BT: tl.constexpr):
    """(BT, D) rows of a token tensor; zero past `length`. stride in elements, o_d the columns."""
    o_t = tl.arange(0, BT)
    p = p_x + (begin + o_t).to(tl.int64)[:, None] * stride + o_d[None, :]
    return tl.load(p, mask=o_t[:, None] < length, other=0.0)


@triton.jit
def store_rows(p_x, b_x, begin, length, stride, o_d, BT: tl.constexpr):
    """The counterpart of load_rows; nothing past `length` is written."""
    o_t = tl.arange(0, BT)
    p = p_x + (begin + o_t).to(tl.int64)[:, None] * stride + o_d[None, :]
    tl.store(p, b_x.to(p_x.dtype.element_ty), mask=o_t[:, None] < length)


@triton.jit
def tile(p_x, i_tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, o_r, o_c):
    """Pointers to rows o_r and columns o_c of the contiguous tile number i_tile."""
    return p_x + i_tile.to(tl.int64) * (ROWS * COLUMNS) + o_r[:, None] * COLUMNS + o_c[None, :]


@triton.jit
def _invert(b_L, PRECISION: tl.constexpr):
    """(I + L)^-1 of a strictly lower (64, 64) L.

    The four 16 x 16 diagonal blocks by elimination, together, in fp32. Then, with X those inverses and B = X L_off,
    (I + B)^-1 X = (I - B)(I + B^2) X, exact because B^4 = 0. (The same series over 64 rows would cancel: its powers
    grow binomially when keys repeat, while the entries of the inverse stay <= 1.)
    """
    o_b, o_i = tl.arange(0, 4), tl.arange(0, 16)
    m_diagonal = o_b[:, None, None, None] == o_b[None, None, :, None]
    b_blocks = tl.sum(tl.where(m_diagonal, tl.reshape(b_L, (4, 16, 4, 16)), 0.0), 2)
    b_X = tl.where(o_i[:, None] == o_i[None, :], 1.0, 0.0)[None, :, :] + tl.zeros((4, 16, 16), tl.float32)
    for i in tl.static_range(15):
        b_column = tl.sum(tl.where(o_i[None, None, :] == i, b_blocks, 0.0), 2)
        b_row = tl.sum(tl.where(o_i[None, :, None] == i, b_X, 0.0), 1)
        b_X -= b_column[:, :, None] * b_row[:, None, :]
    b_X = tl.reshape(tl.where(m_diagonal, b_X[:, :, None, :], 0.0), (64, 64))
    o_t = tl.arange(0, 64)
    b_L = tl.where(o_t[:, None] // 16 == o_t[None, :] // 16, 0.0, b_L)
    b_B = tl.dot(b_X, b_L, input_precision=PRECISION)
    b_B2 = tl.dot(b_B, b_B, input_precision=PRECISION)
    b_X += tl.dot(b_B2, b_X, input_precision=PRECISION)
    return b_X - tl.dot(b_B, b_X, input_precision=PRECISION)


@triton.jit
def _prepare_kernel(
    p_q,
    p_k,
    p_a,
    p_b,
    p_A_log,
    p_dt_bias,
    p_chunks,
    p_gates,
    p_norms,
    p_M,
    p_P,
    s_q,
    s_k,
    s_a,
    s_b,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    BT: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_h, i_chunk = tl.program_id(0), tl.program_id(1)
    i_hk = i_h // GROUP
    begin, length = load_chunk(p_chunks, i_chunk)
    o_t, o_k = tl.arange(0, BT), tl.arange(0, DK)
    m_t = o_t < length
    o_row = (begin + o_t).to(tl.int64)

    # c = cumsum(g) reaches -1e3 under strong decay, where fp32 resolves 1e-4: too coarse for e^(c_t - c_s). So g is cut
    # into a multiple of 2^-8, summed without any rounding, and a remainder whose sum stays small.
    b_a = tl.load(p_a + o_row * s_a + i_h, mask=m_t, other=0.0)
    b_g = tl.where(m_t, log_decay(b_a, tl.load(p_A_log + i_h), tl.load(p_dt_bias + i_h)), 0.0)
    b_coarse = tl.floor(b_g * 256.0) * 0.00390625
    b_c, b_fine = tl.cumsum(b_coarse, 0), tl.cumsum(b_g - b_coarse, 0)
    b_b = tl.load(p_b + o_row * s_b + i_h, mask=m_t, other=0.0).to(tl.float32)
    b_beta = tl.where(m_t, tl.sigmoid(b_b), 0.0)
    i_gate = i_chunk * H + i_h
    p_gate = p_gates + i_gate.to(tl.int64) * (3 * BT) + o_t
    tl.store(p_gate, b_c)
    tl.store(p_gate + BT, b_fine)
    tl.store(p_gate + 2 * BT, b_beta)

    b_k = load_rows(p_k + i_hk * DK, begin, length, s_k, o_k, BT)
    b_q = load_rows(p_q + i_hk * DK, begin, length, s_q, o_k, BT)
    b_kf, b_qf = b_k.to(tl.float32), b_q.to(tl.float32)
    b_rk = tl.where(m_t, tl.rsqrt(tl.sum(b_kf * b_kf, 1) + EPS), 0.0)
    b_rq = tl.where(m_t, tl.rsqrt(tl.sum(b_qf * b_qf, 1) + EPS), 0.0)
    if i_h % GROUP == 0:
        p_norm = p_norms + (i_chunk * (H // GROUP) + i_hk).to(tl.int64) * (2 * BT) + o_t
        tl.store(p_norm, b_rq)
        tl.store(p_norm + BT, b_rk)

    b_D = decay_between(b_c, b_fine, True, BT) * b_rk[None, :]
    b_P = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_D * (b_rq * DK**-0.5)[:, None]
    tl.store(tile(p_P, i_gate, BT, BT, o_t, o_t), b_P.to(p_P.dtype.element_ty))
    b_L = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b_D * (b_beta * b_rk)[:, None]
    b_M = _invert(tl.where(o_t[:, None] > o_t[None, :], b_L, 0.0), PRECISION)
    tl.store(tile(p_M, i_gate, BT, BT, o_t, o_t), b_M.to(p_M.dtype.element_ty))


@triton.jit
def _states_kernel(
    p_q,
    p_k,
    p_v,
    p_gates,
    p_norms,
    p_M,
    p_P,
    p_initial,
    p_documents,
    p_o,
    p_final,
    p_checkpoints,
    s_q,
    s_k,
    s_v,
    HAS_INITIAL: tl.constexpr,
    STORE_FINAL: tl.constexpr,
    STORE_CHECKPOINTS: tl.constexpr,
    SEGMENT: tl.constexpr,
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
    first_chunk, first_checkpoint = tl.load(p_row + 3), tl.load(p_row + 4)
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, DK), i_v * BV + tl.arange(0, BV)
    dtype: tl.constexpr = p_o.dtype.element_ty

    b_S = tl.zeros((DK, BV), tl.float32)
    if HAS_INITIAL:
        b_S += tl.load(tile(p_initial, i_document * H + i_h, DK, DV, o_k, o_v)).to(tl.float32)
    for i in range(tl.cdiv(length, BT)):
        if STORE_CHECKPOINTS:  # noqa: SIM102  a constant alone, so that the branch is compiled only where it is needed
            if (i % SEGMENT == 0) & (i > 0):
                i_checkpoint = first_checkpoint + i // SEGMENT - 1
                tl.store(tile(p_checkpoints, i_checkpoint * H + i_h, DK, DV, o_k, o_v), b_S)
        i_gate = (first_chunk + i) * H + i_h
        at, left = begin + i * BT, length - i * BT
        b_c, b_fine, b_beta = load_gates(p_gates, i_gate, BT)
        b_fq, b_fk = load_factors(p_norms, (first_chunk + i) * (H // GROUP) + i_hk, DK, BT)
        last, last_fine = load_last(p_gates, i_gate, BT)
        b_decay = tl.exp(b_c + b_fine)
        b_k = load_rows(p_k + i_hk * DK, at, left, s_k, o_k, BT)
        b_q = load_rows(p_q + i_hk * DK, at, left, s_q, o_k, BT)
        b_v = load_rows(p_v + i_h * DV, at, left, s_v, o_v, BT)
        b_M = tl.load(tile(p_M, i_gate, BT, BT, o_t, o_t))
        b_P = tl.load(tile(p_P, i_gate, BT, BT, o_t, o_t))

        b_s = b_S.to(dtype)
        b_E = tl.dot(b_k, b_s, input_precision=PRECISION)
        b_E = b_beta[:, None] * (b_v.to(tl.float32) - (b_decay * b_fk)[:, None] * b_E)
        b_R = tl.dot(b_M, b_E.to(dtype), input_precision=PRECISION)
        b_o = tl.dot(b_q, b_s, input_precision=PRECISION) * (b_decay * b_fq)[:, None]
        b_o = tl.dot(b_P, b_R.to(dtype), b_o, input_precision=PRECISION)
        store_rows(p_o + i_h * DV, b_o, at, left, H * DV, o_v, BT)
        b_R *= (tl.exp((last - b_c) + (last_fine - b_fine)) * b_fk)[:, None]
        b_S *= tl.exp(last + last_fine)
        b_S = tl.dot(tl.trans(b_k), b_R.to(dtype), b_S, input_precision=PRECISION)
    if STORE_FINAL:
        tl.store(tile(p_final, i_document * H + i_h, DK, DV, o_k, o_v), b_S)


def precision(x: Tensor) -> str:
    """fp32 inputs are multiplied in fp32; beside bf16 operands, TF32 in the inverse is no coarser than rounding M."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def options(kernel: str, dtype: torch.dtype, dv: int) -> dict[str, int]:
    """Block width, warps and stages of a kernel: those whose compilation for sm_90 fits (see `compile_specs`)."""
    if dtype == torch.float32:
        return {"BV": min(dv, 32), "num_warps": 8, "num_stages": 1}
    warps, stages = {"states": (8, 2), "recompute": (4, 2), "reverse": (8, 2), "gradients": (8, 1)}[kernel]
    return {"BV": min(dv, 64), "num_warps": warps, "num_stages": stages}


class Prepared(NamedTuple):
    """What a chunk needs before any state is known; saved for the backward pass."""

    gates: Tensor
    norms: Tensor
    M: Tensor
    P: Tensor


def prepare(q: Tensor, k: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, plan: Schedule) -> Prepared:
    (Hk, dk), H, NC = k.shape[1:], a.shape[1], len(plan.chunks)
    gates = torch.empty(NC, H, 3, CHUNK, dtype=torch.float32, device=k.device)
    norms = torch.empty(NC, Hk, 2, CHUNK, dtype=torch.float32, device=k.device)
    M, P = (torch.empty(NC, H, CHUNK, CHUNK, dtype=k.dtype, device=k.device) for _ in range(2))
    _prepare_kernel[(H, NC)](
        *(q, k, a, b, A_log, dt_bias, plan.chunks, gates, norms, M, P),
        *(x.stride(0) for x in (q, k, a, b)),
        H=H, GROUP=H // Hk, DK=dk, BT=CHUNK, EPS=L2_EPS, PRECISION=precision(k), num_warps=4, num_stages=1,
    )  # fmt: skip
    return Prepared(gates, norms, M, P)


def states(
    q: Tensor, k: Tensor, v: Tensor, x: Prepared, initial: Tensor | None, plan: Schedule, final: bool, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """o (T, H, dv), the final states (n, H, dk, dv) if `final`, the checkpoints (., H, dk, dv) if `save`."""
    (Hk, dk), (H, dv), n = k.shape[1:], v.shape[1:], len(plan.documents)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    S_final = torch.empty(n, H, dk, dv, dtype=torch.float32, device=v.device) if final else None
    checkpoints = torch.empty(plan.checkpoints, H, dk, dv, dtype=torch.float32, device=v.device) if save else None
    how = options("states", v.dtype, dv)
    _states_kernel[(dv // how["BV"], H, n)](
        *(q, k, v, *x, initial, plan.documents, o, S_final, checkpoints),
        *(t.stride(0) for t in (q, k, v)),
        HAS_INITIAL=initial is not None, STORE_FINAL=final, STORE_CHECKPOINTS=save and plan.checkpoints > 0,
        SEGMENT=SEGMENT, H=H, GROUP=H // Hk, DK=dk, DV=dv, BT=CHUNK, PRECISION=precision(v), **how,
    )  # fmt: skip
    return o, S_final, checkpoints
