"""The records of all operations, in the order of `kernels.OPS`."""

from kernels.proof.cases import (
    adamw_8bit,
    attention_decode,
    causal_attention,
    causal_conv1d_silu,
    causal_conv1d_silu_step,
    gated_delta_rule,
    gated_delta_rule_step,
    gated_rms_norm,
    linear_cross_entropy,
    linear_kl,
    qk_norm_rope,
    residual_rms_norm,
    sigmoid_gate,
    swiglu,
)
from kernels.proof.contract import Op

OPERATIONS = [
    residual_rms_norm.OP,
    qk_norm_rope.OP,
    causal_attention.OP,
    attention_decode.OP,
    sigmoid_gate.OP,
    causal_conv1d_silu.OP,
    causal_conv1d_silu_step.OP,
    gated_delta_rule.OP,
    gated_delta_rule_step.OP,
    gated_rms_norm.OP,
    swiglu.OP,
    linear_cross_entropy.OP,
    linear_kl.OP,
    adamw_8bit.OP,
]


def operations(names: list[str] | None = None) -> list[Op]:
    """Those of these names, in their order, or all. ValueError for a name that is no operation."""
    known = {op.name: op for op in OPERATIONS}
    for name in names or ():
        if name not in known:
            raise ValueError(f"--op {name}: no operation of that name; expected one of {', '.join(known)}")
    return [known[name] for name in names] if names else OPERATIONS
