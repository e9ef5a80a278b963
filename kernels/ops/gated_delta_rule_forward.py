"""The three forward kernels of the gated delta rule, and the schedule that all its kernels share.

    prepare   a program per chunk and value head: gates, norms, M and P
    factors   a program per chunk and value head: the factors with which the walks read, erase and write
    states    a program per document, value head and BV columns of v: walks over the chunks with the state in registers

Equations and matrices: gated_delta_rule.py. Sizes: kernels/ops/__init__.py; BT = 64 tokens.

The kernels pass on for each chunk, in fp32, `gates (NC, H, 3, BT)`: the coarse and the fine part of c, and beta;
`norms (NC, G, 2, BT)`: 1/|q| and 1/|k|; and in v's dtype `M, P (NC, H, BT, BT)`. The walks (states, recompute, reverse)
read `factors (NC, H, 3, BT)`: e^c f_q, e^c f_k and e^(c_last - c) f_k, with which q and k read, erase and write; and
`carry (NC, H)`: e^(c_last).

The walks hold the state transposed, S^T (V, K), and compute everything transposed: E^T, R^T, o^T. Then the left operand
of every product is what the product before it left in registers. Untransposed it would be the right operand, which
tensor cores read from shared memory only: each chunk would write the state there, wait, and read it.

A chunk at a document's end may have rows without a token. They hold c = the last valid c, beta = 1/|q| = 1/|k| = 0,
rows of the identity in M and zeros in P, so the later kernels need no mask for them. (With c = 0 there, e^(c_t - c_s)
would be inf under strong decay, and inf * 0 = NaN.) TMA reads the next document's rows in their place: finite numbers
that are multiplied by these zeros.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.documents import Documents
from kernels.ops._launch import tma, tma_reads
from kernels.ops._triton import TensorDescriptor, tl, triton

CHUNK = 64
L2_EPS = 1e-6
SEGMENT = 16  # chunks between two saved states: 1,024 tokens


class Schedule(NamedTuple):
    """Which program works on what: int32 tables on the device. Long documents come first: one that started last would
    run alone at the end.
    """

    chunks: Tensor  # (NC, 2): first token, tokens
    documents: Tensor  # (N, 5): document, first token, tokens, first chunk, first checkpoint
    segments: Tensor  # (segments, 5): document, first token, tokens, first chunk, checkpoint (-1: the initial state)
    checkpoints: int  # number of saved states: one before every 16th chunk of a document, except its first


def schedule(documents: Documents) -> Schedule:
    """The tables of a packed batch, built on the host once and shared by all layers."""
    return documents.table("delta rule schedule", _build_schedule)


def _build_schedule(documents: Documents) -> Schedule:
    chunks, document_rows, segments = [], [], []
    checkpoints = 0
    for i, (begin, length) in enumerate(zip(documents.bounds[:-1], documents.lengths, strict=True)):
        document_rows.append((i, begin, length, len(chunks), checkpoints))
        for offset in range(0, length, CHUNK * SEGMENT):
            tokens = min(CHUNK * SEGMENT, length - offset)
            # A document's first segment starts from its initial state, so it has no checkpoint.
            checkpoint = checkpoints + offset // (CHUNK * SEGMENT) - 1 if offset else -1
            segments.append((i, begin + offset, tokens, len(chunks) + offset // CHUNK, checkpoint))
        checkpoints += -(-length // (CHUNK * SEGMENT)) - 1
        chunks += [(begin + offset, min(CHUNK, length - offset)) for offset in range(0, length, CHUNK)]

    def table(rows: list[tuple[int, ...]]) -> Tensor:
        return documents.to_device(torch.tensor(rows, dtype=torch.int32))

    longest_first = [sorted(rows, key=lambda row: -row[2]) for rows in (document_rows, segments)]
    return Schedule(table(chunks), table(longest_first[0]), table(longest_first[1]), checkpoints)


@triton.jit
def _log1p_exp(b_x):
    """softplus(x) = log(1 + e^x) = max(x, 0) + log(1 + y) with y = e^-|x| <= 1."""
    # The hardware's log is inaccurate near 1, so log(1 + y) = 2 artanh(z) = 2 (z + z^3/3 + ... + z^17/17) with
    # z = y / (2 + y) <= 1/3: exact to fp32.
    b_y = tl.exp(-tl.abs(b_x))
    b_z = b_y / (2.0 + b_y)
    b_z2 = b_z * b_z
    b_series = 1.0 / 17
    b_series = b_series * b_z2 + 1.0 / 15
    b_series = b_series * b_z2 + 1.0 / 13
    b_series = b_series * b_z2 + 1.0 / 11
    b_series = b_series * b_z2 + 1.0 / 9
    b_series = b_series * b_z2 + 1.0 / 7
    b_series = b_series * b_z2 + 1.0 / 5
    b_series = b_series * b_z2 + 1.0 / 3
    return tl.maximum(b_x, 0.0) + 2.0 * (b_z + b_z * b_z2 * b_series)


@triton.jit
def log_decay(b_a, A_log, dt_bias):
    """g = -exp(A_log) softplus(a + dt_bias), in fp32."""
    return -tl.exp(A_log.to(tl.float32)) * _log1p_exp(b_a.to(tl.float32) + dt_bias.to(tl.float32))


@triton.jit
def load_chunk(p_chunks, i_chunk):
    """The first token of a chunk and its number of tokens."""
    return tl.load(p_chunks + i_chunk * 2), tl.load(p_chunks + i_chunk * 2 + 1)


@triton.jit
def load_gates(p_gates, i_gate, BT: tl.constexpr):
    """The coarse and the fine part of c, and beta, (BT,) each. i_gate = i_chunk * H + i_h."""
    p = p_gates + i_gate.to(tl.int64) * (3 * BT) + tl.arange(0, BT)
    return tl.load(p), tl.load(p + BT), tl.load(p + 2 * BT)


@triton.jit
def load_beta(p_gates, i_gate, BT: tl.constexpr):
    """beta (BT,)."""
    return tl.load(p_gates + i_gate.to(tl.int64) * (3 * BT) + 2 * BT + tl.arange(0, BT))


@triton.jit
def load_norm_factors(p_norms, i_norm, K: tl.constexpr, BT: tl.constexpr):
    """f_q = K^-1/2 / |q| and f_k = 1 / |k|, (BT,) each. i_norm = i_chunk * G + i_g."""
    p = p_norms + i_norm.to(tl.int64) * (2 * BT) + tl.arange(0, BT)
    return tl.load(p) * K**-0.5, tl.load(p + BT)


@triton.jit
def load_last(p_gates, i_gate, BT: tl.constexpr):
    """The coarse and the fine part of c at the chunk's last row."""
    p = p_gates + i_gate.to(tl.int64) * (3 * BT) + BT - 1
    return tl.load(p), tl.load(p + BT)


@triton.jit
def load_read(p_factors, i_gate, BT: tl.constexpr):
    """e^c f_q (BT,): the factors with which q reads the state."""
    return tl.load(p_factors + i_gate.to(tl.int64) * (3 * BT) + tl.arange(0, BT))


@triton.jit
def load_erase(p_factors, i_gate, BT: tl.constexpr):
    """e^c f_k (BT,): the factors with which k reads what the state already holds."""
    return load_read(p_factors + BT, i_gate, BT)


@triton.jit
def load_write(p_factors, i_gate, BT: tl.constexpr):
    """e^(c_last - c) f_k (BT,): the factors with which k writes into the state."""
    return load_read(p_factors + 2 * BT, i_gate, BT)


@triton.jit
def decay_between(b_c, b_fine, inclusive: tl.constexpr, BT: tl.constexpr):
    """D_ts = e^(c_t - c_s) for s <= t (s < t if not inclusive), else 0."""
    o_t = tl.arange(0, BT)
    # Part by part: the coarse differences are exact, so that no digit of the fine ones is lost.
    b_exponent = (b_c[:, None] - b_c[None, :]) + (b_fine[:, None] - b_fine[None, :])
    m_lower = o_t[:, None] >= o_t[None, :] if inclusive else o_t[:, None] > o_t[None, :]
    # Masked before exp: above the diagonal the exponent is positive and exp may overflow.
    return tl.exp(tl.where(m_lower, b_exponent, float("-inf")))


@triton.jit
def load_rows(p_x, begin, length, stride, o_d, BT: tl.constexpr):
    """Columns o_d of BT rows of a token tensor; zeros from row `length` on. `stride`: elements from row to row."""
    o_t = tl.arange(0, BT)
    p = p_x + (begin + o_t).to(tl.int64)[:, None] * stride + o_d[None, :]
    return tl.load(p, mask=o_t[:, None] < length, other=0.0)


@triton.jit
def store_rows(p_x, b_x, begin, length, stride, o_d, BT: tl.constexpr):
    """The counterpart of load_rows; rows from `length` on are not written, they may be the next document's."""
    o_t = tl.arange(0, BT)
    p = p_x + (begin + o_t).to(tl.int64)[:, None] * stride + o_d[None, :]
    tl.store(p, b_x.to(p_x.dtype.element_ty), mask=o_t[:, None] < length)


@triton.jit
def tile(p_x, i_tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, o_r, o_c):
    """Pointers to rows o_r and columns o_c of tile number i_tile of a contiguous (tiles, ROWS, COLUMNS)."""
    return p_x + i_tile.to(tl.int64) * (ROWS * COLUMNS) + o_r[:, None] * COLUMNS + o_c[None, :]


@triton.jit
def _invert(b_L, PRECISION: tl.constexpr):
    """(I + L)^-1 of a strictly lower (64, 64) L.

    The four 16 x 16 blocks on the diagonal are inverted by elimination, all at once, in fp32: X. With W = X L_off,
    where L_off is L without these blocks, (I + L)^-1 = (I + W)^-1 X = (I - W)(I + W^2) X: exact, because W^4 = 0.
    """
    # The same series over all 64 rows would be exact, too, but cancel: when keys repeat, its powers grow like binomial
    # coefficients, while the entries of the inverse stay <= 1.
    o_b, o_i = tl.arange(0, 4), tl.arange(0, 16)
    m_diagonal = o_b[:, None, None, None] == o_b[None, None, :, None]
    b_blocks = tl.sum(tl.where(m_diagonal, tl.reshape(b_L, (4, 16, 4, 16)), 0.0), 2)
    b_X = tl.where(o_i[:, None] == o_i[None, :], 1.0, 0.0)[None, :, :] + tl.zeros((4, 16, 16), tl.float32)
    # Step i subtracts row i of X, which is finished by then, from the rows below.
    for i in tl.static_range(15):
        b_column = tl.sum(tl.where(o_i[None, None, :] == i, b_blocks, 0.0), 2)
        b_row = tl.sum(tl.where(o_i[None, :, None] == i, b_X, 0.0), 1)
        b_X -= b_column[:, :, None] * b_row[:, None, :]
    b_X = tl.reshape(tl.where(m_diagonal, b_X[:, :, None, :], 0.0), (64, 64))
    o_t = tl.arange(0, 64)
    b_L = tl.where(o_t[:, None] // 16 == o_t[None, :] // 16, 0.0, b_L)
    b_W = tl.dot(b_X, b_L, input_precision=PRECISION)
    b_W2 = tl.dot(b_W, b_W, input_precision=PRECISION)
    b_X += tl.dot(b_W2, b_X, input_precision=PRECISION)
    return b_X - tl.dot(b_W, b_X, input_precision=PRECISION)


@triton.jit
def _prepare_kernel(
    p_q, p_k, p_a, p_b, p_A_log, p_dt_bias, p_chunks, p_gates, p_norms, p_M, p_P, s_q, s_k, s_a, s_b,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, EPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (value head, chunk): what the chunk needs before any state is known."""
    i_h, i_chunk = tl.program_id(0), tl.program_id(1)
    i_g = i_h // GROUP
    begin, length = load_chunk(p_chunks, i_chunk)
    o_t, o_k = tl.arange(0, BT), tl.arange(0, K)
    m_t = o_t < length
    o_row = (begin + o_t).to(tl.int64)

    # Under strong decay c = cumsum(g) reaches -1,000, where fp32 resolves only 1e-4: too coarse for e^(c_t - c_s). So g
    # is split into a multiple of 2^-8, whose sums are exact, and a remainder below 2^-8, whose sums stay small. Rows
    # without a token have g = 0, so that c stays at its last valid value.
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

    b_k = load_rows(p_k + i_g * K, begin, length, s_k, o_k, BT)
    b_q = load_rows(p_q + i_g * K, begin, length, s_q, o_k, BT)
    b_kf, b_qf = b_k.to(tl.float32), b_q.to(tl.float32)
    # The matrix products below take q and k as they are; 1/|q| and 1/|k| are factors of their rows and columns.
    b_rk = tl.where(m_t, tl.rsqrt(tl.sum(b_kf * b_kf, 1) + EPS), 0.0)
    b_rq = tl.where(m_t, tl.rsqrt(tl.sum(b_qf * b_qf, 1) + EPS), 0.0)
    # One of the GROUP programs that share this key head stores its norms.
    if i_h % GROUP == 0:
        p_norm = p_norms + (i_chunk * (H // GROUP) + i_g).to(tl.int64) * (2 * BT) + o_t
        tl.store(p_norm, b_rq)
        tl.store(p_norm + BT, b_rk)

    b_D = decay_between(b_c, b_fine, True, BT) * b_rk[None, :]
    b_P = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_D * (b_rq * K**-0.5)[:, None]
    tl.store(tile(p_P, i_gate, BT, BT, o_t, o_t), b_P.to(p_P.dtype.element_ty))
    b_L = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b_D * (b_beta * b_rk)[:, None]
    # L is the part of the key products strictly below the diagonal; P has the diagonal, too.
    b_M = _invert(tl.where(o_t[:, None] > o_t[None, :], b_L, 0.0), PRECISION)
    tl.store(tile(p_M, i_gate, BT, BT, o_t, o_t), b_M.to(p_M.dtype.element_ty))


@triton.jit
def _factors_kernel(
    p_gates, p_norms, p_factors, p_carry,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Program (value head, chunk): what load_read, load_erase and load_write load, and e^(c_last)."""
    i_h, i_chunk = tl.program_id(0), tl.program_id(1)
    i_gate = i_chunk * H + i_h
    b_c, b_fine, _ = load_gates(p_gates, i_gate, BT)
    b_fq, b_fk = load_norm_factors(p_norms, i_chunk * (H // GROUP) + i_h // GROUP, K, BT)
    last, last_fine = load_last(p_gates, i_gate, BT)
    p = p_factors + i_gate.to(tl.int64) * (3 * BT) + tl.arange(0, BT)
    b_decay = tl.exp(b_c + b_fine)
    tl.store(p, b_decay * b_fq)
    tl.store(p + BT, b_decay * b_fk)
    tl.store(p + 2 * BT, tl.exp((last - b_c) + (last_fine - b_fine)) * b_fk)
    tl.store(p_carry + i_gate, tl.exp(last + last_fine))


@triton.jit
def _states_kernel(
    desc_q, desc_k, desc_v, desc_M, desc_P, p_gates, p_factors, p_carry, p_initial, p_documents,
    p_o, p_final, p_checkpoints,
    HAS_INITIAL: tl.constexpr, STORE_FINAL: tl.constexpr, STORE_CHECKPOINTS: tl.constexpr, SEGMENT: tl.constexpr,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (BV columns of v and S, value head, document). The columns of S never mix, so they need no exchange."""
    i_v, i_h, i_row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_g = i_h // GROUP
    p_row = p_documents + i_row * 5
    i_document, begin, length = tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2)
    first_chunk, first_checkpoint = tl.load(p_row + 3), tl.load(p_row + 4)
    o_k, o_v = tl.arange(0, K), i_v * BV + tl.arange(0, BV)
    dtype: tl.constexpr = p_o.dtype.element_ty

    b_ST = tl.zeros((BV, K), tl.float32)
    if HAS_INITIAL:
        b_ST += tl.trans(tl.load(tile(p_initial, i_document * H + i_h, K, V, o_k, o_v)).to(tl.float32))
    for i in range(tl.cdiv(length, BT)):
        # Two ifs: the outer one tests a constant, so that the inner one is compiled only where it is needed.
        if STORE_CHECKPOINTS:  # noqa: SIM102
            if (i % SEGMENT == 0) & (i > 0):
                i_checkpoint = first_checkpoint + i // SEGMENT - 1
                tl.store(tile(p_checkpoints, i_checkpoint * H + i_h, V, K, o_v, o_k), b_ST)
        i_gate = (first_chunk + i) * H + i_h
        at, left = begin + i * BT, length - i * BT
        b_read, b_erase = load_read(p_factors, i_gate, BT), load_erase(p_factors, i_gate, BT)
        carry = tl.load(p_carry + i_gate)
        b_k = desc_k.load([at, i_g * K])
        b_q = desc_q.load([at, i_g * K])
        b_v = desc_v.load([at, i_h * V + i_v * BV])
        b_M = desc_M.load([i_gate * BT, 0])
        b_P = desc_P.load([i_gate * BT, 0])

        # E = beta (v - e^c f_k (k S)), R = M E. The products read the state rounded to the inputs' dtype; b_ST itself,
        # which goes from chunk to chunk, stays fp32.
        b_st = b_ST.to(dtype)
        b_ET = tl.dot(b_st, tl.trans(b_k), input_precision=PRECISION)
        b_ET = (tl.trans(b_v).to(tl.float32) - b_erase[None, :] * b_ET) * load_beta(p_gates, i_gate, BT)[None, :]
        b_RT = tl.dot(b_ET.to(dtype), tl.trans(b_M), input_precision=PRECISION)
        # o = e^c f_q (q S) + P R.
        b_oT = tl.dot(b_st, tl.trans(b_q), input_precision=PRECISION) * b_read[None, :]
        b_oT = tl.dot(b_RT.to(dtype), tl.trans(b_P), b_oT, input_precision=PRECISION)
        # S' = e^(c_last) S + k^T (e^(c_last - c) f_k R).
        b_RT *= load_write(p_factors, i_gate, BT)[None, :]
        b_ST *= carry
        b_ST = tl.dot(b_RT.to(dtype), b_k, b_ST, input_precision=PRECISION)
        store_rows(p_o + i_h * V, tl.trans(b_oT.to(dtype)), at, left, H * V, o_v, BT)
    if STORE_FINAL:
        tl.store(tile(p_final, i_document * H + i_h, K, V, o_k, o_v), tl.trans(b_ST))


def precision(x: Tensor) -> str:
    """fp32 inputs are multiplied in fp32; beside bf16 operands, TF32 in the inverse is no coarser than rounding M."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def value_columns(dtype: torch.dtype, V: int) -> int:
    """BV: how many columns of v and S a program of a walk has, and a block where a kernel reads all of them."""
    return min(V, 32 if dtype == torch.float32 else 64)


def options(kernel: str, dtype: torch.dtype) -> dict[str, int]:
    """Warps and stages of a kernel: those with which it fits when compiled for sm_90."""
    if dtype == torch.float32:
        return {"num_warps": 8, "num_stages": 1}
    # Three stages where one program fills a multiprocessor: with two, a load is issued when it is already awaited.
    # One where two or three programs share it, and the others work while one waits.
    stages = {"states": 3, "recompute": 2, "reverse": 3, "within": 2, "dq": 1, "dk": 1}
    return {"num_warps": 4, "num_stages": stages[kernel]}


class Prepared(NamedTuple):
    """What a chunk needs before any state is known; saved for the backward pass."""

    gates: Tensor  # (NC, H, 3, BT) fp32: c coarse, c fine, beta
    norms: Tensor  # (NC, G, 2, BT) fp32: 1/|q|, 1/|k|
    M: Tensor  # (NC, H, BT, BT), in v's dtype
    P: Tensor  # (NC, H, BT, BT), in v's dtype


class StateFactors(NamedTuple):
    """The factors that the walks read. Not saved: gates and norms have all that they follow from."""

    rows: Tensor  # (NC, H, 3, BT) fp32: e^c f_q, e^c f_k, e^(c_last - c) f_k
    carry: Tensor  # (NC, H) fp32: e^(c_last)


def prepare(q: Tensor, k: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, plan: Schedule) -> Prepared:
    """q, k (T, G, K), a, b (T, H), A_log and dt_bias (H,) -> gates, norms, M and P of every chunk."""
    (G, K), H, NC = k.shape[1:], a.shape[1], len(plan.chunks)
    gates = torch.empty(NC, H, 3, CHUNK, dtype=torch.float32, device=k.device)
    norms = torch.empty(NC, G, 2, CHUNK, dtype=torch.float32, device=k.device)
    M, P = (torch.empty(NC, H, CHUNK, CHUNK, dtype=k.dtype, device=k.device) for _ in range(2))
    _prepare_kernel[(H, NC)](
        *(q, k, a, b, A_log, dt_bias, plan.chunks, gates, norms, M, P),
        *(x.stride(0) for x in (q, k, a, b)),
        H=H, GROUP=H // G, K=K, BT=CHUNK, EPS=L2_EPS, PRECISION=precision(k), num_warps=4, num_stages=1,
    )  # fmt: skip
    return Prepared(gates, norms, M, P)


def state_factors(prepared: Prepared, K: int) -> StateFactors:
    """The factors of the walks, from gates and norms."""
    NC, H, _, BT = prepared.gates.shape
    G, device = prepared.norms.shape[1], prepared.gates.device
    factors = StateFactors(
        torch.empty(NC, H, 3, BT, dtype=torch.float32, device=device),
        torch.empty(NC, H, dtype=torch.float32, device=device),
    )
    _factors_kernel[(H, NC)](prepared.gates, prepared.norms, *factors, H=H, GROUP=H // G, K=K, BT=BT, num_warps=2)
    return factors


def descriptors(BV: int, **tensors: Tensor) -> list:
    """TMA descriptors of token tensors: q and k (T, G, K) in boxes of BT x K, v, do and dv (T, H, V) of BT x BV."""
    # From the convolution all rows are adjacent; a caller's slice of something wider may not be readable.
    tensors = {name: x if tma_reads(x) else x.contiguous() for name, x in tensors.items()}
    return [tma(name, x, CHUNK, columns=None if name in ("q", "k") else BV) for name, x in tensors.items()]


def tile_descriptor(name: str, x: Tensor) -> "TensorDescriptor":
    """A tensor (NC, heads, rows, columns) in boxes of one chunk and head."""
    return tma(name, x.view(-1, 1, x.shape[3]), x.shape[2])


def states(
    q: Tensor, k: Tensor, v: Tensor, prepared: Prepared, factors: StateFactors, initial: Tensor | None, plan: Schedule,
    final: bool, save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """o (T, H, V), the final states (N, H, K, V) if `final`, the checkpoints (plan.checkpoints, H, V, K) if `save`."""
    (G, K), (H, V), N = k.shape[1:], v.shape[1:], len(plan.documents)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    S_final = torch.empty(N, H, K, V, dtype=torch.float32, device=v.device) if final else None
    checkpoints = torch.empty(plan.checkpoints, H, V, K, dtype=torch.float32, device=v.device) if save else None
    BV = value_columns(v.dtype, V)
    _states_kernel[(V // BV, H, N)](
        *descriptors(BV, q=q, k=k, v=v),
        *(tile_descriptor("M", prepared.M), tile_descriptor("P", prepared.P)),
        *(prepared.gates, *factors, initial, plan.documents, o, S_final, checkpoints),
        HAS_INITIAL=initial is not None, STORE_FINAL=final, STORE_CHECKPOINTS=save and plan.checkpoints > 0,
        SEGMENT=SEGMENT, H=H, GROUP=H // G, K=K, V=V, BT=CHUNK, BV=BV, PRECISION=precision(v),
        **options("states", v.dtype),
    )  # fmt: skip
    return o, S_final, checkpoints
