"""The fused operations of the model, each with a PyTorch reference and a Triton implementation of the same signature.

This file is the public list and the only switch. PSYSAFE_KERNELS chooses:

    auto (default)  Triton for CUDA tensors, the reference otherwise
    triton          Triton always (on a CPU only in Triton's interpreter: TRITON_INTERPRET=1)
    reference       the reference always
"""

import functools
import os
import pkgutil
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.documents import Documents
from kernels.lora_term import LoRATerm, Pending
from kernels.namesake import lookup
from kernels.ops._triton import HAS_TRITON
from kernels.ops.adamw_8bit import adamw_8bit_reference, adamw_8bit_triton
from kernels.ops.attention_decode import attention_decode_reference, attention_decode_triton
from kernels.ops.causal_attention import causal_attention_reference, causal_attention_triton, triton_supports
from kernels.ops.causal_conv1d_silu import causal_conv1d_silu_reference, causal_conv1d_silu_triton
from kernels.ops.causal_conv1d_silu_step import causal_conv1d_silu_step_reference, causal_conv1d_silu_step_triton
from kernels.ops.gated_delta_rule import gated_delta_rule_reference, gated_delta_rule_triton
from kernels.ops.gated_delta_rule_step import gated_delta_rule_step_reference, gated_delta_rule_step_triton
from kernels.ops.gated_rms_norm import gated_rms_norm_reference, gated_rms_norm_triton
from kernels.ops.linear_cross_entropy import linear_cross_entropy_reference, linear_cross_entropy_triton
from kernels.ops.linear_kl import linear_kl_reference, linear_kl_triton
from kernels.ops.qk_norm_rope import qk_norm_rope_reference, qk_norm_rope_triton
from kernels.ops.residual_rms_norm import residual_rms_norm_reference, residual_rms_norm_triton
from kernels.ops.sigmoid_gate import sigmoid_gate_reference, sigmoid_gate_triton
from kernels.ops.swiglu import swiglu_reference, swiglu_triton
from kernels.paper import is_gpu

# Hugging Face has a package of this name, which transformers imports: what is not found here is looked up there.
__path__ = pkgutil.extend_path(__path__, __name__)


def __getattr__(name: str) -> object:
    return lookup(name, __path__)


CHOICES = ("auto", "triton", "reference")


def choice() -> str:
    """The value of PSYSAFE_KERNELS, checked."""
    # Read at every call, so that a test can switch in the middle of a process.
    value = os.environ.get("PSYSAFE_KERNELS", "auto")
    if value not in CHOICES:
        raise ValueError(f"PSYSAFE_KERNELS={value}: expected one of {', '.join(CHOICES)}")
    return value


def runs_triton(x: Tensor) -> bool:
    """Whether an operation on x runs as Triton kernels."""
    value = choice()
    if value == "auto":
        return HAS_TRITON and is_gpu(x.device)
    if value == "triton" and not HAS_TRITON:
        raise ValueError("PSYSAFE_KERNELS=triton: Triton is not installed; use auto or reference")
    if value == "triton" and not is_gpu(x.device) and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("PSYSAFE_KERNELS=triton on a CPU needs Triton's interpreter: set TRITON_INTERPRET=1 as well")
    return value == "triton"


def describe(device: torch.device, head_dim: int) -> str:
    """The line that a run prints at its start: what runs here."""
    x = torch.empty(0, device=device)
    if not runs_triton(x):
        return "PyTorch references" + ("" if choice() == "reference" else f" (no Triton on {device.type})")
    line = "Triton" + ("" if is_gpu(device) else "'s interpreter")
    # Only attention has a size of head that its Triton kernels may not take.
    if triton_supports(head_dim):
        return line
    names = ("causal_attention", "attention_decode")
    return f"{line}; reference for {', '.join(f'{name} (head_dim {head_dim})' for name in names)}"


def switch(reference: Callable, triton_op: Callable) -> Callable:
    """The operation: runs one of the two, depending on the device of its first argument. Both have one signature.

    They are its attributes `reference` and `triton`, so that a test can replace one of them by a wrong version.
    """

    @functools.wraps(reference)
    def op(*args, **kwargs):
        # The first argument is always a tensor of the batch, or of the flat buffer in adamw_8bit.
        x = args[0] if args else next(iter(kwargs.values()))
        # Looked up on op at each call: a test's wrong version, set as op.triton, is the one that runs.
        return (op.triton if runs_triton(x) else op.reference)(*args, **kwargs)

    op.reference, op.triton = reference, triton_op
    return op


residual_rms_norm = switch(residual_rms_norm_reference, residual_rms_norm_triton)
qk_norm_rope = switch(qk_norm_rope_reference, qk_norm_rope_triton)
causal_attention = switch(causal_attention_reference, causal_attention_triton)
attention_decode = switch(attention_decode_reference, attention_decode_triton)
sigmoid_gate = switch(sigmoid_gate_reference, sigmoid_gate_triton)
causal_conv1d_silu = switch(causal_conv1d_silu_reference, causal_conv1d_silu_triton)
causal_conv1d_silu_step = switch(causal_conv1d_silu_step_reference, causal_conv1d_silu_step_triton)
gated_delta_rule = switch(gated_delta_rule_reference, gated_delta_rule_triton)
gated_delta_rule_step = switch(gated_delta_rule_step_reference, gated_delta_rule_step_triton)
gated_rms_norm = switch(gated_rms_norm_reference, gated_rms_norm_triton)
swiglu = switch(swiglu_reference, swiglu_triton)
linear_cross_entropy = switch(linear_cross_entropy_reference, linear_cross_entropy_triton)
linear_kl = switch(linear_kl_reference, linear_kl_triton)
adamw_8bit = switch(adamw_8bit_reference, adamw_8bit_triton)

# The names of all operations.
OPS = (
    "residual_rms_norm", "qk_norm_rope", "causal_attention", "attention_decode", "sigmoid_gate", "causal_conv1d_silu",
    "causal_conv1d_silu_step", "gated_delta_rule", "gated_delta_rule_step", "gated_rms_norm", "swiglu",
    "linear_cross_entropy", "linear_kl", "adamw_8bit",
)  # fmt: skip

__all__ = ["HAS_TRITON", "OPS", "Documents", "LoRATerm", "Pending", "choice", "describe", "is_gpu", "runs_triton", *OPS]
