"""Attention's output gate, and the A projection of the output layer that reads its result.

    x = round(o sigmoid(gate))      u = x A^T (fp32)
    dx += du A     do = dx sigmoid(gate)     dgate = dx o sigmoid(gate) (1 - sigmoid(gate))     dA = du^T x

o, gate, x (T, F) with F = H K, the joined heads; A (J, F), u (T, J).

Rounding: fp32 from load to store; x, do and dgate are rounded once, and u reads the rounded x. Bytes a token at
F = 6,144 in bf16: forward reads o and gate and writes x (36,864 B), backward reads dx, o, gate and writes do, dgate
(61,440 B). The adapter adds u, A and the partial sums of dA. Saved for backward: o and gate, which exist anyway.
A forward program owns whole rows, because u sums over a row. Backward sums over no row, so a program owns 1,024 columns
and walks over the tokens, with its columns of dA in registers.
Source: transformers `Qwen3_5Attention.forward` (the gate is not normed and acts after the heads are joined).
"""

import torch
from torch import Tensor

from kernels.lora_term import compute_dtype, lora_u
from kernels.ops._launch import adjacent, check_inputs, fuses_A, persistent_programs
from kernels.ops._triton import tl, triton


def sigmoid_gate_reference(o: Tensor, gate: Tensor, lora_A: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """o (T, F), gate (T, F), lora_A (J, F) fp32 -> x (T, F), u (T, J) fp32 or None."""
    dtype = compute_dtype(o)
    x = (o.to(dtype) * gate.to(dtype).sigmoid()).to(o.dtype)
    return x, lora_u(x, lora_A)


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    p_o, p_gate, p_A, p_x, p_u, T, stride_o, stride_gate,
    F: tl.constexpr, J: tl.constexpr, BF: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program i takes rows i, i + programs, ... A row is a tuple of pieces of BF elements, because
    6,144 is no power of two; piece k of row j of A is b_A[k * J + j] and stays in registers.
    """
    PIECES: tl.constexpr = (F + BF - 1) // BF
    o_f = tl.arange(0, BF)
    b_A = ()
    for k in tl.static_range(PIECES):
        for j in tl.static_range(J):
            b_A += (tl.load(p_A + j * F + k * BF + o_f, mask=k * BF + o_f < F, other=0),)
    for i_t in tl.range(tl.program_id(0), T, tl.num_programs(0), num_stages=STAGES):
        o_t = tl.cast(i_t, tl.int64)  # T * F can pass 2^31
        # One sum for every lane; they are added up once, after the last piece of the row.
        b_dots = ()
        for _ in tl.static_range(J):
            b_dots += (tl.zeros([BF], tl.float32),)
        for k in tl.static_range(PIECES):
            m_f = k * BF + o_f < F
            b_o = tl.load(p_o + o_t * stride_o + k * BF + o_f, mask=m_f, other=0).to(tl.float32)
            b_gate = tl.load(p_gate + o_t * stride_gate + k * BF + o_f, mask=m_f, other=0).to(tl.float32)
            b_x = (b_o * tl.sigmoid(b_gate)).to(p_x.dtype.element_ty)
            tl.store(p_x + o_t * F + k * BF + o_f, b_x, mask=m_f)
            # u reads the rounded x, as the GEMM does. A tuple cannot be changed in place, so the sums are built anew.
            b_new = ()
            for j in tl.static_range(J):
                b_new += (b_dots[j] + b_x.to(tl.float32) * b_A[k * J + j],)
            b_dots = b_new
        for j in tl.static_range(J):
            tl.store(p_u + o_t * J + j, tl.sum(b_dots[j]))


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    p_dx, p_du, p_o, p_gate, p_A, p_do, p_dgate, p_partial, T, stride_dx, stride_o, stride_gate,
    F: tl.constexpr, J: tl.constexpr, BF: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (column block, i) takes tokens i, i + programs, ...; p_partial (programs, J, F)."""
    o_f = tl.program_id(0) * BF + tl.arange(0, BF)
    m_f = o_f < F
    b_A, b_dA = (), ()
    for j in tl.static_range(J):
        b_A += (tl.load(p_A + j * F + o_f, mask=m_f, other=0),)
        b_dA += (tl.zeros([BF], tl.float32),)
    for i_t in tl.range(tl.program_id(1), T, tl.num_programs(1), num_stages=STAGES):
        o_t = tl.cast(i_t, tl.int64)
        b_dx = tl.load(p_dx + o_t * stride_dx + o_f, mask=m_f, other=0).to(tl.float32)
        b_o = tl.load(p_o + o_t * stride_o + o_f, mask=m_f, other=0).to(tl.float32)
        b_sigmoid = tl.sigmoid(tl.load(p_gate + o_t * stride_gate + o_f, mask=m_f, other=0).to(tl.float32))
        b_new = ()
        for j in tl.static_range(J):
            b_du = tl.load(p_du + o_t * J + j)
            b_dx += b_du * b_A[j]
            # x as forward rounded it: dA is the gradient of a product with the rounded x.
            b_new += (b_dA[j] + b_du * (b_o * b_sigmoid).to(p_o.dtype.element_ty).to(tl.float32),)
        b_dA = b_new
        # From here on b_dx holds dx + du A.
        tl.store(p_do + o_t * F + o_f, (b_dx * b_sigmoid).to(p_do.dtype.element_ty), mask=m_f)
        b_dgate = b_dx * b_o * b_sigmoid * (1 - b_sigmoid)
        tl.store(p_dgate + o_t * F + o_f, b_dgate.to(p_dgate.dtype.element_ty), mask=m_f)
    for j in tl.static_range(J):
        p_row = p_partial + (tl.program_id(1) * J + j).to(tl.int64) * F
        tl.store(p_row + o_f, b_dA[j], mask=m_f)


# 1,024 columns of three bf16 tensors are 6 KB of loads a stage. With three stages in flight while the fourth is in use,
# the four programs of a multiprocessor keep 72 KB in flight.
_BACKWARD = {"BF": 1024, "STAGES": 4, "num_warps": 4}


class _SigmoidGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o, gate, lora_A):
        T, F = o.shape
        J = 0 if lora_A is None else len(lora_A)
        x = torch.empty(T, F, dtype=o.dtype, device=o.device)
        u = torch.empty(T, J, dtype=torch.float32, device=o.device) if J else None
        _forward_kernel[(persistent_programs(o, T, per_sm=2),)](
            o, gate, lora_A, x, u, T, o.stride(0), gate.stride(0),
            F=F, J=J, BF=min(1024, triton.next_power_of_2(F)), STAGES=3, num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(o, gate, lora_A)
        return x, u

    @staticmethod
    def backward(ctx, dx, du):
        o, gate, lora_A = ctx.saved_tensors
        T, F = o.shape
        J = 0 if lora_A is None else len(lora_A)
        do, dgate = (torch.empty(T, F, dtype=t.dtype, device=t.device) for t in (o, gate))
        columns = triton.cdiv(F, _BACKWARD["BF"])
        programs = persistent_programs(o, T, per_sm=4 / columns)
        partial = o.new_empty(programs, J, F, dtype=torch.float32)
        dx = adjacent(dx)
        _backward_kernel[(columns, programs)](
            dx, du.contiguous() if J else None, o, gate, lora_A, do, dgate, partial, T,
            dx.stride(0), o.stride(0), gate.stride(0), F=F, J=J, **_BACKWARD,
        )  # fmt: skip
        return do, dgate, partial.sum(0) if J else None


def sigmoid_gate_triton(o: Tensor, gate: Tensor, lora_A: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """sigmoid_gate_reference in Triton. Up to three fp32 rows of A are fused; for more a plain matmul runs after the
    kernel. o and gate may have any row stride.
    """
    check_inputs("sigmoid_gate", {"o": o, "gate": gate}, {})
    A = lora_A.contiguous() if fuses_A(lora_A) else None
    x, u = _SigmoidGate.apply(o, gate, A)
    return x, u if A is not None else lora_u(x, lora_A)
