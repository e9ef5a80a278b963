"""SwiGLU with the adapter terms of gate and up, and the A projection of down.

    g, p = [gate | up] + s u B^T        x = round(silu(g) p)        u' = x A^T (fp32)
    dx += du' A     dp = dx silu(g)     dg = dx p sigmoid(g) (1 + g (1 - sigmoid(g)))
    du = s [dg B_g, dp B_p]     dB = s [dg^T u_g; dp^T u_p]     dA = du'^T x

One rounding at x, one at each of dg and dp. Source: transformers `Qwen3_5MLP`.
"""

import torch.nn.functional as F
from torch import Tensor

from kernels.seams import LoRATerm, add_lora, project


def swiglu_reference(
    gate_up: Tensor, lora: LoRATerm | None = None, lora_A: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """gate_up (T, 2I), lora u (T, 2r), B (2I, r), lora_A (r, I) fp32 -> x (T, I), u (T, r) fp32 or None."""
    size = gate_up.shape[1] // 2
    gate, up = add_lora(gate_up, lora, (size, size)).chunk(2, dim=1)
    x = (F.silu(gate) * up).to(gate_up.dtype)
    return x, project(x, lora_A)
