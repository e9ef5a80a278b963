"""The frozen head and the cross-entropy on the trained rows, in chunks, so that a batch's logits never exist at once.

    z = x W^T          loss = sum_i (logsumexp(z_i) - z_i[label_i])          dx = (softmax(z) - onehot) W

The gradient is written in the forward pass: the logits of a chunk live only there. Rounding points: logits and their
gradient in the activation dtype (they are GEMM operands), log-sum-exp and loss in fp32, dx in the activation dtype.
W gets no gradient (the head is frozen).

In Triton a chunk is one GEMM, one kernel, one GEMM. A program owns a row of logits: one sweep for the log-sum-exp
(online: every lane keeps its own maximum and sum, joined at the end), a second that turns logits into their gradient in
place. The second sweep runs from the end of the row to its start, so that it first meets what the L2 cache still holds.
Bytes a row at V = 248,320 in bf16: 1.5 MB at most (two reads, one write), 0.5 MB where no gradient is wanted. One
buffer of logits serves all chunks. No host synchronisation: the row losses are added on the device in a fixed order.

Backward multiplies the stored dx by the upstream gradient, a scalar on the device: out of place, because a graph may be
walked twice and dx is small (10,240 B a row at D = 5,120, which is also all that is saved).
A label outside [0, V) reads nothing out of bounds: its loss and its row of dx become NaN, which the optimiser's
non-finite rule catches. (The reference raises on a CPU.)
"""

import torch
from torch import Tensor

from kernels.lora_term import compute_dtype
from kernels.ops._launch import check_inputs
from kernels.ops._triton import tl, triton

CHUNK_ROWS = 2048  # at least, where there are as many; 1.0 to 2.0 GB of logits at V = 248,320 in bf16


def chunks(rows: int) -> list[slice]:
    """Equal chunks of CHUNK_ROWS to twice that: a short last one would leave the GEMM's tiles half empty."""
    size = max(1, -(-rows // max(1, rows // CHUNK_ROWS)))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        loss = torch.zeros((), dtype=dtype, device=x.device)
        dx = torch.empty_like(x) if x.requires_grad else None
        for rows in chunks(len(x)):
            z, label = (x[rows] @ weight.T).to(dtype), labels[rows, None]  # (n, V), (n, 1)
            lse = z.logsumexp(1, keepdim=True)  # (n, 1)
            loss += (lse - z.gather(1, label)).sum()
            if dx is not None:
                # In place: at V = 248,320 a second tensor of this size would be another 2 to 4 GB in fp32.
                softmax = z.sub_(lse).exp_()
                dz = softmax.scatter_add_(1, label, torch.full_like(lse, -1))  # softmax(z) - onehot
                dx[rows] = dz.to(x.dtype) @ weight
        ctx.save_for_backward(dx)
        return loss

    @staticmethod
    def backward(ctx, dloss: Tensor):
        (dx,) = ctx.saved_tensors
        return (dx * dloss).to(dx.dtype), None, None


def linear_cross_entropy_reference(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """x (N, D) the hidden rows that predict a trained token, weight (V, D) frozen, labels (N,) int64 -> the *sum* of
    the N cross-entropies, a scalar in fp32 (fp64 for fp64 x). The caller divides by the step's trained tokens.
    """
    return _Reference.apply(x, weight, labels)


# A chunk's labels and losses start anywhere in their tensors: no second compilation for the ones that start odd.
@triton.jit(do_not_specialize_on_alignment=["p_label", "p_loss"])
def _cross_entropy_kernel(
    p_z, p_label, p_loss, V: tl.constexpr, GRAD: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr
):
    """One row: loss = logsumexp(z) - z[label]; if GRAD, z becomes softmax(z) - onehot(label)."""
    i_n = tl.program_id(0).to(tl.int64)
    p_row = p_z + i_n * V
    o_v = tl.arange(0, BV)
    label = tl.load(p_label + i_n)
    exists = (label >= 0) & (label < V)
    b_target = tl.load(p_row + label, exists, other=0).to(tl.float32)  # before the second sweep overwrites it
    # Finite, so that a lane that never meets a logit gives exp(-huge) = 0 and not -inf - -inf.
    b_max = tl.full([BV], -3e38, tl.float32)
    b_sum = tl.zeros([BV], tl.float32)
    N: tl.constexpr = (V + BV - 1) // BV
    for i_v in tl.range(0, N, num_stages=STAGES):
        o = i_v * BV + o_v
        b_z = tl.load(p_row + o, o < V, other=float("-inf")).to(tl.float32)
        b_new = tl.maximum(b_max, b_z)
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.exp(b_z - b_new)
        b_max = b_new
    row_max = tl.max(b_max)
    lse = row_max + tl.log(tl.sum(b_sum * tl.exp(b_max - row_max)))
    lse = tl.where(exists, lse, float("nan"))
    tl.store(p_loss + i_n, lse - b_target)
    if GRAD:
        for i_v in tl.range(0, N, num_stages=STAGES):
            o = (N - 1 - i_v) * BV + o_v
            b_z = tl.load(p_row + o, o < V, other=0).to(tl.float32)
            b_dz = tl.exp(b_z - lse) - tl.where(o == label, 1.0, 0.0)
            tl.store(p_row + o, b_dz.to(p_z.dtype.element_ty), o < V)


# 1,024 threads: one row a multiprocessor, 66 MB of rows at a time, most of which L2 (50 MB) can still hold.
BV, STAGES, WARPS = 8192, 3, 32


def cross_entropy_in_place(logits: Tensor, labels: Tensor, losses: Tensor, gradient: bool) -> None:
    """logits (n, V) dense, labels (n,) int64 -> losses (n,) fp32; if `gradient`, the logits become their gradient."""
    V = logits.shape[1]
    block = min(BV, triton.next_power_of_2(V))
    warps = max(1, min(WARPS, block // 256))
    _cross_entropy_kernel[(len(logits),)](
        logits, labels, losses, V=V, GRAD=gradient, BV=block, STAGES=STAGES, num_warps=warps
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, labels: Tensor, gradient: bool) -> Tensor:
        pieces = chunks(len(x))
        losses = x.new_empty(len(x), dtype=torch.float32)
        buffer = x.new_empty(pieces[0].stop if pieces else 0, len(weight))
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if gradient else None
        for rows in pieces:
            logits = buffer[: rows.stop - rows.start]
            torch.mm(x[rows], weight.T, out=logits)
            cross_entropy_in_place(logits, labels[rows], losses[rows], gradient)
            if gradient:
                torch.mm(logits, weight, out=dx[rows])
        ctx.save_for_backward(dx)
        return losses.sum()

    @staticmethod
    def backward(ctx, dloss: Tensor):
        (dx,) = ctx.saved_tensors
        return dx * dloss, None, None, None


def linear_cross_entropy_triton(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """linear_cross_entropy_reference with the kernel above between two GEMMs. x may be strided by row."""
    check_inputs("linear_cross_entropy", {"x": x}, {"weight": weight})
    if labels.shape != x.shape[:1] or labels.dtype != torch.int64 or weight.dtype != x.dtype:
        raise ValueError(
            f"linear_cross_entropy: labels {tuple(labels.shape)} {labels.dtype}, weight {weight.dtype}; "
            f"expected ({len(x)},) torch.int64 and x's {x.dtype}"
        )
    return _LinearCrossEntropy.apply(x, weight, labels.contiguous(), torch.is_grad_enabled() and x.requires_grad)
