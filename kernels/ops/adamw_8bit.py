"""AdamW with 8-bit states over one flat buffer: gradient norm, clipping and the update of every adapter tensor at once.

With g the clipped gradient, t the number of applied steps including this one and c1 = 1 - b1^t, c2 = sqrt(1 - b2^t):

    m = b1 m + (1 - b1) g          p = p (1 - lr wd) - (lr c2 / c1) m / (sqrt(v) + eps c2)
    v = b2 v + (1 - b2) g^2        p is updated with m and v before they are rounded to 8 bits

The clip factor is min(1, max_grad_norm / (norm + 1e-6)), norm over all segments. If the norm is not finite (a NaN, an
infinity, or squares that overflow fp32 beyond |g| = 1.8e19), parameters, states and t stay as they are, and a counter
of consecutive skipped steps rises. All of this is decided on the device; the host never waits.

Storage. Every segment (one adapter tensor) is cut into rows of 256 elements; its last row may be shorter, and no row
holds elements of two segments. The 8-bit rows come first: m and v are uint8 codes (8-bit rows, 256) and one fp32 absmax
a row, with the value map[code] * absmax. Rows of segments with fewer than `min_8bit_size` elements come after them and
hold m and v in fp32 (fp32 rows, 256). Elements of the buffer that belong to no segment are neither read nor written.

The maps are bitsandbytes' dynamic maps. One rule is added: v > 0 never gets code 0. Rounding to nearest would make v 0
when it is below 1.6e-7 of its row's maximum; if the next gradient of that element is tiny, its step is then lr m / eps:
up to 30,000 times lr was seen. Code 1 (3.25e-7 of the maximum) instead is larger than v and makes a step shorter.

Rounding: everything is computed in promote_types(p.dtype, fp32), each operation rounded by itself. The scalars of a
step are computed in fp64, because 1 - b2 has only 4 digits in fp32, from the lr of that dtype. Bytes an element: 20
with 8-bit states (g twice, p, codes), 32 with fp32 states; 27B recipe: 4,980,736 elements, 101 MB a step. No backward.
Source: 8-bit optimizers (arXiv 2110.02861), bitsandbytes `AdamW8bit`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.lora_term import compute_dtype
from kernels.ops._triton import tl, triton

ROW = 256  # elements that share one absmax; bitsandbytes' block size


def dynamic_map(signed: bool) -> Tensor:
    """The values of the 256 codes, rising: (256,) fp32 in [-1, 1] or [0, 1]; bitsandbytes' create_dynamic_map.

    Decade i = 0..6 reaches up to 10^(i-6) and is cut into 2^i cells (twice as many unsigned); values are their centres.
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        centres = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [centres, -centres] if signed else [centres]
    return torch.cat(values).sort().values


@dataclass(frozen=True)
class AdamWState:
    """The optimiser's state, and where its rows lie in the flat buffer. All tensors are on the buffer's device."""

    start: Tensor  # (rows,) int64: first element of the row; the 8-bit rows come first
    length: Tensor  # (rows,) int32: 1 to 256
    values: Tensor  # (2, 256) fp32: the signed map (for m) and the unsigned one (for v)
    borders: Tensor  # (2, 255) fp32: midpoints of neighbouring values; x gets the code: how many lie below x
    code_m: Tensor  # (8-bit rows, 256) uint8
    code_v: Tensor  # (8-bit rows, 256) uint8
    absmax_m: Tensor  # (8-bit rows,) fp32
    absmax_v: Tensor  # (8-bit rows,) fp32
    m: Tensor  # (fp32 rows, 256), in the compute dtype
    v: Tensor  # (fp32 rows, 256)
    counters: Tensor  # (2,) int32: applied steps; consecutive skipped steps up to now

    SAVED = ("code_m", "code_v", "absmax_m", "absmax_v", "m", "v", "counters")

    @property
    def n_8bit(self) -> int:
        """The number of 8-bit rows."""
        return self.code_m.shape[0]

    def saved(self) -> dict[str, Tensor]:
        """The tensors that a resumed run needs; the others follow from the segments."""
        return {name: getattr(self, name) for name in self.SAVED}

    @classmethod
    def zeros(
        cls, segments: Iterable[tuple[int, int]], min_8bit_size: float, device: torch.device, dtype: torch.dtype
    ) -> "AdamWState":
        """The state before the first step. segments: (start, stop) in the flat buffer; dtype: the compute dtype."""
        rows: tuple[list, list] = ([], [])  # (start, length) of the 8-bit rows, and of the fp32 rows
        for start, stop in segments:
            rows[stop - start < min_8bit_size].extend((i, min(ROW, stop - i)) for i in range(start, stop, ROW))
        table = torch.tensor(rows[0] + rows[1], dtype=torch.int64).view(-1, 2)
        values = torch.stack([dynamic_map(True), dynamic_map(False)])
        n_8bit, n_plain = len(rows[0]), len(rows[1])
        tensors = {
            "start": table[:, 0].contiguous(),
            "length": table[:, 1].int(),
            "values": values,
            "borders": (values[:, :-1] + values[:, 1:]) / 2,
            # With an absmax of 0 every code means 0. Code 127 is the 0 of the signed map.
            "code_m": torch.full((n_8bit, ROW), 127, dtype=torch.uint8),
            "code_v": torch.zeros(n_8bit, ROW, dtype=torch.uint8),
            "absmax_m": torch.zeros(n_8bit),
            "absmax_v": torch.zeros(n_8bit),
            "m": torch.zeros(n_plain, ROW, dtype=dtype),
            "v": torch.zeros(n_plain, ROW, dtype=dtype),
            "counters": torch.zeros(2, dtype=torch.int32),
        }
        return cls(**{name: x.to(device) for name, x in tensors.items()})


# The reference works through the rows in groups, so that its temporaries take about 70 MB for any size of the buffer.
ROWS_AT_ONCE = 4096


def adamw_8bit_reference(
    param: Tensor, grad: Tensor, state: AdamWState,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, max_grad_norm: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step; param (elements,) and state are updated in place. grad (elements,) is only read.

    -> the gradient's norm () before clipping, and the number of consecutive skipped steps up to now () int32. Both are
    new tensors: the host may read them one step later.
    """
    norm = grad_norm(grad, state)
    applied = norm.isfinite()
    clip = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    step_size, eps = step_scalars(state.counters[0] + 1, lr, betas, eps, norm.dtype)

    for rows in row_groups(state):
        index, inside = elements(state, rows)
        p = param[index].to(norm.dtype)
        g = torch.where(inside, grad[index].to(norm.dtype), 0) * clip
        m, v = load_moments(state, rows, inside)
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * (g * g)
        new_p = move(p, m, v, step_size, eps, lr, weight_decay)
        # A boolean index would wait for the device. So lanes past a row's end write the row's last element once more.
        new_p = torch.where(inside, new_p, new_p.gather(1, state.length[rows, None].long() - 1))
        param[index] = torch.where(applied, new_p, p).to(param.dtype)
        store_moments(state, rows, m, v, applied)

    state.counters[0] += applied
    state.counters[1] = torch.where(applied, 0, state.counters[1] + 1)
    return norm, state.counters[1].clone()


def row_groups(state: AdamWState) -> list[slice]:
    """Slices of at most ROWS_AT_ONCE rows, each of 8-bit rows only or of fp32 rows only."""
    bounds = ((0, state.n_8bit), (state.n_8bit, len(state.start)))
    return [slice(i, min(i + ROWS_AT_ONCE, stop)) for start, stop in bounds for i in range(start, stop, ROWS_AT_ONCE)]


def elements(state: AdamWState, rows: slice) -> tuple[Tensor, Tensor]:
    """(rows, 256) each: where the rows' elements lie in the flat buffer, and which lanes are inside their row.

    Lanes past the end of a row point to its last element.
    """
    lane, length = torch.arange(ROW, device=state.start.device), state.length[rows, None]
    return state.start[rows, None] + torch.minimum(lane, length - 1), lane < length


def grad_norm(grad: Tensor, state: AdamWState) -> Tensor:
    """(): the 2-norm over all segments, from one partial sum a row."""
    sums = [torch.zeros(1, dtype=compute_dtype(grad), device=grad.device)]
    for rows in row_groups(state):
        index, inside = elements(state, rows)
        sums.append(torch.where(inside, grad[index].to(sums[0].dtype), 0).square().sum(1))
    return torch.cat(sums).sum().sqrt()


def step_scalars(
    t: Tensor, lr: float, betas: tuple[float, float], eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """lr c2 / c1 and eps c2 for step t () on the device."""
    c1, c2 = 1 - betas[0] ** t.double(), (1 - betas[1] ** t.double()).sqrt()
    return (rounded(lr, dtype) * c2 / c1).to(dtype), (eps * c2).to(dtype)


def rounded(x: float, dtype: torch.dtype) -> float:
    """x rounded to this dtype, as a kernel would receive it."""
    return torch.tensor(x, dtype=dtype).item()


def move(p: Tensor, m: Tensor, v: Tensor, step_size: Tensor, eps: Tensor, lr: float, weight_decay: float) -> Tensor:
    """The new p. step_size and eps come from step_scalars."""
    return p * (1 - lr * weight_decay) - step_size * (m / (v.sqrt() + eps))


def load_moments(state: AdamWState, rows: slice, inside: Tensor) -> tuple[Tensor, Tensor]:
    """m and v (rows, 256), 0 in the lanes past a row's end."""
    if rows.start >= state.n_8bit:
        fp32_rows = slice(rows.start - state.n_8bit, rows.stop - state.n_8bit)
        return state.m[fp32_rows], state.v[fp32_rows]
    values = state.values.to(state.m.dtype)
    m = values[0][state.code_m[rows].int()] * state.absmax_m[rows, None]
    v = values[1][state.code_v[rows].int()] * state.absmax_v[rows, None]
    return torch.where(inside, m, 0), torch.where(inside, v, 0)


def store_moments(state: AdamWState, rows: slice, m: Tensor, v: Tensor, applied: Tensor) -> None:
    """Stores the new m and v (rows, 256) unless the step is skipped (applied () bool, on the device)."""

    def store(old: Tensor, new: Tensor) -> None:
        old.copy_(torch.where(applied, new.to(old.dtype), old))

    if rows.start >= state.n_8bit:
        fp32_rows = slice(rows.start - state.n_8bit, rows.stop - state.n_8bit)
        store(state.m[fp32_rows], m)
        store(state.v[fp32_rows], v)
        return
    absmax_m, absmax_v = m.abs().amax(1), v.amax(1)
    code_m, code_v = nearest_code(m, absmax_m, state.borders[0]), nearest_code(v, absmax_v, state.borders[1])
    store(state.code_m[rows], code_m)
    store(state.code_v[rows], nonzero_code(code_v, v))
    store(state.absmax_m[rows], absmax_m)
    store(state.absmax_v[rows], absmax_v)


def nearest_code(x: Tensor, absmax: Tensor, borders: Tensor) -> Tensor:
    """x (rows, 256), absmax (rows,) -> the code whose value * absmax is nearest to x; the lower one at a tie."""
    # A row of zeros has absmax 0: dividing by 1 gives the code of 0 instead of NaN.
    return torch.bucketize(x / torch.where(absmax > 0, absmax, 1)[:, None], borders.to(x.dtype), out_int32=True)


def nonzero_code(code: Tensor, v: Tensor) -> Tensor:
    """At least code 1 where v > 0: the rule against steps of lr m / eps."""
    return torch.where(v > 0, code.clamp(min=1), code)


# Triton, three launches: partial sums of the norm; one program that computes the scalars of the step; the update.


@triton.jit
def _norm_partials_kernel(p_grad, p_start, p_length, p_partial, n_rows, B_ROWS: tl.constexpr, ROW: tl.constexpr):
    """p_partial (programs,) = the sum of g^2 over B_ROWS rows."""
    i_p = tl.program_id(0)
    o_r = i_p * B_ROWS + tl.arange(0, B_ROWS)
    b_start = tl.load(p_start + o_r, mask=o_r < n_rows, other=0)
    b_length = tl.load(p_length + o_r, mask=o_r < n_rows, other=0)
    o_lane = tl.arange(0, ROW)[None, :]
    b_g = tl.load(p_grad + b_start[:, None] + o_lane, mask=o_lane < b_length[:, None], other=0.0)
    tl.store(p_partial + i_p, tl.sum(b_g * b_g))


@triton.jit
def _step_kernel(
    p_partial, p_counters, p_norm, p_skipped, p_scalars, n_partials, lr, max_grad_norm,
    EPS: tl.constexpr, LOG2_BETA1: tl.constexpr, LOG2_BETA2: tl.constexpr, B_PARTIALS: tl.constexpr,
):  # fmt: skip
    """One program. p_scalars (4,): whether the step is applied (1.0 or 0.0), clip factor, lr c2 / c1, eps c2."""
    b_sum = tl.zeros((B_PARTIALS,), tl.float32)
    for i in range(0, n_partials, B_PARTIALS):
        o_p = i + tl.arange(0, B_PARTIALS)
        b_sum += tl.load(p_partial + o_p, mask=o_p < n_partials, other=0.0)
    norm = tl.sqrt_rn(tl.sum(b_sum))
    applied = norm < float("inf")  # also False for NaN
    t = tl.load(p_counters) + 1
    skipped = tl.where(applied, 0, tl.load(p_counters + 1) + 1)
    # beta^t = 2^(t log2 beta), in fp64: 1 - 0.999^t has only 4 digits in fp32 for small t.
    c1 = 1 - tl.exp2(t.to(tl.float64) * LOG2_BETA1)
    c2 = tl.sqrt(1 - tl.exp2(t.to(tl.float64) * LOG2_BETA2))
    tl.store(p_counters, tl.where(applied, t, t - 1))
    tl.store(p_counters + 1, skipped)
    tl.store(p_norm, norm)
    tl.store(p_skipped, skipped)
    tl.store(p_scalars, applied.to(tl.float32))
    tl.store(p_scalars + 1, tl.minimum(tl.div_rn(max_grad_norm, norm + 1e-6), 1.0))
    tl.store(p_scalars + 2, (lr * c2 / c1).to(tl.float32))
    tl.store(p_scalars + 3, (EPS * c2).to(tl.float32))


@triton.jit
def _nearest_code(b_x, b_absmax, p_borders):
    """As nearest_code. b_x (B_ROWS, ROW), b_absmax (B_ROWS,), p_borders (255,) -> (B_ROWS, ROW) int32."""
    b_x = tl.div_rn(b_x, tl.where(b_absmax > 0, b_absmax, 1.0)[:, None])
    b_code = tl.zeros(b_x.shape, tl.int32)
    # The code is the number of borders below x: a binary search in eight steps. The table of 1 KB stays in L1.
    for i in tl.static_range(8):
        b_higher = b_code + (128 >> i)
        b_code = tl.where(b_x > tl.load(p_borders + b_higher - 1), b_higher, b_code)
    return b_code


@triton.jit
def _update_kernel(
    p_param, p_grad, p_start, p_length, p_values, p_borders,
    p_code_m, p_code_v, p_absmax_m, p_absmax_v, p_m, p_v, p_scalars, n_8bit, n_rows, decay,
    BETA1: tl.constexpr, BETA2: tl.constexpr, B_ROWS: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Program: B_ROWS rows. decay = 1 - lr * weight_decay. A skipped step reads one scalar and ends."""
    if tl.load(p_scalars) != 0.0:
        clip, step_size, eps = tl.load(p_scalars + 1), tl.load(p_scalars + 2), tl.load(p_scalars + 3)
        # A program has rows of one kind only, so that the branches below are the same for all its threads.
        i_p, n_p = tl.program_id(0), tl.cdiv(n_8bit, B_ROWS)
        is_8bit = i_p < n_p
        o_r = tl.where(is_8bit, i_p * B_ROWS, n_8bit + (i_p - n_p) * B_ROWS) + tl.arange(0, B_ROWS)
        m_r = o_r < tl.where(is_8bit, n_8bit, n_rows)
        b_start, b_length = tl.load(p_start + o_r, mask=m_r, other=0), tl.load(p_length + o_r, mask=m_r, other=0)
        o_lane = tl.arange(0, ROW)[None, :]
        m_x = o_lane < b_length[:, None]
        o_x = b_start[:, None] + o_lane
        # The states of either kind are a matrix of their own, counted from row 0.
        o_state = tl.where(is_8bit, o_r, o_r - n_8bit).to(tl.int64)[:, None] * ROW + o_lane

        b_p = tl.load(p_param + o_x, mask=m_x, other=0.0)
        b_g = tl.load(p_grad + o_x, mask=m_x, other=0.0) * clip
        if is_8bit:
            b_code_m = tl.load(p_code_m + o_state, mask=m_x, other=127).to(tl.int32)
            b_code_v = tl.load(p_code_v + o_state, mask=m_x, other=0).to(tl.int32)
            b_m = tl.load(p_values + b_code_m) * tl.load(p_absmax_m + o_r, mask=m_r, other=0.0)[:, None]
            b_v = tl.load(p_values + ROW + b_code_v) * tl.load(p_absmax_v + o_r, mask=m_r, other=0.0)[:, None]
        else:
            b_m = tl.load(p_m + o_state, mask=m_x, other=0.0)
            b_v = tl.load(p_v + o_state, mask=m_x, other=0.0)

        b_m = BETA1 * b_m + (1 - BETA1) * b_g
        b_v = BETA2 * b_v + (1 - BETA2) * (b_g * b_g)
        # With the unrounded m and v: rounded to 8 bits they would add their error to every step.
        b_p = b_p * decay - step_size * tl.div_rn(b_m, tl.sqrt_rn(b_v) + eps)
        tl.store(p_param + o_x, b_p, mask=m_x)

        if is_8bit:
            b_absmax_m, b_absmax_v = tl.max(tl.abs(b_m), 1), tl.max(b_v, 1)
            b_code_m = _nearest_code(b_m, b_absmax_m, p_borders)
            b_code_v = _nearest_code(b_v, b_absmax_v, p_borders + ROW - 1)
            # The rule of nonzero_code: code 0 would turn the next step into lr m / eps.
            b_code_v = tl.where((b_v > 0) & (b_code_v == 0), 1, b_code_v)
            tl.store(p_code_m + o_state, b_code_m.to(tl.uint8), mask=m_r[:, None])
            tl.store(p_code_v + o_state, b_code_v.to(tl.uint8), mask=m_r[:, None])
            tl.store(p_absmax_m + o_r, b_absmax_m, mask=m_r)
            tl.store(p_absmax_v + o_r, b_absmax_v, mask=m_r)
        else:
            tl.store(p_m + o_state, b_m, mask=m_r[:, None])
            tl.store(p_v + o_state, b_v, mask=m_r[:, None])


# Rows a program; partial sums that the program of _step_kernel adds at a time; warps.
B_ROWS, B_PARTIALS, NUM_WARPS = 4, 1024, 4


def adamw_8bit_triton(
    param: Tensor, grad: Tensor, state: AdamWState,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, max_grad_norm: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """adamw_8bit_reference in three launches, for fp32 buffers: ValueError for another dtype. Allocates one fp32
    partial sum for every 4 rows.
    """
    if param.dtype != torch.float32 or grad.dtype != torch.float32:
        raise ValueError(f"AdamW in Triton takes fp32, not {param.dtype}; set PSYSAFE_KERNELS=reference for this model")
    n_rows, n_8bit = len(state.start), state.n_8bit
    partial_sums = param.new_empty(triton.cdiv(n_rows, B_ROWS))
    norm, scalars = param.new_empty(()), param.new_empty(4)
    skipped = state.counters.new_empty(())
    # A multiply and an add fused into one FMA are rounded once; without fusion every rounding is that of the reference.
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    rows, blocks = (state.start, state.length), {"B_ROWS": B_ROWS, "ROW": ROW}
    _norm_partials_kernel[(len(partial_sums),)](grad, *rows, partial_sums, n_rows, **blocks, **options)
    _step_kernel[(1,)](
        *(partial_sums, state.counters, norm, skipped, scalars, len(partial_sums)),
        *(rounded(lr, torch.float32), max_grad_norm),
        **_step_constants(betas, eps),
        **options,
    )
    moments = (state.code_m, state.code_v, state.absmax_m, state.absmax_v, state.m, state.v)
    programs = triton.cdiv(n_8bit, B_ROWS) + triton.cdiv(n_rows - n_8bit, B_ROWS)
    _update_kernel[(programs,)](
        *(param, grad, *rows, state.values, state.borders, *moments, scalars, n_8bit, n_rows, 1 - lr * weight_decay),
        *betas,
        **blocks,
        **options,
    )
    return norm, skipped


def _step_constants(betas: tuple[float, float], eps: float) -> dict[str, float]:
    """The compile-time constants of _step_kernel."""
    log2 = [math.log2(beta) if beta else -math.inf for beta in betas]
    return {"EPS": eps, "LOG2_BETA1": log2[0], "LOG2_BETA2": log2[1], "B_PARTIALS": B_PARTIALS}
