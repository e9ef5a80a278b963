"""Residual add + RMSNorm, with the adapter term of the layer before and the A projections of the layers after.

    h' = round(h + y + s u B^T)            the residual stream, in the activation dtype
    x  = round(h' rsqrt(mean(h'^2) + eps) (1 + w))
    u' = x A^T                             fp32, one number a token and adapter row

Backward, with r = rsqrt(mean(h'^2) + eps), n = h' r and gradients dh' (from the residual path), dx, du':

    dx += du' A          dn = dx (1 + w)         dh = dh' + r (dn - n mean(dn n))
    dA = du'^T x         dy = dh                 du = s dh B            dB = s dh^T u

Everything between loads and stores is fp32; the two roundings are those above. Bytes a token at D = 5120 in bf16:
forward reads h and y and writes h' and x (40,960 B), backward reads dh', dx, h' and writes dh (40,960 B); the adapter
adds only u, A and B. Formula of the norm: Qwen3.5's zero-centred weight (transformers `Qwen3_5RMSNorm`).
"""

import torch
from torch import Tensor

from kernels.seams import Pending, add_lora, compute_dtype, project


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x rsqrt(mean(x^2) + eps) (1 + w) over the last dimension, not yet rounded."""
    x = x.to(compute_dtype(x))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + weight.to(x.dtype))


def residual_rms_norm_reference(
    h: Tensor, pending: Pending | None, weight: Tensor, eps: float, lora_A: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """h (T, D), pending.y (T, D), weight (D,), lora_A (R, D) fp32 -> h' (T, D), x (T, D), u (T, R) fp32 or None.

    `pending` None (the first layer) leaves h as it is.
    """
    if pending is not None:
        h = (h + add_lora(pending.y, pending.lora, (h.shape[1],))).to(h.dtype)
    x = rms_norm_reference(h, weight, eps).to(h.dtype)
    return h, x, project(x, lora_A)
