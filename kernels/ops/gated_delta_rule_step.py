"""One token of the gated delta rule for each of N sequences, when text is generated token by token.

The formula is that of gated_delta_rule.py, where the letters and the gates g and beta are defined:

    S <- e^g S           forget
    S <- S + k beta (v - S^T k)^T
    o = S^T q

The states S (N, H, K, V) are fp32, whatever the inputs are, and are updated in place. Everything is computed in fp32;
o is rounded once, to v's dtype. Bytes: the state is read and written once, 131 KB for a head of 128 x 128; everything
else is small beside it. No gradients. A program owns 32 columns of one head's state: a column needs no other column.
"""

import torch
from torch import Tensor

from kernels.ops._triton import tl, triton
from kernels.ops.gated_delta_rule import check_arguments, check_state, columns
from kernels.ops.gated_delta_rule_forward import L2_EPS, log_decay, tile


def gated_delta_rule_step_reference(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor
) -> Tensor:
    """The recurrence for one token of each of N sequences: q, k (N, G, K), v (N, H, V), a, b (N, H),
    state (N, H, K, V) fp32, updated in place -> o (N, H, V) in v's dtype.
    """
    S, out_dtype = state, v.dtype
    q, k, v, g, beta = columns(q, k, v, a, b, A_log, dt_bias, S.dtype)
    S *= g.exp()  # forget
    e = v - S.mT @ k  # what is missing at this key
    S += k @ (beta * e).mT  # write a share beta of it
    o = S.mT @ q  # read
    return o.squeeze(-1).to(out_dtype)


@triton.jit
def _step_kernel(
    p_q, p_k, p_v, p_a, p_b, p_A_log, p_dt_bias, p_state, p_o, s_q, s_k, s_v, s_a, s_b,
    H: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    i_v, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_k, o_v = tl.arange(0, DK), i_v * BV + tl.arange(0, BV)
    i_hk = i_h // GROUP
    b_q = tl.load(p_q + i_b * s_q + i_hk * DK + o_k).to(tl.float32)
    b_k = tl.load(p_k + i_b * s_k + i_hk * DK + o_k).to(tl.float32)
    b_v = tl.load(p_v + i_b * s_v + i_h * DV + o_v).to(tl.float32)
    b_q *= tl.rsqrt(tl.sum(b_q * b_q, 0) + EPS) * DK**-0.5
    b_k *= tl.rsqrt(tl.sum(b_k * b_k, 0) + EPS)
    beta = tl.sigmoid(tl.load(p_b + i_b * s_b + i_h).to(tl.float32))
    g = log_decay(tl.load(p_a + i_b * s_a + i_h), tl.load(p_A_log + i_h), tl.load(p_dt_bias + i_h))
    p_tile = tile(p_state, i_b * H + i_h, DK, DV, o_k, o_v)
    b_S = tl.load(p_tile) * tl.exp(g)
    b_e = beta * (b_v - tl.sum(b_S * b_k[:, None], 0))
    b_S += b_k[:, None] * b_e[None, :]
    tl.store(p_tile, b_S)
    b_o = tl.sum(b_S * b_q[:, None], 0)
    tl.store(p_o + (i_b * H + i_h) * DV + o_v, b_o.to(p_o.dtype.element_ty))


def gated_delta_rule_step_triton(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor
) -> Tensor:
    """`gated_delta_rule_step_reference` in one launch: reads and writes every state once. Not differentiable.

    Raises ValueError as `gated_delta_rule_triton` does, and where an input requires a gradient.
    """
    check_arguments(q, k, v, a, b, A_log, dt_bias)
    check_state(state, (v.shape[0], v.shape[1], k.shape[2], v.shape[2]))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, a, b, state)):
        raise ValueError("gated_delta_rule_step is for decoding and has no backward: call it under torch.no_grad()")
    (N, H, V), (G, K) = v.shape, k.shape[1:]
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    BV = min(V, 32)
    _step_kernel[(V // BV, H, N)](
        *(q, k, v, a, b, A_log, dt_bias, state, o),
        *(x.stride(0) for x in (q, k, v, a, b)),
        H=H, GROUP=H // G, DK=K, DV=V, BV=BV, EPS=L2_EPS, num_warps=4,
    )  # fmt: skip
    return o
