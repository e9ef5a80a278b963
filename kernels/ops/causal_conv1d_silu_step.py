"""One token of `causal_conv1d_silu` for each sequence, when text is generated token by token.

    a = w[:, M-1] x + sum_{m < M-1} w[:, m] tail_m      c = round(silu(a))      tail <- tail_1 .. tail_{M-2}, x

x, c (N, C); w (C, M); tail (N, M-1, C): the last M-1 inputs of each sequence, the oldest first, updated in place.

Rounding: a is summed in fp32 from the newest row to the oldest, as in causal_conv1d_silu.py; c is rounded once, the
tail is a copy. One launch, in which every element is read once and written once: at C = 10,240 and M = 4 in bf16
163,840 B a sequence, and 81,920 B of weights. No shape depends on a value, so a CUDA graph can record it. No gradients.
Source: transformers `torch_causal_conv1d_update`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.lora_term import compute_dtype
from kernels.ops._launch import check_inputs
from kernels.ops._triton import tl, triton


def causal_conv1d_silu_step_reference(x: Tensor, weight: Tensor, tail: Tensor) -> Tensor:
    """x (N, C), weight (C, M), tail (N, M-1, C) in x's dtype, updated in place -> c (N, C) in x's dtype."""
    dtype = compute_dtype(x)
    window = torch.cat([tail, x[:, None]], dim=1)  # (N, M, C), the oldest row first
    a = (weight.to(dtype).T * window.to(dtype)).sum(1)  # (N, C)
    tail.copy_(window[:, 1:])
    return F.silu(a).to(x.dtype)


@triton.jit
def _step_kernel(p_x, p_w, p_tail, p_c, stride_x, C: tl.constexpr, M: tl.constexpr, BC: tl.constexpr):
    """Program (block of channels, sequence)."""
    i_n = tl.program_id(1).to(tl.int64)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    p_tail += i_n * (M - 1) * C + o_c
    b_rows = (tl.load(p_x + i_n * stride_x + o_c, m_c, other=0),)  # the newest first
    for m in tl.static_range(1, M):
        b_rows += (tl.load(p_tail + (M - 1 - m) * C, m_c, other=0),)
    b_a = tl.zeros([BC], tl.float32)
    for m in tl.static_range(M):
        b_a += b_rows[m].to(tl.float32) * tl.load(p_w + o_c * M + M - 1 - m, m_c, other=0).to(tl.float32)
    tl.store(p_c + i_n * C + o_c, (b_a * tl.sigmoid(b_a)).to(p_c.dtype.element_ty), m_c)
    # All threads must have read every row before one of them overwrites a row.
    tl.debug_barrier()
    for m in tl.static_range(1, M):
        tl.store(p_tail + (M - 1 - m) * C, b_rows[m - 1], m_c)


# 40 programs a sequence at 27B: a single one already spreads over the GPU.
BC, WARPS = 256, 1


def causal_conv1d_silu_step_triton(x: Tensor, weight: Tensor, tail: Tensor) -> Tensor:
    """causal_conv1d_silu_step_reference in one launch. x may have any row stride. ValueError if the tail is not
    contiguous or has another shape or dtype, and where a gradient would be needed.
    """
    (N, C), M = x.shape, weight.shape[1]
    check_inputs("causal_conv1d_silu_step", {"x": x}, {"weight": weight})
    if tail.shape != (N, M - 1, C) or tail.dtype != x.dtype or not tail.is_contiguous():
        raise ValueError(
            f"causal_conv1d_silu_step: tail is {tail.dtype} {tuple(tail.shape)} with strides {tail.stride()}; "
            f"expected {x.dtype} {(N, M - 1, C)}, contiguous"
        )
    if torch.is_grad_enabled() and (x.requires_grad or tail.requires_grad):
        raise ValueError("causal_conv1d_silu_step has no gradient: call it under torch.no_grad()")
    c = torch.empty(N, C, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(C, BC), N)
    _step_kernel[grid](x, weight.contiguous(), tail, c, x.stride(0), C=C, M=M, BC=BC, num_warps=WARPS)
    return c
