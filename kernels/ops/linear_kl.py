"""The frozen head and the KL divergence from the base to the model, in chunks: logits never exist all at once.

    z = x weight^T      b = base weight^T      p = softmax(z)      q = softmax(b)
    loss = sum_t KL(q_t || p_t) = sum_t sum_v q_tv (log q_tv - log p_tv)          dx = (p - q) weight

x, base, dx (T, D): hidden rows of the model and of its base, at the same T places; weight (vocab, D); z, b (T, vocab).

As in linear_cross_entropy the gradient is computed in the forward pass, because only there the logits of a chunk exist.
The base gets none. Rounding: logits and their gradient, as operands of GEMMs, in the activation dtype; log-sum-exp,
logarithms and loss in fp32; dx in the activation dtype.

In Triton a chunk is two GEMMs, a kernel and a GEMM. A program owns a row of z and of b. Its first sweep computes both
log-sum-exps online, as linear_cross_entropy does; the second one, from the end of the rows to their start, adds up the
loss and replaces z by its gradient. The loss is a sum of terms q (log q - log p): a difference of two sums
would round small divergences some six times as coarsely. Equal rows give exactly 0.
Bytes a row at vocab = 248,320 in bf16: 2.5 MB at most (two reads of both, one write). Two buffers of logits serve all
chunks; a chunk has half the rows of one of linear_cross_entropy, so that both need the same memory at most.

Saved for backward: dx, 10,240 B a row at D = 5,120.
Source: Kullback-Leibler divergence as in knowledge distillation (arXiv 1503.02531), the model's base as the teacher.
"""

import torch
from torch import Tensor

from kernels.lora_term import compute_dtype
from kernels.ops._launch import check_inputs
from kernels.ops._triton import tl, triton
from kernels.ops.linear_cross_entropy import chunks


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, base: Tensor, weight: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        loss = torch.zeros((), dtype=dtype, device=x.device)
        dx = torch.empty_like(x) if x.requires_grad else None
        for rows in chunks(len(x), buffers=2):
            log_p, log_q = ((h[rows] @ weight.T).to(dtype).log_softmax(1) for h in (x, base))  # (rows, vocab)
            q = log_q.exp()
            loss += (q * (log_q - log_p)).sum()
            if dx is not None:
                dx[rows] = (log_p.exp() - q).to(x.dtype) @ weight
        ctx.save_for_backward(dx)
        return loss

    @staticmethod
    def backward(ctx, dloss: Tensor):
        (dx,) = ctx.saved_tensors
        return (dx * dloss).to(dx.dtype), None, None


def linear_kl_reference(x: Tensor, base: Tensor, weight: Tensor) -> Tensor:
    """x, base (T, D) hidden rows of the model and of its base, weight (vocab, D) frozen -> the *sum* of the T
    divergences KL(base || model) in nats, a scalar in fp32 (fp64 for fp64 x). Only x gets a gradient.
    """
    return _Reference.apply(x, base, weight)


# A chunk's losses may start at any address: without this option Triton would compile a second kernel for that.
@triton.jit(do_not_specialize_on_alignment=["p_loss"])
def _kl_divergence_kernel(
    p_z, p_base, p_loss, VOCAB: tl.constexpr, GRAD: tl.constexpr, B_VOCAB: tl.constexpr, STAGES: tl.constexpr
):
    """One row: loss = KL(softmax(base) || softmax(z)); if GRAD, z becomes softmax(z) - softmax(base)."""
    i_t = tl.program_id(0).to(tl.int64)
    p_row, p_base_row = p_z + i_t * VOCAB, p_base + i_t * VOCAB
    o_v = tl.arange(0, B_VOCAB)
    # Not -inf: a lane without a single logit would compute exp(-inf - -inf) = NaN.
    b_max = tl.full([B_VOCAB], -3e38, tl.float32)
    b_base_max = tl.full([B_VOCAB], -3e38, tl.float32)
    b_sum = tl.zeros([B_VOCAB], tl.float32)
    b_base_sum = tl.zeros([B_VOCAB], tl.float32)
    BLOCKS: tl.constexpr = (VOCAB + B_VOCAB - 1) // B_VOCAB
    for i_v in tl.range(0, BLOCKS, num_stages=STAGES):
        o = i_v * B_VOCAB + o_v
        b_z = tl.load(p_row + o, o < VOCAB, other=float("-inf")).to(tl.float32)
        b_base = tl.load(p_base_row + o, o < VOCAB, other=float("-inf")).to(tl.float32)
        b_max_new, b_base_max_new = tl.maximum(b_max, b_z), tl.maximum(b_base_max, b_base)
        b_sum = b_sum * tl.exp(b_max - b_max_new) + tl.exp(b_z - b_max_new)
        b_base_sum = b_base_sum * tl.exp(b_base_max - b_base_max_new) + tl.exp(b_base - b_base_max_new)
        b_max, b_base_max = b_max_new, b_base_max_new
    row_max, base_max = tl.max(b_max), tl.max(b_base_max)
    # The maximum and the logarithm stay apart: their sum would round log p at the size of the largest logit.
    log_sum = tl.log(tl.sum(b_sum * tl.exp(b_max - row_max)))
    base_log_sum = tl.log(tl.sum(b_base_sum * tl.exp(b_base_max - base_max)))
    b_loss = tl.zeros([B_VOCAB], tl.float32)
    for i_v in tl.range(0, BLOCKS, num_stages=STAGES):
        o = (BLOCKS - 1 - i_v) * B_VOCAB + o_v
        b_log_p = tl.load(p_row + o, o < VOCAB, other=0).to(tl.float32) - row_max - log_sum
        b_log_q = tl.load(p_base_row + o, o < VOCAB, other=0).to(tl.float32) - base_max - base_log_sum
        b_q = tl.exp(b_log_q)
        b_loss += tl.where(o < VOCAB, b_q * (b_log_q - b_log_p), 0.0)
        if GRAD:
            tl.store(p_row + o, (tl.exp(b_log_p) - b_q).to(p_z.dtype.element_ty), o < VOCAB)
    tl.store(p_loss + i_t, tl.sum(b_loss))


# Half the columns of linear_cross_entropy's block: with as many, two rows at a time spill in 64 registers a thread.
B_VOCAB, STAGES, WARPS = 4096, 3, 32


def kl_divergence_in_place(logits: Tensor, base_logits: Tensor, losses: Tensor, gradient: bool) -> None:
    """logits, base_logits (rows, vocab) dense -> losses (rows,) fp32. If `gradient`, logits become theirs."""
    vocab = logits.shape[1]
    block = min(B_VOCAB, triton.next_power_of_2(vocab))
    warps = max(1, min(WARPS, block // 128))
    _kl_divergence_kernel[(len(logits),)](
        logits, base_logits, losses, VOCAB=vocab, GRAD=gradient, B_VOCAB=block, STAGES=STAGES, num_warps=warps
    )


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, base: Tensor, weight: Tensor, gradient: bool) -> Tensor:
        slices = chunks(len(x), buffers=2)
        losses = x.new_empty(len(x), dtype=torch.float32)
        # As long as the first chunk, which is the longest.
        buffers = [x.new_empty(slices[0].stop if slices else 0, len(weight)) for _ in range(2)]
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if gradient else None
        for rows in slices:
            logits, base_logits = (buffer[: rows.stop - rows.start] for buffer in buffers)
            torch.mm(x[rows], weight.T, out=logits)
            torch.mm(base[rows], weight.T, out=base_logits)
            kl_divergence_in_place(logits, base_logits, losses[rows], gradient)
            if gradient:
                torch.mm(logits, weight, out=dx[rows])
        ctx.save_for_backward(dx)
        return losses.sum()

    @staticmethod
    def backward(ctx, dloss: Tensor):
        (dx,) = ctx.saved_tensors
        # Not in place: with retain_graph this may run twice.
        return dx * dloss, None, None, None


def linear_kl_triton(x: Tensor, base: Tensor, weight: Tensor) -> Tensor:
    """linear_kl_reference with the kernel above between three GEMMs. x and base may have any row stride. ValueError for
    a base of another shape or dtype than x, a weight of another dtype, and if one of the two requires a gradient.
    """
    check_inputs("linear_kl", {"x": x}, {"base": base, "weight": weight})
    if base.shape != x.shape or base.dtype != x.dtype or weight.dtype != x.dtype:
        raise ValueError(
            f"linear_kl: base {tuple(base.shape)} {base.dtype}, weight {weight.dtype}; expected {tuple(x.shape)} and "
            f"x's {x.dtype}"
        )
    return _LinearKL.apply(x, base, weight, torch.is_grad_enabled() and x.requires_grad)
