"""The frozen head and the cross-entropy on the trained rows, in chunks, so that a batch's logits never exist at once.

    z = x W^T          loss = sum_i (logsumexp(z_i) - z_i[label_i])          dx = (softmax(z) - onehot) W

The gradient is written in the forward pass: the logits of a chunk live only there. Rounding points: logits and their
gradient in the activation dtype (they are GEMM operands), log-sum-exp and loss in fp32, dx in the activation dtype.
W gets no gradient (the head is frozen).
"""

import torch
from torch import Tensor

from kernels.seams import compute_dtype

CHUNK_ROWS = 2048


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        loss = torch.zeros((), dtype=dtype, device=x.device)
        dx = torch.empty_like(x) if x.requires_grad else None
        for start in range(0, len(x), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = (x[rows] @ weight.T).to(dtype)
            target = labels[rows, None]
            lse = logits.logsumexp(1, keepdim=True)
            loss += (lse - logits.gather(1, target)).sum()
            if dx is not None:
                dz = logits.sub_(lse).exp_()
                dz.scatter_add_(1, target, torch.full_like(lse, -1))
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
    return _LinearCrossEntropy.apply(x, weight, labels)
