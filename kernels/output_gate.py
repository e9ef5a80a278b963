"""Attention's output gate, and the A projection of the output layer that reads its result.

    x = round(o sigmoid(gate))      u = x A^T (fp32)
    dx += du A     do = dx sigmoid(gate)     dgate = dx o sigmoid(gate) (1 - sigmoid(gate))     dA = du^T x

Source: transformers `Qwen3_5Attention.forward` (the gate is not normed and acts after the heads are joined).
"""

from torch import Tensor

from kernels.seams import compute_dtype, project


def sigmoid_gate_reference(o: Tensor, gate: Tensor, lora_A: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """o (T, N), gate (T, N), lora_A (r, N) fp32 -> x (T, N), u (T, r) fp32 or None."""
    dtype = compute_dtype(o)
    x = (o.to(dtype) * gate.to(dtype).sigmoid()).to(o.dtype)
    return x, project(x, lora_A)
