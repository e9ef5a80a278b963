"""The fused operations of the model, each with a PyTorch reference and a Triton implementation of the same signature.

This file is the public list and the only switch. PSYSAFE_KERNELS chooses:

    auto (default)  Triton for CUDA tensors, the reference otherwise
    triton          Triton always (on a CPU only in Triton's interpreter: TRITON_INTERPRET=1)
    reference       the reference always
"""

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.documents import Documents
from kernels.lora_term import LoRATerm, Pending
from kernels.ops import adamw_8bit as _adamw
from kernels.ops import attention_decode as _decode_attention
from kernels.ops import causal_attention as _attention
from kernels.ops import causal_conv1d_silu as _conv1d
from kernels.ops import causal_conv1d_silu_step as _conv1d_step
from kernels.ops import gated_delta_rule as _delta_rule
from kernels.ops import gated_rms_norm as _gated_norm
from kernels.ops import linear_cross_entropy as _cross_entropy
from kernels.ops import qk_norm_rope as _rope
from kernels.ops import residual_rms_norm as _rms_norm
from kernels.ops import sigmoid_gate as _output_gate
from kernels.ops import swiglu as _glu
from kernels.ops._triton import HAS_TRITON

CHOICES = ("auto", "triton", "reference")
# Every switched operation: name -> (reference, Triton implementation or None while there is none).
OPS: dict[str, tuple[Callable, Callable | None]] = {}


def choice() -> str:
    """The value of PSYSAFE_KERNELS, checked."""
    value = os.environ.get("PSYSAFE_KERNELS", "auto")
    if value not in CHOICES:
        raise ValueError(f"PSYSAFE_KERNELS={value}: expected one of {', '.join(CHOICES)}")
    return value


def runs_triton(x: Tensor) -> bool:
    """Whether an operation on x runs as Triton kernels."""
    value = choice()
    if value == "auto":
        return HAS_TRITON and x.is_cuda
    if value == "triton" and not HAS_TRITON:
        raise ValueError("PSYSAFE_KERNELS=triton: Triton is not installed; use auto or reference")
    if value == "triton" and not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("PSYSAFE_KERNELS=triton on a CPU needs Triton's interpreter: set TRITON_INTERPRET=1 as well")
    return value == "triton"


def describe(device: torch.device, head_dim: int) -> str:
    """The line that a run prints at its start: what runs here."""
    x = torch.empty(0, device=device)
    if not runs_triton(x):
        return "PyTorch references" + ("" if choice() == "reference" else f" (no Triton on {device.type})")
    plain = [name for name, (_, triton_op) in OPS.items() if triton_op is None]
    if not _attention.triton_supports(head_dim):
        plain += [f"{name} (head_dim {head_dim})" for name in ("causal_attention", "attention_decode")]
    line = "Triton" + ("" if x.is_cuda else "'s interpreter")
    return line + (f"; reference for {', '.join(plain)}" if plain else "")


def _switch(name: str, module) -> Callable:
    reference = getattr(module, f"{name}_reference")
    OPS[name] = (reference, getattr(module, f"{name}_triton", None))

    @functools.wraps(reference)
    def op(*args, **kwargs):
        reference, triton_op = OPS[name]
        x = args[0] if args else next(iter(kwargs.values()))
        return (triton_op if triton_op is not None and runs_triton(x) else reference)(*args, **kwargs)

    op.__name__ = op.__qualname__ = name
    return op


residual_rms_norm = _switch("residual_rms_norm", _rms_norm)
qk_norm_rope = _switch("qk_norm_rope", _rope)
causal_attention = _switch("causal_attention", _attention)
attention_decode = _switch("attention_decode", _decode_attention)
sigmoid_gate = _switch("sigmoid_gate", _output_gate)
causal_conv1d_silu = _switch("causal_conv1d_silu", _conv1d)
causal_conv1d_silu_step = _switch("causal_conv1d_silu_step", _conv1d_step)
gated_delta_rule = _switch("gated_delta_rule", _delta_rule)
gated_delta_rule_step = _switch("gated_delta_rule_step", _delta_rule)
gated_rms_norm = _switch("gated_rms_norm", _gated_norm)
swiglu = _switch("swiglu", _glu)
linear_cross_entropy = _switch("linear_cross_entropy", _cross_entropy)
adamw_8bit = _switch("adamw_8bit", _adamw)

__all__ = ["OPS", "Documents", "LoRATerm", "Pending", "choice", "describe", "runs_triton", *OPS]
