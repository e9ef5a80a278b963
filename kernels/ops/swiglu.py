"""SwiGLU with the adapter terms of gate and up, and the A projection of down.

    [gate | up] += s u B^T              x = round(silu(gate) up)    u' = x A^T (fp32)
    dx += du' A     dup = dx silu(gate)     dgate = dx up sigmoid(gate) (1 + gate (1 - sigmoid(gate)))
    du = s [dgate B_gate, dup B_up]     dB = s [dgate^T u_gate; dup^T u_up]     dA = du'^T x

gate, up, x (T, I); gate_up (T, 2I) is what the GEMM wrote; u = [u_gate | u_up] (T, 2r); B = [B_gate; B_up] (2I, r);
A (r, I), u' (T, r).

Rounding: fp32 from load to store; x, dgate and dup are rounded once. u' reads the rounded x. In Triton a program owns a
block of columns and walks over tokens, with its part of B, A and of the sums dB and dA in registers. So it reads B and
A once. (A program that owned rows would read 209 KB of them from L2 for every row of 104 KB.) The price: u' and du sum
over a row, so each program writes one float a token (17 column blocks at I = 17,408), and a second pass adds them. dB
and dA likewise: each segment of tokens writes one row of each, and a second pass adds them.

Bytes a token at I = 17,408 in bf16: forward reads gate_up and writes x (104,448 B), backward reads dx and gate_up and
writes dgate_up (174,080 B); the partial sums add under 2 % at 4,096 tokens. Saved for backward: gate_up, the GEMM's own
output (69,632 B a token), and u (8 B); x is recomputed. Source: transformers `Qwen3_5MLP`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.lora_term import LoRATerm, add_lora, add_lora_by_projection, lora_u
from kernels.ops._launch import adjacent, check_inputs, fuses_A, fuses_B, persistent_programs
from kernels.ops._triton import tl, triton


def swiglu_reference(
    gate_up: Tensor, lora: LoRATerm | None = None, lora_A: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """gate_up (T, 2I), lora u (T, 2r), B (2I, r), lora_A (r, I) fp32 -> x (T, I), u (T, r) fp32 or None."""
    I = gate_up.shape[1] // 2
    gate, up = add_lora_by_projection(gate_up, lora, (I, I))  # (T, I) each
    x = (F.silu(gate) * up).to(gate_up.dtype)
    return x, lora_u(x, lora_A)


# Triton. Grid: (column blocks, segments). Segment i works on the tiles i, i + segments, ... of BT tokens each; loads of
# its next tiles are in flight (STAGES) while it computes one.


@triton.jit
def _gate_and_up(p_gate_up, p_u, b_B_gate, b_B_up, o_t, o_i, m_t, m, stride, I: tl.constexpr):
    """gate and up (BT, BI) in fp32 with their adapter terms, and their u (BT, 1). The B blocks come multiplied by s."""
    p_gate = p_gate_up + o_t[:, None] * stride + o_i[None, :]
    b_gate = tl.load(p_gate, m, other=0).to(tl.float32)
    b_up = tl.load(p_gate + I, m, other=0).to(tl.float32)
    b_u_gate, b_u_up = 0.0, 0.0
    if p_u is not None:
        b_u_gate = tl.load(p_u + 2 * o_t, m_t, other=0)[:, None]
        b_u_up = tl.load(p_u + 2 * o_t + 1, m_t, other=0)[:, None]
        b_gate += b_u_gate * b_B_gate
        b_up += b_u_up * b_B_up
    return b_gate, b_up, b_u_gate, b_u_up


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    p_gate_up, p_u, p_B, p_A, p_x, p_u_parts, T, stride, scale,
    I: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """p_B None: no term for gate and up. p_A None: no u'; p_u_parts (T, column blocks)."""
    i_b, blocks = tl.program_id(0), tl.num_programs(0)
    o_i = i_b * BI + tl.arange(0, BI)
    m_i = o_i < I
    b_B_gate, b_B_up = 0.0, 0.0
    if p_B is not None:
        b_B_gate = scale * tl.load(p_B + o_i, m_i, other=0)[None, :]
        b_B_up = scale * tl.load(p_B + I + o_i, m_i, other=0)[None, :]
    if p_A is not None:
        b_A = tl.load(p_A + o_i, m_i, other=0)[None, :]
    for i_t in tl.range(tl.program_id(1), tl.cdiv(T, BT), tl.num_programs(1), num_stages=STAGES):
        o_t = (i_t * BT + tl.arange(0, BT)).to(tl.int64)
        m_t = o_t < T
        m = m_t[:, None] & m_i[None, :]
        b_gate, b_up, _, _ = _gate_and_up(p_gate_up, p_u, b_B_gate, b_B_up, o_t, o_i, m_t, m, stride, I)
        b_x = (b_gate * tl.sigmoid(b_gate) * b_up).to(p_x.dtype.element_ty)
        tl.store(p_x + o_t[:, None] * I + o_i[None, :], b_x, m)
        if p_A is not None:
            # u' reads the rounded x, as the GEMM does. Columns beyond I hold x = 0 and A = 0: the sum needs no mask.
            tl.store(p_u_parts + o_t * blocks + i_b, tl.sum(b_x.to(tl.float32) * b_A, 1), m_t)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    p_dx, p_du_out, p_gate_up, p_u, p_B, p_A, p_dgate_up, p_du_parts, p_partial, T, stride_dx, stride, scale,
    I: tl.constexpr, WANTS_DA: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """p_partial (segments, rows, I): dB of gate and dB of up if p_B is given, then dA if WANTS_DA."""
    i_b, blocks = tl.program_id(0), tl.num_programs(0)
    o_i = i_b * BI + tl.arange(0, BI)
    m_i = o_i < I
    b_B_gate, b_B_up = 0.0, 0.0
    if p_B is not None:
        b_B_gate = scale * tl.load(p_B + o_i, m_i, other=0)[None, :]
        b_B_up = scale * tl.load(p_B + I + o_i, m_i, other=0)[None, :]
        # One sum for each of the BT tokens of a tile: they are added up once, at the end.
        b_dB_gate = tl.zeros([BT, BI], tl.float32)
        b_dB_up = tl.zeros([BT, BI], tl.float32)
    if p_A is not None:
        b_A = tl.load(p_A + o_i, m_i, other=0)[None, :]
        b_dA = tl.zeros([BT, BI], tl.float32)
    for i_t in tl.range(tl.program_id(1), tl.cdiv(T, BT), tl.num_programs(1), num_stages=STAGES):
        o_t = (i_t * BT + tl.arange(0, BT)).to(tl.int64)
        m_t = o_t < T
        m = m_t[:, None] & m_i[None, :]
        b_gate, b_up, b_u_gate, b_u_up = _gate_and_up(p_gate_up, p_u, b_B_gate, b_B_up, o_t, o_i, m_t, m, stride, I)
        b_dx = tl.load(p_dx + o_t[:, None] * stride_dx + o_i[None, :], m, other=0).to(tl.float32)
        b_sigmoid = tl.sigmoid(b_gate)
        b_silu = b_gate * b_sigmoid
        if p_A is not None:
            b_du_out = tl.load(p_du_out + o_t, m_t, other=0)[:, None]
            b_dx += b_du_out * b_A
            if WANTS_DA:
                # x as forward rounded it (x and dx have one dtype).
                b_dA += b_du_out * (b_silu * b_up).to(p_dx.dtype.element_ty).to(tl.float32)
        b_dup = b_dx * b_silu
        b_dgate = b_dx * b_up * b_sigmoid * (1 + b_gate * (1 - b_sigmoid))
        p_dgate = p_dgate_up + o_t[:, None] * (2 * I) + o_i[None, :]
        tl.store(p_dgate, b_dgate.to(p_dgate_up.dtype.element_ty), m)
        tl.store(p_dgate + I, b_dup.to(p_dgate_up.dtype.element_ty), m)
        if p_B is not None:
            b_dB_gate += b_u_gate * b_dgate
            b_dB_up += b_u_up * b_dup
            # dgate and dup enter dB and du before they are rounded.
            p_du = p_du_parts + (o_t * blocks + i_b) * 2
            tl.store(p_du, tl.sum(b_dgate * b_B_gate, 1), m_t)
            tl.store(p_du + 1, tl.sum(b_dup * b_B_up, 1), m_t)
    DB_ROWS: tl.constexpr = 2 if p_B is not None else 0
    p_partial += tl.program_id(1).to(tl.int64) * ((DB_ROWS + WANTS_DA) * I) + o_i
    if p_B is not None:
        # b_B_* held the scale already, b_u_* did not: dB gets it here, du got it above.
        tl.store(p_partial, scale * tl.sum(b_dB_gate, 0), m_i)
        tl.store(p_partial + I, scale * tl.sum(b_dB_up, 0), m_i)
    if WANTS_DA:
        tl.store(p_partial + DB_ROWS * I, tl.sum(b_dA, 0), m_i)


BI, STAGES = 1024, 4  # 17,408 = 17 x 1,024: no lane idle
FORWARD_BT, BACKWARD_BT = 2, 1  # two tokens backward would take 188 registers, so half the programs a multiprocessor
PER_SM = 4  # programs of four warps: 17 blocks x 31 segments fill 132 multiprocessors exactly once


def _launch(x: Tensor, I: int, BT: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid (column blocks, segments) and constants for rows of I columns, BT tokens at a time."""
    block = min(BI, triton.next_power_of_2(I))
    blocks, tiles = triton.cdiv(I, block), triton.cdiv(len(x), BT)
    segments = persistent_programs(x, tiles, PER_SM / blocks)
    return (blocks, segments), {"BT": BT, "BI": block, "STAGES": STAGES, "num_warps": 4}


def swiglu_backward(
    gate_up: Tensor, u: Tensor | None, B: Tensor | None, lora_A: Tensor | None, scale: float,
    dx: Tensor, du_out: Tensor | None, wanted: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dgate_up (T, 2I), du (T, 2), dB (2I, 1), dA (1, I); of the last three None where `wanted` says False."""
    wants_u, wants_B, wants_A = wanted
    T, I = dx.shape
    grid, constants = _launch(gate_up, I, BACKWARD_BT)
    dB_rows = 2 if B is not None else 0
    dgate_up = gate_up.new_empty(T, 2 * I)
    parts = gate_up.new_empty(T, grid[0], 2, dtype=torch.float32) if dB_rows else None
    sums = gate_up.new_empty(grid[1], dB_rows + wants_A, I, dtype=torch.float32)
    dx = adjacent(dx)
    _backward_kernel[grid](
        dx, du_out.contiguous() if lora_A is not None else None, gate_up, u, B, lora_A, dgate_up, parts, sums,
        T, dx.stride(0), gate_up.stride(0), scale, I=I, WANTS_DA=wants_A, **constants,
    )  # fmt: skip
    total = sums.sum(0)
    du = parts.sum(1) if wants_u else None
    dB = total[:2].reshape(2 * I, 1) if wants_B else None
    return dgate_up, du, dB, total[-1:] if wants_A else None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, u, B, lora_A, scale, dtype):
        T, I = len(gate_up), gate_up.shape[1] // 2
        grid, constants = _launch(gate_up, I, FORWARD_BT)
        x = gate_up.new_empty(T, I, dtype=dtype)
        parts = None if lora_A is None else gate_up.new_empty(T, grid[0], dtype=torch.float32)
        _forward_kernel[grid](gate_up, u, B, lora_A, x, parts, T, gate_up.stride(0), scale, I=I, **constants)
        ctx.save_for_backward(gate_up, u, B, lora_A)
        ctx.scale = scale
        return x, None if parts is None else parts.sum(1, keepdim=True)

    @staticmethod
    def backward(ctx, dx, du_out):
        _, *wanted, _, _ = ctx.needs_input_grad
        return *swiglu_backward(*ctx.saved_tensors, ctx.scale, dx, du_out, wanted), None, None


def swiglu_triton(
    gate_up: Tensor, lora: LoRATerm | None = None, lora_A: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """swiglu_reference in Triton. Terms of rank 1 are fused; for other ranks plain matmuls run before and after the
    kernel. gate_up may have any row stride; its gradient is one dense (T, 2I).
    """
    check_inputs("swiglu", {"gate_up": gate_up}, {})
    dtype, I = gate_up.dtype, gate_up.shape[1] // 2
    if lora is not None and not fuses_B(lora):
        # In fp32: gate_up then enters the kernel unrounded, and x is rounded to the dtype of the original.
        gate_up, lora = add_lora(gate_up, lora, (I, I)), None
    u, B, scale = (None, None, 0.0) if lora is None else (lora.u.contiguous(), lora.B.contiguous(), lora.scale)
    A = lora_A.contiguous() if fuses_A(lora_A) and len(lora_A) == 1 else None
    x, u_out = _SwiGLU.apply(gate_up, u, B, A, scale, dtype)
    return x, u_out if A is not None else lora_u(x, lora_A)
