"""The gated delta rule: the recurrence of the linear-attention layers, over packed documents.

Per value head, with q and k l2-normalised per key head, q scaled by dk^-1/2, beta = sigmoid(b),
g = -exp(A_log) softplus(a + dt_bias) <= 0 and a state S (dk, dv) that starts at zero in every document:

    S <- e^g S          e = v - S^T k          S <- S + k (beta e)^T          o = S^T q

`gated_delta_rule_recurrent` is these lines, token by token; one of them is `gated_delta_rule_step`. The reference,
which a CPU runs, is the chunk form: within a chunk of C tokens, with c = cumulative sum of g and, for s <= t,
D_ts = e^(c_t - c_s),

    L_ts = beta_t (k_t . k_s) D_ts (s < t)       (I + L) R = beta (V - e^c K S)
    O = e^c Q S + (Q K^T * D) R                  S <- e^(c_C) S + (e^(c_C - c) K)^T R

Everything is fp32 (fp64 in an fp64 model); only o is rounded. Value head h reads key head h // (H / Hk).
Source: Gated Delta Networks (arXiv 2412.06464); transformers `torch_chunk_gated_delta_rule`.

The Triton path (chunks of 64) writes no normalised q and k: with the raw tiles Q, K, row factors
f_q = dk^-1/2 / |q|, f_k = 1 / |k|, and M = (I + L)^-1, P = f_q f_k (Q K^T) D,

    E = beta (V - e^c f_k (K S))    R = M E    O = e^c f_q (Q S) + P R    S' = e^(c_C) S + K^T (e^(c_C - c) f_k R)

    dR = P^T dO + e^(c_C - c) f_k (K dS')        dV = beta M^T dR
    dS = e^(c_C) dS' + Q^T (e^c f_q dO) - K^T (e^c f_k dV)

and dq, dk, da, db from those (docs/gated-delta-rule.md derives them). Launches and what each fuses:

    prepare      gates (sigmoid, softplus, cumulative sum), l2 norms, M and P        ops/gated_delta_rule_forward.py
    states       the walk over a document's chunks: o, final state, checkpoints
    recompute    R and S of every chunk again, in segments of 16 chunks              ops/gated_delta_rule_backward.py
    reverse      the walk back: dv, dS'
    gradients    dq, dk summed over the value heads of a key head, da, db, through norms and gates

Precision: states, the inverse, sums and gates fp32; a dot's operands are rounded to the inputs' dtype (M, P, E, R, S,
dS', dV among them); the inverse's four merging dots in TF32 beside bf16 inputs. fp32 inputs: everything fp32.
Saved for backward, bytes per token and layer at 27B in bf16 (H 48, Hk 16): c, beta, norms 704; M, P 12,288; fp32 states
every 1,024 tokens of a document, none for shorter ones, <= 3,072; beside q, k, v, a, b. Scratch of the backward pass
(R, S, dS') 61 KB a token, freed with it. Bytes moved there, per token: 70 KB forward, 237 KB backward. A chunk that a
document does not fill costs as much as a full one.
A_log and dt_bias are frozen: the Triton path refuses to differentiate them.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.documents import Documents
from kernels.lora_term import compute_dtype
from kernels.ops import gated_delta_rule_backward as backward
from kernels.ops import gated_delta_rule_forward as forward
from kernels.ops.gated_delta_rule_forward import CHUNK, L2_EPS


def l2_normalise(x: Tensor) -> Tensor:
    """x rsqrt(sum x^2 + 1e-6) over the last dimension."""
    return x * (x.square().sum(-1, keepdim=True) + L2_EPS).rsqrt()


def decay(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """g = -exp(A_log) softplus(a + dt_bias): the log of the state's decay, (..., H)."""
    dtype = compute_dtype(a)
    return -A_log.to(dtype).exp() * F.softplus(a.to(dtype) + dt_bias.to(dtype))


def columns(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """What the recurrence reads of n tokens, by value head and in `dtype`: normalised q and k (n, H, dk, 1),
    v (n, H, dv, 1), g and beta (n, H, 1, 1). q, k (n, Hk, dk), v (n, H, dv), a, b (n, H).
    """
    dk, group = k.shape[2], v.shape[1] // k.shape[1]
    q = l2_normalise(q.to(dtype)).repeat_interleave(group, dim=1) * dk**-0.5
    k = l2_normalise(k.to(dtype)).repeat_interleave(group, dim=1)
    g, beta = decay(a, A_log, dt_bias).to(dtype), b.to(dtype).sigmoid()
    return q[..., None], k[..., None], v.to(dtype)[..., None], g[..., None, None], beta[..., None, None]


def gated_delta_rule_recurrent(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, documents: Documents,
    initial_state: Tensor | None = None, output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The definition, one token after the other; shapes and dtypes as in `gated_delta_rule_reference`."""
    (H, dv), dk, out_dtype = v.shape[1:], k.shape[2], v.dtype
    q, k, v, g, beta = columns(q, k, v, a, b, A_log, dt_bias, compute_dtype(v))
    outs, final_states = [], []
    for i, (start, end) in enumerate(pairwise(documents.bounds)):
        # A document never sees the state that the one before it has left.
        S = v.new_zeros(H, dk, dv) if initial_state is None else initial_state[i].to(v.dtype)
        for t in range(start, end):
            S = g[t].exp() * S  # forget
            e = v[t] - S.mT @ k[t]  # what is missing at this key
            S = S + k[t] @ (beta[t] * e).mT  # write a share beta of it
            outs.append(S.mT @ q[t])  # read
        final_states.append(S)
    o = torch.stack(outs).squeeze(-1).to(out_dtype)  # (T, H, dv)
    return o, torch.stack(final_states) if output_final_state else None


# The chunk form: the same numbers in matrix products. It is what a CPU runs, forward and backward.


def gated_delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, documents: Documents,
    initial_state: Tensor | None = None, output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`gated_delta_rule_recurrent` in chunks of 64 tokens.

    q, k (T, Hk, dk) and v (T, H, dv) as the convolution wrote them, a and b (T, H), A_log and dt_bias (H,),
    initial_state (n, H, dk, dv) fp32 -> o (T, H, dv) in v's dtype, final state (n, H, dk, dv) fp32 or None.
    """
    (H, dv), (Hk, dk) = v.shape[1:], k.shape[1:]
    out_dtype, dtype, group = v.dtype, compute_dtype(v), H // Hk
    chunk = min(CHUNK, max(documents.lengths))

    # (T, ...) -> (chunks, ..., C): a chunk never crosses a document; its tail is zero (k = v = 0, g = 0: no effect).
    slot, live = _chunk_slots(documents, chunk)
    chunks = sum(live)

    def to_chunks(x: Tensor) -> Tensor:
        x = x.to(dtype)
        padded = x.new_zeros(chunks * chunk, *x.shape[1:]).index_copy(0, slot, x)
        return padded.view(chunks, chunk, *x.shape[1:]).transpose(1, 2)

    q, k = to_chunks(l2_normalise(q.to(dtype)) * dk**-0.5), to_chunks(l2_normalise(k.to(dtype)))  # (NC, Hk, C, dk)
    v = to_chunks(v).unflatten(1, (Hk, group))  # (NC, Hk, group, C, dv)
    beta = to_chunks(b.to(dtype).sigmoid()[..., None]).unflatten(1, (Hk, group))  # (NC, Hk, group, C, 1)
    g = to_chunks(decay(a, A_log, dt_bias)[..., None]).unflatten(1, (Hk, group))
    c = g.cumsum(-2)
    rest = F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)  # c_C - c_t

    eye = torch.eye(chunk, dtype=dtype, device=v.device)
    after = torch.ones_like(eye, dtype=torch.bool).triu()
    # -inf before exp: above the diagonal the exponent is positive and would overflow under strong decay. Exponents that
    # are always 0 (here the diagonal, below the last row of `rest`) must not be differences of c: their O(1) gradients
    # would be added and subtracted again and bury the tiny ones of a strongly decayed state.
    D = (c - c.transpose(-1, -2)).masked_fill_(after, float("-inf")).exp()  # strictly lower
    L = (k @ k.transpose(-1, -2))[:, :, None] * (beta * D)
    P = (q @ k.transpose(-1, -2))[:, :, None] * (D + eye)
    k, q = k[:, :, None], q[:, :, None]  # one key head serves its group of value heads
    factors = L, beta * v, (beta * c.exp()) * k, c.exp() * q, P, c[..., -1:, :].exp(), rest.exp() * k
    by_step = zip(*(x.split(live) for x in factors), strict=True)

    # All documents that have a chunk left advance together; the longest come first, so that they are a prefix.
    order = sorted(range(len(documents)), key=lambda i: -documents.lengths[i])
    if initial_state is None:
        S = v.new_zeros(len(order), Hk, group, dk, dv)
    else:
        S = initial_state.to(dtype)[order].unflatten(1, (Hk, group))
    outs, final = [], []
    for n, (L_n, v_in, k_in, q_in, P_n, keep, k_out) in zip(live, by_step, strict=True):
        final.append(S[n:])
        S = S[:n]
        R = torch.linalg.solve_triangular(L_n, v_in - k_in @ S, upper=False, unitriangular=True)
        outs.append(q_in @ S + P_n @ R)
        S = keep * S + k_out.transpose(-1, -2) @ R
    final.append(S)

    o = torch.cat(outs).flatten(1, 2).transpose(1, 2).reshape(chunks * chunk, H, dv)[slot].to(out_dtype)
    if not output_final_state:
        return o, None
    inverse = torch.tensor(order, device=v.device).argsort()
    return o, torch.cat(final[::-1])[inverse].flatten(1, 2)


def _chunk_slots(documents: Documents, chunk: int) -> tuple[Tensor, list[int]]:
    """The slot of every token in the padded chunks, (T,) int64, and how many documents have a first, second, ... chunk.

    The first chunks of all documents come first, longest document first, then their second chunks, and so on.
    """

    def build(d: Documents) -> tuple[Tensor, list[int]]:
        order = sorted(range(len(d)), key=lambda i: -d.lengths[i])
        counts = [-(-n // chunk) for n in d.lengths]
        live = [sum(count > step for count in counts) for step in range(max(counts))]
        first = [sum(live[:step]) for step in range(len(live))]
        slots = torch.empty(d.total, dtype=torch.int64)
        for place, i in enumerate(order):
            steps, within = torch.arange(d.lengths[i]) // chunk, torch.arange(d.lengths[i]) % chunk
            slots[d.bounds[i] : d.bounds[i + 1]] = (torch.tensor(first)[steps] + place) * chunk + within
        return d.to_device(slots), live

    return documents.table(("delta rule chunks", chunk), build)


# Triton: the chunk form in five launches.


class _GatedDeltaRule(torch.autograd.Function):
    """`frozen` groups what has no gradient: A_log, dt_bias, the schedule, whether the final state is wanted."""

    @staticmethod
    def forward(ctx, q, k, v, a, b, initial_state, frozen):
        A_log, dt_bias, plan, want_final = frozen
        x = forward.prepare(q, k, a, b, A_log, dt_bias, plan)
        save = any(ctx.needs_input_grad)
        o, final, checkpoints = forward.states(q, k, v, x, initial_state, plan, want_final, save)
        if save:
            ctx.save_for_backward(q, k, v, a, initial_state, A_log, dt_bias, checkpoints, *x)
            ctx.plan = plan
            ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    def backward(ctx, do, dfinal):
        q, k, v, a, initial_state, A_log, dt_bias, checkpoints, *x = ctx.saved_tensors
        x, plan = forward.Prepared(*x), ctx.plan
        do = torch.zeros_like(v) if do is None else do.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        dv, dS, dinitial = backward.reverse(q, k, do, x, dfinal, plan, ctx.needs_input_grad[5])
        others = (None,) * 4
        if any(ctx.needs_input_grad[i] for i in (0, 1, 3, 4)):
            R, S = backward.recompute(k, v, x, initial_state, checkpoints, plan)
            others = backward.gradients(q, k, a, A_log, dt_bias, do, dv, x, R, S, dS, plan)
        dq, dk, da, db = others
        return dq, dk, dv, da, db, dinitial, None


def gated_delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, documents: Documents,
    initial_state: Tensor | None = None, output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`gated_delta_rule_reference` in two Triton launches forward, three backward.

    q, k, v, a, b in one dtype, fp32 or bf16; their rows may be strided, a row itself is contiguous. dk and dv are
    powers of two from 16 to 128. Raises ValueError for anything else, and if A_log or dt_bias requires a gradient.
    """
    check_arguments(q, k, v, a, b, A_log, dt_bias)
    if documents.total != v.shape[0]:
        raise ValueError(f"gated_delta_rule: cu_seqlens ends at {documents.total}, v has {v.shape[0]} tokens")
    if initial_state is not None:
        check_state(initial_state, (len(documents), v.shape[1], k.shape[2], v.shape[2]))
    frozen = (A_log, dt_bias, forward.schedule(documents), output_final_state)
    return _GatedDeltaRule.apply(q, k, v, a, b, initial_state, frozen)


def check_arguments(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> None:
    (Hk, dk), (H, dv) = k.shape[1:], v.shape[1:]
    if v.dtype not in (torch.float32, torch.bfloat16) or len({x.dtype for x in (q, k, v, a, b)}) > 1:
        found = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v, a, b))
        raise ValueError(f"gated_delta_rule in Triton takes q, k, v, a, b all float32 or all bfloat16, not {found}")
    for name, d in (("dk", dk), ("dv", dv)):
        if d not in (16, 32, 64, 128):
            raise ValueError(f"gated_delta_rule in Triton takes head sizes 16, 32, 64 and 128, not {name} = {d}")
    if H % Hk:
        raise ValueError(f"gated_delta_rule: {H} value heads are no multiple of {Hk} key heads")
    for name, x in (("q", q), ("k", k), ("v", v), ("a", a), ("b", b)):
        if x[0].numel() and not x[0].is_contiguous():
            raise ValueError(f"gated_delta_rule: the rows of {name} are not contiguous, strides {x.stride()}")
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"gated_delta_rule in Triton keeps {name} frozen: call {name}.requires_grad_(False)")


def check_state(state: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(state.shape) != shape or state.dtype != torch.float32 or not state.is_contiguous():
        found = f"{tuple(state.shape)} {state.dtype}{'' if state.is_contiguous() else ' not contiguous'}"
        raise ValueError(f"gated_delta_rule: a state is a contiguous fp32 tensor of shape {shape}, not {found}")
