"""The gated delta rule: the recurrence of the linear-attention layers, over packed documents.

Per value head, with q and k l2-normalised per key head, q scaled by dk^-1/2, beta = sigmoid(b),
g = -exp(A_log) softplus(a + dt_bias) <= 0 and a state S (dk, dv) that starts at zero in every document:

    S <- e^g S          e = v - S^T k          S <- S + k (beta e)^T          o = S^T q

The reference uses the chunk form: within a chunk of C tokens, c = cumulative sum of g and D_ts = e^(c_t - c_s), s <= t,

    L_ts = beta_t (k_t . k_s) D_ts (s < t)       (I + L) U = beta V        (I + L) W = beta e^c K
    R = U - W S        O = e^c Q S + (Q K^T * D) R        S <- e^(c_C) S + (e^(c_C - c) K)^T R

Everything is fp32 (fp64 in an fp64 model); only o is rounded. Value head h reads key head h // (H / Hk).
Source: Gated Delta Networks (arXiv 2412.06464); transformers `torch_chunk_gated_delta_rule`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.seams import Documents, compute_dtype

CHUNK = 64
L2_EPS = 1e-6


def l2_normalise(x: Tensor) -> Tensor:
    """x rsqrt(sum x^2 + 1e-6) over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def decay(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """g = -exp(A_log) softplus(a + dt_bias): the log of the state's decay, (..., H)."""
    dtype = compute_dtype(a)
    return -A_log.to(dtype).exp() * F.softplus(a.to(dtype) + dt_bias.to(dtype))


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    documents: Documents,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """q, k (T, Hk, dk) and v (T, H, dv) as the convolution wrote them, a and b (T, H), A_log and dt_bias (H,),
    initial_state (n, H, dk, dv) fp32 -> o (T, H, dv) in v's dtype, final state (n, H, dk, dv) fp32 or None.
    """
    (H, dv), (Hk, dk) = v.shape[1:], k.shape[1:]
    out_dtype, dtype, group = v.dtype, compute_dtype(v), H // Hk
    chunk = min(CHUNK, max(documents.lengths))

    # (T, ...) -> (chunks, ..., C): a chunk never crosses a document; its tail is zero (k = v = 0, g = 0: no effect).
    slot, counts = _chunk_slots(documents, chunk)
    chunks = sum(counts)

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
    before = torch.ones_like(eye, dtype=torch.bool).tril(-1)
    # -inf before exp: above the diagonal the exponent is positive and would overflow under strong decay. Exponents that
    # are always 0 (here the diagonal, below the last row of `rest`) must not be differences of c: their O(1) gradients
    # would be added and subtracted again and bury the tiny ones of a strongly decayed state.
    D = (c - c.transpose(-1, -2)).masked_fill(~before, float("-inf")).exp() + eye
    L = (beta * (k @ k.transpose(-1, -2))[:, :, None] * D).tril(-1)
    P = (q @ k.transpose(-1, -2))[:, :, None] * D
    k, q = k[:, :, None], q[:, :, None]  # one key head serves its group of value heads
    rhs = torch.cat([beta * v, beta * c.exp() * k], dim=-1)
    U, W = torch.linalg.solve_triangular(L, rhs, upper=False, unitriangular=True).split([dv, dk], dim=-1)
    q_in = c.exp() * q
    k_out = rest.exp() * k
    keep = c[..., -1:, :].exp()

    # Longest documents first: those with a chunk left are then a prefix, and all of them advance together.
    order = sorted(range(len(counts)), key=lambda i: -counts[i])
    first = [sum(counts[:i]) for i in range(len(counts))]
    if initial_state is None:
        S = v.new_zeros(len(counts), Hk, group, dk, dv)
    else:
        S = initial_state.to(dtype)[order].unflatten(1, (Hk, group))
    outs, where, final = [], [], []
    for step in range(max(counts)):
        live = [i for i in order if counts[i] > step]
        final.append(S[len(live) :])
        S = S[: len(live)]
        at = torch.tensor([first[i] + step for i in live], device=v.device)
        R = U[at] - W[at] @ S
        outs.append(q_in[at] @ S + P[at] @ R)
        where.append(at)
        S = keep[at] * S + k_out[at].transpose(-1, -2) @ R
    final.append(S)

    o = torch.cat(outs)[torch.cat(where).argsort()]  # back to the order of the chunks
    o = o.flatten(1, 2).transpose(1, 2).reshape(chunks * chunk, H, dv)[slot].to(out_dtype)
    if not output_final_state:
        return o, None
    inverse = torch.tensor(order, device=v.device).argsort()
    return o, torch.cat(final[::-1])[inverse].flatten(1, 2)


def _chunk_slots(documents: Documents, chunk: int) -> tuple[Tensor, list[int]]:
    """The slot of every token in the padded chunks, (T,) int64, and the number of chunks of every document."""

    def build(d: Documents) -> tuple[Tensor, list[int]]:
        counts = [-(-n // chunk) for n in d.lengths]
        starts = [chunk * sum(counts[:i]) for i in range(len(counts))]
        slots = [start + torch.arange(n) for start, n in zip(starts, d.lengths, strict=True)]
        return d.to_device(torch.cat(slots)), counts

    return documents.table(("delta rule chunks", chunk), build)


def gated_delta_rule_step_reference(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor
) -> Tensor:
    """One token for each of B sequences: q, k (B, Hk, dk), v (B, H, dv), a, b (B, H), state (B, H, dk, dv) fp32,
    updated in place -> o (B, H, dv) in v's dtype.
    """
    dtype, group = state.dtype, v.shape[1] // k.shape[1]
    q = (l2_normalise(q.to(dtype)) * q.shape[-1] ** -0.5).repeat_interleave(group, 1)
    k = l2_normalise(k.to(dtype)).repeat_interleave(group, 1)
    state *= decay(a, A_log, dt_bias).to(dtype).exp()[..., None, None]
    e = v.to(dtype) - torch.einsum("bhkv,bhk->bhv", state, k)
    state += torch.einsum("bhk,bhv->bhkv", k, b.to(dtype).sigmoid()[..., None] * e)
    return torch.einsum("bhkv,bhk->bhv", state, q).to(v.dtype)
