"""Depthwise causal convolution over time + SiLU, restarting at every document.

    a_t = sum_m w[:, m] x_{t-M+1+m}     c_t = round(silu(a_t))
    da_t = dc_t sigmoid(a_t) (1 + a_t (1 - sigmoid(a_t)))       dx_t = round(sum_m w[:, m] da_{t+M-1-m})

x, a, c (T, C); w (C, M), M taps. Both sums stay within the document of token t: rows of x before its start are zero (or
its initial state), rows of da after its end are zero.

Rounding: sums in fp32; c and dx are rounded once. The output is split by columns into q, k and v, three tensors, so
that the delta rule needs no copy. In Triton a program owns a block of columns of one split and walks over a segment of
the tokens. The last M-1 rows of x stay in registers, and backward also the M-1 rows of dx whose sum is not complete. So
a row is read once, except M-1 rows at a segment's start, and backward M-1 at its end, which two programs read. The
position of a token in its document says how many rows before it belong to the document.

Bytes a token at C = 10,240 in bf16: forward 40,960, backward 61,440 (x and dc in, dx out; dq, dk and dv are read where
they are, dx is one dense (T, C)). Saved for backward: only x, a view of the fused in-projection's output; so that whole
GEMM output stays alive. a is recomputed. The weight and initial_state (used only in generation) get no gradient.
Source: transformers `Qwen3_5GatedDeltaNet` (conv1d without bias, silu).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.documents import Documents
from kernels.lora_term import compute_dtype
from kernels.ops._launch import adjacent, check_inputs, persistent_programs
from kernels.ops._triton import tl, triton


def causal_conv1d_silu_reference(
    x: Tensor, weight: Tensor, documents: Documents, splits: tuple[int, ...], initial_state: Tensor | None = None
) -> tuple[Tensor, ...]:
    """x (T, C), weight (C, M), splits summing to C, initial_state (N, M-1, C): the M-1 rows before the first token of
    each document, zero if None -> one (T, size) tensor in x's dtype for each size in `splits`.
    """
    M, C, dtype = weight.shape[1], x.shape[1], compute_dtype(x)
    w = weight.to(dtype)
    a = []  # one (length, C) for each document
    for i, rows in enumerate(x.to(dtype).split(documents.lengths)):  # (length, C)
        # A document must not see the rows of the one before it: it has rows of its own in front.
        before = rows.new_zeros(M - 1, C) if initial_state is None else initial_state[i].to(dtype)
        padded = torch.cat([before, rows])  # (M-1+length, C): padded[t+m] is x_{t-M+1+m}
        a.append(sum(w[:, m] * padded[m : m + len(rows)] for m in range(M)))
    c = F.silu(torch.cat(a)).to(x.dtype)
    return c.split(splits, dim=1)


# Triton. Grid: (column blocks, segments). Up to three splits of C0, C1 and C2 channels (0: absent); no block lies in
# two. `lag` counts rows backwards: lag 0 is token t with the last tap, w[:, M-1].


@triton.jit
def _columns(C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, BC: tl.constexpr):
    """This program's split and its size; its columns in the split, and in x; a mask of those that exist."""
    i_b = tl.program_id(0)
    BLOCKS0: tl.constexpr = (C0 + BC - 1) // BC
    BLOCKS1: tl.constexpr = (C1 + BC - 1) // BC
    split = (i_b >= BLOCKS0).to(tl.int32) + (i_b >= BLOCKS0 + BLOCKS1).to(tl.int32)
    first = tl.where(split == 0, 0, tl.where(split == 1, BLOCKS0, BLOCKS0 + BLOCKS1))
    start = tl.where(split == 0, 0, tl.where(split == 1, C0, C0 + C1))
    size = tl.where(split == 0, C0, tl.where(split == 1, C1, C2))
    o_s = (i_b - first) * BC + tl.arange(0, BC)
    return split, size, o_s, start + o_s, o_s < size


@triton.jit
def _before(p_x, p_index, p_state, i_t, pos, lag: tl.constexpr, o_c, m_c, stride, C: tl.constexpr, M: tl.constexpr):
    """x_{t-lag} in fp32; before the document's start its initial state or zero. pos: t's position in its document."""
    b_x = tl.load(p_x + tl.cast(i_t - lag, tl.int64) * stride + o_c, m_c & (pos >= lag), other=0).to(tl.float32)
    if p_state is not None:
        o_r = tl.load(p_index + i_t) * (M - 1) + (M - 1 - lag + pos)
        b_x += tl.load(p_state + o_r * C + o_c, m_c & (pos < lag), other=0).to(tl.float32)
    return b_x


@triton.jit
def _preactivation(b_x, b_past, b_w, p_index, p_state, i_t, pos, T, m, o_c, C: tl.constexpr, M: tl.constexpr):
    """a_t, and the M-1 rows before token t+1. b_past: the M-1 rows before token t, the newest first."""
    b_a = b_x * b_w[0]
    b_next = (b_x,)
    for lag in tl.static_range(1, M):
        # At a document's first token all rows in registers are another document's. Later tokens need no test: zeros (or
        # the initial state) then stand there and move on with the rows.
        b_row = tl.where(pos == 0, 0.0, b_past[lag - 1])
        if p_state is not None:
            # Backward goes on after the last token, where pos reads as 0 but p_index has no entry.
            o_r = tl.load(p_index + i_t, (pos == 0) & (i_t < T), other=0) * (M - 1) + (M - 1 - lag)
            b_row += tl.load(p_state + o_r * C + o_c, m & (pos == 0), other=0).to(tl.float32)
        b_a += b_row * b_w[lag]
        if lag < M - 1:
            b_next += (b_row,)
    return b_a, b_next


@triton.jit(do_not_specialize=["T", "length"])
def _forward_kernel(
    p_x, p_w, p_pos, p_index, p_state, p_c0, p_c1, p_c2, T, length, stride,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, M: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (column block, i) takes tokens i * length to (i + 1) * length - 1."""
    C: tl.constexpr = C0 + C1 + C2
    split, size, o_s, o_c, m_c = _columns(C0, C1, C2, BC)
    # C1 > 0 is a constant: without a second split its pointer is None and must not be compiled in.
    p_c = p_c0
    if C1 > 0 and split == 1:
        p_c = p_c1
    if C2 > 0 and split == 2:
        p_c = p_c2
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, T)
    # The rows before the segment belong to the program before this one; they are read a second time.
    pos = tl.load(p_pos + begin, begin < T, other=0).to(tl.int32)
    b_w, b_past = (tl.load(p_w + o_c * M + M - 1, m_c, other=0).to(tl.float32),), ()
    for lag in tl.static_range(1, M):
        b_w += (tl.load(p_w + o_c * M + M - 1 - lag, m_c, other=0).to(tl.float32),)
        b_past += (_before(p_x, p_index, p_state, begin, pos, lag, o_c, m_c & (begin < T), stride, C, M),)
    for i_t in tl.range(begin, end, num_stages=STAGES):
        o_t = tl.cast(i_t, tl.int64)
        pos = tl.load(p_pos + i_t).to(tl.int32)
        b_x = tl.load(p_x + o_t * stride + o_c, m_c, other=0).to(tl.float32)
        b_a, b_past = _preactivation(b_x, b_past, b_w, p_index, p_state, i_t, pos, T, m_c, o_c, C, M)
        tl.store(p_c + o_t * size + o_s, (b_a * tl.sigmoid(b_a)).to(p_c0.dtype.element_ty), m_c)


@triton.jit(do_not_specialize=["T", "length"])
def _backward_kernel(
    p_dc0, p_dc1, p_dc2, p_x, p_w, p_pos, p_index, p_state, p_dx, T, length, stride_dc0, stride_dc1, stride_dc2, stride,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, M: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As the forward kernel. dx_t is complete at token t + M-1: b_open holds the incomplete sums, the oldest last."""
    C: tl.constexpr = C0 + C1 + C2
    split, _, o_s, o_c, m_c = _columns(C0, C1, C2, BC)
    p_dc, stride_dc = p_dc0, stride_dc0
    if C1 > 0 and split == 1:
        p_dc, stride_dc = p_dc1, stride_dc1
    if C2 > 0 and split == 2:
        p_dc, stride_dc = p_dc2, stride_dc2
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, T)
    pos = tl.load(p_pos + begin, begin < T, other=0).to(tl.int32)
    b_w, b_past, b_open = (tl.load(p_w + o_c * M + M - 1, m_c, other=0).to(tl.float32),), (), ()
    for lag in tl.static_range(1, M):
        b_w += (tl.load(p_w + o_c * M + M - 1 - lag, m_c, other=0).to(tl.float32),)
        b_past += (_before(p_x, p_index, p_state, begin, pos, lag, o_c, m_c & (begin < T), stride, C, M),)
        b_open += (tl.zeros([BC], tl.float32),)
    # M-1 tokens past the segment still add to dx of its last rows. After T, dc is read as zero.
    for i_t in tl.range(begin, end + M - 1, num_stages=STAGES):
        o_t = tl.cast(i_t, tl.int64)
        m = m_c & (i_t < T)
        pos = tl.load(p_pos + i_t, i_t < T, other=0).to(tl.int32)
        b_x = tl.load(p_x + o_t * stride + o_c, m, other=0).to(tl.float32)
        b_dc = tl.load(p_dc + o_t * stride_dc + o_s, m, other=0).to(tl.float32)
        b_a, b_past = _preactivation(b_x, b_past, b_w, p_index, p_state, i_t, pos, T, m, o_c, C, M)
        b_sigmoid = tl.sigmoid(b_a)
        b_da = b_dc * b_sigmoid * (1 + b_a * (1 - b_sigmoid))
        b_next = (b_da * b_w[0],)
        for lag in tl.static_range(1, M):
            # pos < lag: token t - lag belongs to the document before, and a_t does not depend on it.
            b_next += (b_open[lag - 1] + tl.where(pos >= lag, b_da * b_w[lag], 0.0),)
        b_done = b_next[M - 1]
        b_open = b_next[: M - 1]
        # Before that, the complete sums are those of rows of the segment before, which its own program stores.
        m_done = m_c & (i_t >= begin + M - 1)
        tl.store(p_dx + (o_t - (M - 1)) * C + o_c, b_done.to(p_dx.dtype.element_ty), m_done)


BC = 1024  # q, k and v of the 27B model are 2, 2 and 6 blocks
# Rows of 2 KB, backward two of them a stage: 40 and 48 KB in flight on a multiprocessor.
FORWARD_STAGES, BACKWARD_STAGES = 6, 4
PER_SM = 4  # programs of four warps; 10 blocks x 52 segments on 132 multiprocessors


def _launch(x: Tensor, splits: tuple[int, ...], stages: int) -> tuple[tuple[int, int], int, dict[str, int]]:
    """The grid (column blocks, segments), the tokens of a segment, and the constants."""
    T, sizes = len(x), (*splits, 0, 0)[:3]
    block = min(BC, triton.next_power_of_2(max(splits)))
    blocks = sum(triton.cdiv(size, block) for size in splits)
    length = triton.cdiv(T, persistent_programs(x, T, PER_SM / blocks))
    constants = {f"C{i}": size for i, size in enumerate(sizes)} | {"BC": block, "STAGES": stages, "num_warps": 4}
    return (blocks, triton.cdiv(T, length)), length, constants


def _three(tensors: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Padded with None to the three that the kernels take."""
    return (*tensors, None, None)[:3]


class _CausalConv1dSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, documents, splits, initial_state):
        grid, length, constants = _launch(x, splits, FORWARD_STAGES)
        outputs = tuple(x.new_empty(len(x), size) for size in splits)
        _forward_kernel[grid](
            x, weight, documents.positions, documents.index, initial_state, *_three(outputs),
            len(x), length, x.stride(0), M=weight.shape[1], **constants,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, initial_state)
        ctx.documents, ctx.splits = documents, splits
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        x, weight, initial_state = ctx.saved_tensors
        grid, length, constants = _launch(x, ctx.splits, BACKWARD_STAGES)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grads = [adjacent(dc) for dc in grads]
        strides = (*[dc.stride(0) for dc in grads], 0, 0)[:3]
        _backward_kernel[grid](
            *_three(grads), x, weight, ctx.documents.positions, ctx.documents.index, initial_state, dx,
            len(x), length, *strides, x.stride(0), M=weight.shape[1], **constants,
        )  # fmt: skip
        return dx, None, None, None, None


def causal_conv1d_silu_triton(
    x: Tensor, weight: Tensor, documents: Documents, splits: tuple[int, ...], initial_state: Tensor | None = None
) -> tuple[Tensor, ...]:
    """causal_conv1d_silu_reference in Triton. x may have any row stride. ValueError for more than three splits, for one
    tap, and if weight or initial_state requires a gradient, which they do not get.
    """
    frozen = {"weight": weight} if initial_state is None else {"weight": weight, "initial_state": initial_state}
    check_inputs("causal_conv1d_silu", {"x": x}, frozen)
    if len(splits) > 3 or weight.shape[1] < 2:
        raise ValueError(
            f"causal_conv1d_silu: {len(splits)} splits and {weight.shape[1]} taps; the Triton kernel takes at most 3 "
            "splits and at least 2 taps"
        )
    state = None if initial_state is None else initial_state.contiguous()
    return _CausalConv1dSiLU.apply(x, weight.contiguous(), documents, tuple(splits), state)
