"""The gated delta rule: the recurrence of the linear-attention layers, over packed documents.

Each value head has a state S (K, V), which is zero at the start of every document. With q and k l2-normalised per key
head, q scaled by K^-1/2, beta = sigmoid(b) and g = -exp(A_log) softplus(a + dt_bias) <= 0, one token does

    S <- e^g S          e = v - S^T k          S <- S + k (beta e)^T          o = S^T q

`gated_delta_rule_recurrent` is this line, token by token; `gated_delta_rule_step` is it for a single token. The
reference, which a CPU runs, is the chunk form. In a chunk of BT tokens the rows q_t, k_t, v_t, o_t are the matrices q,
k (BT, K) and v, o (BT, V); row t of R (BT, V) is the beta e of token t; S is the state before the chunk. With c =
cumulative sum of g, c_last its last element, and D_ts = e^(c_t - c_s) for s <= t,

    L_ts = beta_t (k_t . k_s) D_ts (s < t)       (I + L) R = beta (v - e^c k S)
    o = e^c q S + (q k^T * D) R                  S <- e^(c_last) S + (e^(c_last - c) k)^T R

A vector in front of a matrix multiplies its rows. Rounding: everything is fp32 (fp64 in an fp64 model); only o is
rounded. Value head h reads key head h // (H / G).
Source: Gated Delta Networks (arXiv 2412.06464); transformers `torch_chunk_gated_delta_rule`.

The Triton path (chunks of 64) stores no normalised q and k. With q and k as the convolution wrote them, row factors
f_q = K^-1/2 / |q|, f_k = 1 / |k|, and M = (I + L)^-1, P = f_q f_k (q k^T) D,

    E = beta (v - e^c f_k (k S))    R = M E    o = e^c f_q (q S) + P R    S' = e^(c_last) S + k^T (e^(c_last - c) f_k R)

    dR = P^T do + e^(c_last - c) f_k (k dS')        dv = beta M^T dR
    dS = e^(c_last) dS' + q^T (e^c f_q do) - k^T (e^c f_k dv)

and dq, dk, da, db from those (docs/gated-delta-rule.md derives them). The launches, and what each fuses:

    prepare      gates (sigmoid, softplus, cumulative sum), l2 norms, M and P        ops/gated_delta_rule_forward.py
    factors      those of the walks, in both passes: they are not saved
    states       the walk over the chunks of a document: o, final state, checkpoints
    recompute    R and S of every chunk again, in segments of 16 chunks              ops/gated_delta_rule_backward.py
    reverse      the walk back: dv, dS'
    within       gradients of the chunk's matrices, dP and Y, summed over the value heads of a key head; db
    dq, dk       summed over the value heads of a key head, through the norms; da, through the gates

Rounding there: states, the inverse, sums and gates are fp32; the operands of a product are rounded to the inputs' dtype
(among them M, P, E, R, S, dS' and dv). Beside bf16 inputs the four products that complete the inverse are in TF32;
fp32 inputs are multiplied in full fp32. Saved for backward, bytes a token and layer at 27B in bf16 (H 48, G 16), beside
q, k, v, a, b: c, beta and norms 704; M, P 12,288; fp32 states every 1,024 tokens of a document, none for shorter ones,
<= 3,072. The backward pass needs 61 KB a token more for R, S and dS', of one layer at a time. Bytes moved a token:
72 KB forward, 238 KB backward. A chunk that a document does not fill takes as long as a full one.
A_log and dt_bias are frozen: the Triton path raises ValueError if they require a gradient.
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
    """The inputs of the recurrence as columns, for each value head and in `dtype`.

    q, k (T, G, K), v (T, H, V), a, b (T, H)
    -> normalised q and k (T, H, K, 1), v (T, H, V, 1), g and beta (T, H, 1, 1).
    """
    K, group = k.shape[2], v.shape[1] // k.shape[1]
    q = l2_normalise(q.to(dtype)).repeat_interleave(group, dim=1) * K**-0.5
    k = l2_normalise(k.to(dtype)).repeat_interleave(group, dim=1)
    g, beta = decay(a, A_log, dt_bias).to(dtype), b.to(dtype).sigmoid()
    return q[..., None], k[..., None], v.to(dtype)[..., None], g[..., None, None], beta[..., None, None]


def gated_delta_rule_recurrent(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, documents: Documents,
    initial_state: Tensor | None = None, output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The definition, one token after the other; shapes and dtypes as in `gated_delta_rule_reference`."""
    (H, V), K, out_dtype = v.shape[1:], k.shape[2], v.dtype
    q, k, v, g, beta = columns(q, k, v, a, b, A_log, dt_bias, compute_dtype(v))
    outs, final_states = [], []
    for i, (start, end) in enumerate(pairwise(documents.bounds)):
        # A document must not see the state that the one before it left.
        S = v.new_zeros(H, K, V) if initial_state is None else initial_state[i].to(v.dtype)
        for t in range(start, end):
            S = g[t].exp() * S  # forget
            e = v[t] - S.mT @ k[t]  # what is missing at this key
            S = S + k[t] @ (beta[t] * e).mT  # write a share beta of it
            outs.append(S.mT @ q[t])  # read
        final_states.append(S)
    o = torch.stack(outs).squeeze(-1).to(out_dtype)  # (T, H, V)
    return o, torch.stack(final_states) if output_final_state else None


# The chunk form: the same numbers in matrix products. It is what a CPU runs, forward and backward.


def gated_delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, documents: Documents,
    initial_state: Tensor | None = None, output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`gated_delta_rule_recurrent` in chunks of 64 tokens.

    q, k (T, G, K) and v (T, H, V) as the convolution wrote them, a and b (T, H), A_log and dt_bias (H,),
    initial_state (N, H, K, V) fp32 -> o (T, H, V) in v's dtype, final state (N, H, K, V) fp32 or None.
    """
    (H, V), (G, K) = v.shape[1:], k.shape[1:]
    out_dtype, dtype, group = v.dtype, compute_dtype(v), H // G
    BT = min(CHUNK, max(documents.lengths))

    # (T, ...) -> (NC, ..., BT). No chunk lies in two documents. Rows without a token are zero: with k = v = 0 and g = 0
    # they change nothing.
    slot, counts = _chunk_slots(documents, BT)
    NC = sum(counts)

    def to_chunks(x: Tensor) -> Tensor:
        x = x.to(dtype)
        padded = x.new_zeros(NC * BT, *x.shape[1:]).index_copy(0, slot, x)
        return padded.view(NC, BT, *x.shape[1:]).transpose(1, 2)

    q, k = to_chunks(l2_normalise(q.to(dtype)) * K**-0.5), to_chunks(l2_normalise(k.to(dtype)))  # (NC, G, BT, K)
    v = to_chunks(v).unflatten(1, (G, group))  # (NC, G, group, BT, V)
    beta = to_chunks(b.to(dtype).sigmoid()[..., None]).unflatten(1, (G, group))  # (NC, G, group, BT, 1)
    g = to_chunks(decay(a, A_log, dt_bias)[..., None]).unflatten(1, (G, group))
    c = g.cumsum(-2)
    c_to_last = F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)  # c_last - c_t

    eye = torch.eye(BT, dtype=dtype, device=v.device)
    on_or_above = torch.ones_like(eye, dtype=torch.bool).triu()
    # Masked before exp: above the diagonal the exponent is positive and would overflow under strong decay. Exponents
    # that are always 0 (here the diagonal, in c_to_last the last row) must not be differences of c: their gradients of
    # order 1 would be added and subtracted again, and the rounding errors would be larger than the tiny gradients of a
    # strongly decayed state.
    D = (c - c.transpose(-1, -2)).masked_fill_(on_or_above, float("-inf")).exp()  # below the diagonal
    L = (k @ k.transpose(-1, -2))[:, :, None] * (beta * D)
    P = (q @ k.transpose(-1, -2))[:, :, None] * (D + eye)
    k, q = k[:, :, None], q[:, :, None]  # one key head serves its group of value heads
    factors = L, beta * v, (beta * c.exp()) * k, c.exp() * q, P, c[..., -1:, :].exp(), c_to_last.exp() * k
    by_step = zip(*(x.split(counts) for x in factors), strict=True)

    # Step i computes chunk i of all documents that have one. The longest documents come first, so that these documents
    # are always the first ones.
    order = sorted(range(len(documents)), key=lambda i: -documents.lengths[i])
    if initial_state is None:
        S = v.new_zeros(len(order), G, group, K, V)
    else:
        S = initial_state.to(dtype)[order].unflatten(1, (G, group))
    outs, final_states = [], []
    for count, (L_i, v_in, k_in, q_in, P_i, carry, k_out) in zip(counts, by_step, strict=True):
        final_states.append(S[count:])  # of the documents that have ended
        S = S[:count]
        R = torch.linalg.solve_triangular(L_i, v_in - k_in @ S, upper=False, unitriangular=True)
        outs.append(q_in @ S + P_i @ R)
        S = carry * S + k_out.transpose(-1, -2) @ R
    final_states.append(S)

    o = torch.cat(outs).flatten(1, 2).transpose(1, 2).reshape(NC * BT, H, V)[slot].to(out_dtype)
    if not output_final_state:
        return o, None
    # The shortest documents ended first: reversed, the states are in `order`, and then in the documents' own order.
    inverse = torch.tensor(order, device=v.device).argsort()
    return o, torch.cat(final_states[::-1])[inverse].flatten(1, 2)


def _chunk_slots(documents: Documents, BT: int) -> tuple[Tensor, list[int]]:
    """The slot of every token in the padded chunks, (T,) int64, and how many documents have a first, second, ... chunk.

    The first chunks of all documents come first, longest document first, then their second chunks, and so on.
    """

    def build(documents: Documents) -> tuple[Tensor, list[int]]:
        order = sorted(range(len(documents)), key=lambda i: -documents.lengths[i])
        chunks = [-(-length // BT) for length in documents.lengths]  # of each document
        counts = [sum(n_chunks > step for n_chunks in chunks) for step in range(max(chunks))]
        first_chunk = torch.tensor([sum(counts[:step]) for step in range(len(counts))])
        slots = torch.empty(documents.total, dtype=torch.int64)
        for place, i in enumerate(order):
            positions = torch.arange(documents.lengths[i])
            chunk = first_chunk[positions // BT] + place
            slots[documents.bounds[i] : documents.bounds[i + 1]] = chunk * BT + positions % BT
        return documents.to_device(slots), counts

    return documents.table(("delta rule chunks", BT), build)


# Triton: the chunk form in nine launches.


class _GatedDeltaRule(torch.autograd.Function):
    """`frozen` groups what has no gradient: A_log, dt_bias, the schedule, whether the final state is wanted."""

    @staticmethod
    def forward(ctx, q, k, v, a, b, initial_state, frozen):
        A_log, dt_bias, plan, wants_final = frozen
        prepared = forward.prepare(q, k, a, b, A_log, dt_bias, plan)
        factors = forward.state_factors(prepared, k.shape[2])
        save = any(ctx.needs_input_grad)
        o, final, checkpoints = forward.states(q, k, v, prepared, factors, initial_state, plan, wants_final, save)
        if save:
            ctx.save_for_backward(q, k, v, a, initial_state, A_log, dt_bias, checkpoints, *prepared)
            ctx.plan = plan
            # An output that the loss does not use then has the gradient None, not a tensor of zeros.
            ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    def backward(ctx, do, dfinal):
        q, k, v, a, initial_state, A_log, dt_bias, checkpoints, *prepared = ctx.saved_tensors
        prepared, plan = forward.Prepared(*prepared), ctx.plan
        do = torch.zeros_like(v) if do is None else do.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        factors = forward.state_factors(prepared, k.shape[2])  # not saved: 579 bytes a token and layer
        dv, dST, dinitial = backward.reverse(q, k, do, prepared, factors, dfinal, plan, ctx.needs_input_grad[5])
        dq = dk = da = db = None
        if any(ctx.needs_input_grad[i] for i in (0, 1, 3, 4)):
            RT, ST = backward.recompute(k, v, prepared, factors, initial_state, checkpoints, plan)
            dq, dk, da, db = backward.gradients(q, k, a, A_log, dt_bias, do, dv, prepared, factors, RT, ST, dST, plan)
        return dq, dk, dv, da, db, dinitial, None


def gated_delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, documents: Documents,
    initial_state: Tensor | None = None, output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`gated_delta_rule_reference` in three Triton launches forward, six backward.

    q, k, v, a, b have one dtype, fp32 or bf16; each token's row is contiguous, with any stride between rows. K and V
    are powers of two from 16 to 128. ValueError for anything else, and if A_log or dt_bias requires a gradient.
    """
    check_arguments(q, k, v, a, b, A_log, dt_bias)
    if documents.total != v.shape[0]:
        raise ValueError(f"gated_delta_rule: cu_seqlens ends at {documents.total}, v has {v.shape[0]} tokens")
    if initial_state is not None:
        check_state(initial_state, (len(documents), v.shape[1], k.shape[2], v.shape[2]))
    frozen = (A_log, dt_bias, forward.schedule(documents), output_final_state)
    return _GatedDeltaRule.apply(q, k, v, a, b, initial_state, frozen)


def check_arguments(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> None:
    (G, K), (H, V) = k.shape[1:], v.shape[1:]
    if v.dtype not in (torch.float32, torch.bfloat16) or len({x.dtype for x in (q, k, v, a, b)}) > 1:
        dtypes = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v, a, b))
        raise ValueError(f"gated_delta_rule in Triton takes q, k, v, a, b all float32 or all bfloat16, not {dtypes}")
    for name, size in (("K", K), ("V", V)):
        if size not in (16, 32, 64, 128):
            raise ValueError(f"gated_delta_rule in Triton takes head sizes 16, 32, 64 and 128, not {name} = {size}")
    if H % G:
        raise ValueError(f"gated_delta_rule: {H} value heads are no multiple of {G} key heads")
    for name, x in (("q", q), ("k", k), ("v", v), ("a", a), ("b", b)):
        if x[0].numel() and not x[0].is_contiguous():
            raise ValueError(f"gated_delta_rule: the rows of {name} are not contiguous, strides {x.stride()}")
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"gated_delta_rule in Triton keeps {name} frozen: call {name}.requires_grad_(False)")


def check_state(state: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(state.shape) != shape or state.dtype != torch.float32 or not state.is_contiguous():
        actual = f"{tuple(state.shape)} {state.dtype}{'' if state.is_contiguous() else ' not contiguous'}"
        raise ValueError(f"gated_delta_rule: a state is a contiguous fp32 tensor of shape {shape}, not {actual}")
