"""The delta-net's gated RMSNorm, and the A projection of the output layer that reads its result.

    x = round(o rsqrt(mean(o^2) + eps) w silu(z))   per value head; w is plain (not 1 + w) and shared by the heads
    u = x A^T (fp32)

One rounding at x. Source: transformers `Qwen3_5RMSNormGated` (norm first, gate second).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.seams import compute_dtype, project


def gated_rms_norm_reference(
    o: Tensor, z: Tensor, weight: Tensor, eps: float, lora_A: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """o (T, H, V), z (T, H*V), weight (V,) fp32, lora_A (r, H*V) fp32 -> x (T, H*V), u (T, r) fp32 or None."""
    dtype = compute_dtype(o)
    n = o.to(dtype)
    n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)
    x = (n.flatten(1) * F.silu(z.to(dtype))).to(o.dtype)
    return x, project(x, lora_A)
