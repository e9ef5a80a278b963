"""The frozen head and the cross-entropy of the trained tokens, in chunks: a batch's logits never exist all at once.

    z = x weight^T      loss = sum_t (logsumexp(z_t) - z_t[label_t])      dx = (softmax(z) - onehot(label)) weight

x, dx (T, D): the T rows that predict a trained token; weight (vocab, D), z (T, vocab), label (T,).

The gradient is computed in the forward pass, because only there the logits of a chunk exist. Rounding: logits and their
gradient, as operands of GEMMs, in the activation dtype; log-sum-exp and loss in fp32; dx in the activation dtype.
The weight gets no gradient: the head is frozen.

In Triton a chunk is a GEMM, a kernel and a GEMM. A program owns a row of logits. Its first sweep computes the
log-sum-exp online: each lane has a maximum and a sum of its own, and they are joined at the end. The second sweep
replaces logits by their gradient, from the end of the row to its start, because L2 still holds the end.
Bytes a row at vocab = 248,320 in bf16: 1.5 MB at most (two reads, one write), 0.5 MB where no gradient is wanted. One
buffer of logits serves all chunks. The host never waits: the losses of the rows are added on the device, in a fixed
order.

Saved for backward: dx, 10,240 B a row at D = 5,120. Backward multiplies it by the gradient of the loss, a scalar on the
device. A label outside [0, vocab) reads nothing out of bounds: its loss and its row of dx become NaN, and the optimiser
skips a step whose gradient is not finite. (The reference raises on a CPU.)
Source: Liger-Kernel's fused linear cross-entropy (arXiv 2410.10989) for computing the gradient in the forward pass.
"""

import torch
from torch import Tensor

from kernels.lora_term import compute_dtype
from kernels.ops._launch import check_inputs
from kernels.ops._triton import tl, triton

CHUNK_ROWS = 2048  # at least, if there are as many: 1.0 to 2.0 GB of logits at vocab = 248,320 in bf16


def chunks(rows: int, buffers: int = 1) -> list[slice]:
    """Slices of CHUNK_ROWS to 2 CHUNK_ROWS rows; fewer rows are one chunk. buffers: of logits that a chunk needs at a
    time; several share the memory of one.
    """
    # Of equal size: a short last chunk would leave the tiles of its GEMM half empty.
    size = max(1, -(-rows // max(1, rows // (CHUNK_ROWS // buffers))))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        loss = torch.zeros((), dtype=dtype, device=x.device)
        dx = torch.empty_like(x) if x.requires_grad else None
        for rows in chunks(len(x)):
            z, label = (x[rows] @ weight.T).to(dtype), labels[rows, None]  # (rows, vocab), (rows, 1)
            lse = z.logsumexp(1, keepdim=True)  # (rows, 1)
            loss += (lse - z.gather(1, label)).sum()
            if dx is not None:
                # In place: at vocab = 248,320 a second tensor of this size would be another 2 to 4 GB in fp32.
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
    """x (T, D) the hidden rows that predict a trained token, weight (vocab, D) frozen, labels (T,) int64 -> the *sum*
    of the T cross-entropies, a scalar in fp32 (fp64 for fp64 x). The caller divides by the step's trained tokens.
    """
    return _Reference.apply(x, weight, labels)


# A chunk's labels and losses may start at any address. Without this option Triton would compile a second kernel for
# addresses that are not multiples of 16.
@triton.jit(do_not_specialize_on_alignment=["p_label", "p_loss"])
def _cross_entropy_kernel(
    p_z, p_label, p_loss, VOCAB: tl.constexpr, GRAD: tl.constexpr, B_VOCAB: tl.constexpr, STAGES: tl.constexpr
):
    """One row: loss = logsumexp(z) - z[label]; if GRAD, z becomes softmax(z) - onehot(label)."""
    i_t = tl.program_id(0).to(tl.int64)
    p_row = p_z + i_t * VOCAB
    o_v = tl.arange(0, B_VOCAB)
    label = tl.load(p_label + i_t)
    exists = (label >= 0) & (label < VOCAB)
    b_target = tl.load(p_row + label, exists, other=0).to(tl.float32)  # before the second sweep overwrites it
    # Not -inf: a lane without a single logit would compute exp(-inf - -inf) = NaN.
    b_max = tl.full([B_VOCAB], -3e38, tl.float32)
    b_sum = tl.zeros([B_VOCAB], tl.float32)
    BLOCKS: tl.constexpr = (VOCAB + B_VOCAB - 1) // B_VOCAB
    for i_v in tl.range(0, BLOCKS, num_stages=STAGES):
        o = i_v * B_VOCAB + o_v
        b_z = tl.load(p_row + o, o < VOCAB, other=float("-inf")).to(tl.float32)
        # A larger maximum makes the sum so far smaller by the same factor.
        b_new = tl.maximum(b_max, b_z)
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.exp(b_z - b_new)
        b_max = b_new
    row_max = tl.max(b_max)
    lse = row_max + tl.log(tl.sum(b_sum * tl.exp(b_max - row_max)))
    # A label that does not exist must not pass as a loss: NaN reaches the gradient norm, and the step is skipped.
    lse = tl.where(exists, lse, float("nan"))
    tl.store(p_loss + i_t, lse - b_target)
    if GRAD:
        for i_v in tl.range(0, BLOCKS, num_stages=STAGES):
            o = (BLOCKS - 1 - i_v) * B_VOCAB + o_v
            b_z = tl.load(p_row + o, o < VOCAB, other=0).to(tl.float32)
            b_dz = tl.exp(b_z - lse) - tl.where(o == label, 1.0, 0.0)
            tl.store(p_row + o, b_dz.to(p_z.dtype.element_ty), o < VOCAB)


# 1,024 threads: one row a multiprocessor. 132 rows are 66 MB; L2 holds 50 MB of them for the second sweep.
B_VOCAB, STAGES, WARPS = 8192, 3, 32


def cross_entropy_in_place(logits: Tensor, labels: Tensor, losses: Tensor, gradient: bool) -> None:
    """logits (rows, vocab) dense, labels (rows,) int64 -> losses (rows,) fp32. If `gradient`, logits become theirs."""
    vocab = logits.shape[1]
    block = min(B_VOCAB, triton.next_power_of_2(vocab))
    warps = max(1, min(WARPS, block // 256))
    _cross_entropy_kernel[(len(logits),)](
        logits, labels, losses, VOCAB=vocab, GRAD=gradient, B_VOCAB=block, STAGES=STAGES, num_warps=warps
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, labels: Tensor, gradient: bool) -> Tensor:
        slices = chunks(len(x))
        losses = x.new_empty(len(x), dtype=torch.float32)
        # One buffer, as long as the first chunk, which is the longest.
        buffer = x.new_empty(slices[0].stop if slices else 0, len(weight))
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if gradient else None
        for rows in slices:
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
        # Not in place: with retain_graph this may run twice.
        return dx * dloss, None, None, None


def linear_cross_entropy_triton(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """linear_cross_entropy_reference with the kernel above between two GEMMs. x may have any row stride. ValueError for
    labels of another shape or dtype, and if the weight has another dtype than x or requires a gradient.
    """
    check_inputs("linear_cross_entropy", {"x": x}, {"weight": weight})
    if labels.shape != x.shape[:1] or labels.dtype != torch.int64 or weight.dtype != x.dtype:
        raise ValueError(
            f"linear_cross_entropy: labels {tuple(labels.shape)} {labels.dtype}, weight {weight.dtype}; "
            f"expected ({len(x)},) torch.int64 and x's {x.dtype}"
        )
    return _LinearCrossEntropy.apply(x, weight, labels.contiguous(), torch.is_grad_enabled() and x.requires_grad)
