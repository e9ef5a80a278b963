"""The gated delta rule: the recurrence of the linear-attention layers, over packed documents.

Each value head has a state S (K, V), which is zero at the start of every document. With q and k l2-normalised per key
head, q scaled by K^-1/2, beta = sigmoid(b) and g = -exp(A_log) softplus(a + dt_bias) <= 0, one token does

    S <- e^g S          e = v - S^T k          S <- S + k (beta e)^T          o = S^T q

`gated_delta_rule_recurrent` is these lines, token by token; one of them is `gated_delta_rule_step`. The reference,
which a CPU runs, is the chunk form. In a chunk of BT tokens the rows q_t, k_t, v_t, o_t are the matrices q, k (BT, K)
and v, o (BT, V). With c = cumulative sum of g, c_last its last element, and D_ts = e^(c_t - c_s) for s <= t,

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
    states       the walk over the chunks of a document: o, final state, checkpoints
    recompute    R and S of every chunk again, in segments of 16 chunks              ops/gated_delta_rule_backward.py
    reverse      the walk back: dv, dS'
    gradients    dq, dk summed over the value heads of a key head, da, db, through norms and gates

Rounding there: states, the inverse, sums and gates are fp32; the operands of a product are rounded to the inputs' dtype
(among them M, P, E, R, S, dS' and dv). Beside bf16 inputs the four products that complete the inverse are in TF32;
fp32 inputs are multiplied in full fp32. Saved for backward, bytes a token and layer at 27B in bf16 (H 48, G 16), beside
q, k, v, a, b: c, beta and norms 704; M, P 12,288; fp32 states every 1,024 tokens of a document, none for shorter ones,
<= 3,072. The backward pass needs 61 KB a token more for R, S and dS', of one layer at a time. Bytes moved a token:
70 KB forward, 237 KB backward. A chunk that a document does not fill takes as long as a full one.
A_log and dt_bias are frozen: the Triton path raises ValueError if they require a gradient.
"""

import sys
from itertools import pairwise
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.documents import Documents
from kernels.lora_term import compute_dtype
from kernels.ops import gated_delta_rule_backward as backward
from kernels.ops import gated_delta_rule_forward as forward
from kernels.ops.gated_delta_rule_forward import CHUNK, L2_EPS
from kernels.proof.closeness import Case
from kernels.proof.protocol import CompileSpec, Work


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

    q, k (T, G, K), v (T, H, V), a, b (T, H) -> normalised q and k (T, H, K, 1), v (T, H, V, 1), g and beta (T, H, 1,
    1).
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


def gated_delta_rule_step_reference(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor
) -> Tensor:
    """The recurrence for one token of each of B sequences: q, k (B, Hk, dk), v (B, H, dv), a, b (B, H),
    state (B, H, dk, dv) fp32, updated in place -> o (B, H, dv) in v's dtype.
    """
    S, out_dtype = state, v.dtype
    q, k, v, g, beta = columns(q, k, v, a, b, A_log, dt_bias, S.dtype)
    S *= g.exp()  # forget
    e = v - S.mT @ k  # what is missing at this key
    S += k @ (beta * e).mT  # write a share beta of it
    o = S.mT @ q  # read
    return o.squeeze(-1).to(out_dtype)


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


# Triton: the chunk form in five launches.


class _GatedDeltaRule(torch.autograd.Function):
    """`frozen` groups what has no gradient: A_log, dt_bias, the schedule, whether the final state is wanted."""

    @staticmethod
    def forward(ctx, q, k, v, a, b, initial_state, frozen):
        A_log, dt_bias, plan, wants_final = frozen
        prepared = forward.prepare(q, k, a, b, A_log, dt_bias, plan)
        save = any(ctx.needs_input_grad)
        o, final, checkpoints = forward.states(q, k, v, prepared, initial_state, plan, wants_final, save)
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
        dv, dS, dinitial = backward.reverse(q, k, do, prepared, dfinal, plan, ctx.needs_input_grad[5])
        dq = dk = da = db = None
        if any(ctx.needs_input_grad[i] for i in (0, 1, 3, 4)):
            R, S = backward.recompute(k, v, prepared, initial_state, checkpoints, plan)
            dq, dk, da, db = backward.gradients(q, k, a, A_log, dt_bias, do, dv, prepared, R, S, dS, plan)
        return dq, dk, dv, da, db, dinitial, None


def gated_delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, documents: Documents,
    initial_state: Tensor | None = None, output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`gated_delta_rule_reference` in two Triton launches forward, three backward.

    q, k, v, a, b have one dtype, fp32 or bf16; each token's row is contiguous, with any stride between rows. K and V
    are powers of two from 16 to 128. ValueError for anything else, and if A_log or dt_bias requires a gradient.
    """
    _check(q, k, v, a, b, A_log, dt_bias)
    if documents.total != v.shape[0]:
        raise ValueError(f"gated_delta_rule: cu_seqlens ends at {documents.total}, v has {v.shape[0]} tokens")
    if initial_state is not None:
        _check_state(initial_state, (len(documents), v.shape[1], k.shape[2], v.shape[2]))
    frozen = (A_log, dt_bias, forward.schedule(documents), output_final_state)
    return _GatedDeltaRule.apply(q, k, v, a, b, initial_state, frozen)


def gated_delta_rule_step_triton(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor
) -> Tensor:
    """`gated_delta_rule_step_reference` in one launch: reads and writes every state once. Not differentiable."""
    _check(q, k, v, a, b, A_log, dt_bias)
    _check_state(state, (v.shape[0], v.shape[1], k.shape[2], v.shape[2]))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, a, b, state)):
        raise ValueError("gated_delta_rule_step is for decoding and has no backward: call it under torch.no_grad()")
    return forward.step(q, k, v, a, b, A_log, dt_bias, state)


def _check(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> None:
    (G, K), (H, V) = k.shape[1:], v.shape[1:]
    if v.dtype not in (torch.float32, torch.bfloat16) or len({x.dtype for x in (q, k, v, a, b)}) > 1:
        dtypes = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v, a, b))
        raise ValueError(f"gated_delta_rule in Triton takes q, k, v, a, b all float32 or all bfloat16, not {dtypes}")
    for name, size in (("dk", K), ("dv", V)):
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


def _check_state(state: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(state.shape) != shape or state.dtype != torch.float32 or not state.is_contiguous():
        actual = f"{tuple(state.shape)} {state.dtype}{'' if state.is_contiguous() else ' not contiguous'}"
        raise ValueError(f"gated_delta_rule: a state is a contiguous fp32 tensor of shape {shape}, not {actual}")


# The 27B layer, then what breaks kernels: one token, both sides of a chunk's end, many short documents, every ratio.
CASES = (
    {"lengths": (4096,), "key_heads": 16, "value_heads": 48, "dk": 128, "dv": 128},
    {"lengths": (4096,) * 4, "key_heads": 16, "value_heads": 48, "dk": 128, "dv": 128},
    {"lengths": (300, 1, 64, 63, 65, 1027, 212), "key_heads": 16, "value_heads": 48, "dk": 128, "dv": 128},
    {"lengths": (1,), "key_heads": 1, "value_heads": 1},
    {"lengths": (63, 1, 64, 2), "key_heads": 1, "value_heads": 2, "state": True},
    {"lengths": (65, 130), "key_heads": 1, "value_heads": 3},
    {"lengths": (3, 1, 1, 5, 1, 2, 1, 4), "key_heads": 2, "value_heads": 2, "dk": 32, "state": True},
    {"lengths": (66,), "key_heads": 1, "value_heads": 6, "dv": 32},
    {"lengths": (70, 5), "key_heads": 1, "value_heads": 2, "shift": 20.0, "state": True},
    {"lengths": (70, 5), "key_heads": 1, "value_heads": 2, "shift": -20.0, "state": True},
    {"lengths": (1090, 3), "key_heads": 1, "value_heads": 1, "state": True},
)


def make_case(
    lengths: tuple[int, ...],
    key_heads: int,
    value_heads: int,
    dk: int = 16,
    dv: int = 16,
    shift: float = 0.0,
    state: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """shift moves a: log-decays of -20 to -50 at 20, none at -20. a and b are column slices of one tensor."""
    generator = torch.Generator().manual_seed(seed)
    T, n = sum(lengths), len(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    documents = Documents(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32), device)
    inputs = {
        "q": normal(T, key_heads, dk),
        "k": normal(T, key_heads, dk),
        "v": normal(T, value_heads, dv),
        "ab": normal(T, 2 * value_heads) + torch.tensor([shift, 0.0]).repeat_interleave(value_heads),
    }
    inputs = {name: x.to(device, dtype) for name, x in inputs.items()}
    for name in ("A_log", "dt_bias"):
        inputs[name] = torch.rand(value_heads, generator=generator).to(device)
    if state:
        inputs["initial_state"] = normal(n, value_heads, dk, dv).to(device)

    def call(op, x: dict[str, Tensor]) -> dict[str, Tensor | None]:
        x = dict(x)
        a, b = x.pop("ab").chunk(2, dim=1)
        o, final = op(**x, a=a, b=b, documents=documents, output_final_state=state)
        return {"o": o, "final_state": final}

    grads = ("q", "k", "v", "ab", *(("initial_state",) if state else ()))
    return Case(f"{lengths} {key_heads}/{value_heads} {dk}x{dv} shift {shift}", inputs, call, grads)


def _one_document(q, k, v, a, b, A_log, dt_bias, documents, initial_state=None, output_final_state=False):
    one = Documents(torch.tensor([0, documents.total]), documents.device)
    initial = None if initial_state is None else initial_state[:1]
    o, final = gated_delta_rule_triton(q, k, v, a, b, A_log, dt_bias, one, initial, output_final_state)
    return o, final if final is None else final.expand(len(documents), -1, -1, -1)


def _decay_after_write(q, k, v, a, b, A_log, dt_bias, documents, initial_state=None, output_final_state=False):
    """S <- e^g (S + k (beta e)^T): every token decays by its predecessor's g, and what is read by its own as well."""
    keep = decay(a, A_log, dt_bias).exp()
    before = torch.cat([torch.full_like(a[:1], -80.0), a[:-1]])
    before = before.index_fill(0, documents.cu_seqlens[:-1].long(), -80.0)
    o, final = gated_delta_rule_triton(q, k, v, before, b, A_log, dt_bias, documents, initial_state, output_final_state)
    last = keep[documents.cu_seqlens[1:].long() - 1, :, None, None]
    return o * keep[..., None], final if final is None else final * last


def _without_beta(q, k, v, a, b, *rest, **more):
    return gated_delta_rule_triton(q, k, v, a, torch.full_like(b, 100.0), *rest, **more)


def _transposed_state(*args, initial_state=None, **more):
    initial = None if initial_state is None else initial_state.mT.contiguous()
    o, final = gated_delta_rule_triton(*args, initial_state=initial, **more)
    return o, final if final is None else final.mT


def _without_query_scale(q, *rest, **more):
    o, final = gated_delta_rule_triton(q, *rest, **more)
    return o * q.shape[-1] ** 0.5, final


def _tiled_heads(q, k, v, *rest, **more):
    """Value head h reads key head h % Hk."""
    group = v.shape[1] // k.shape[1]
    return gated_delta_rule_triton(q.repeat(1, group, 1), k.repeat(1, group, 1), v, *rest, **more)


class _WithoutOm(_GatedDeltaRule):
    @staticmethod
    def backward(ctx, do, dfinal):
        def wrong(q, k, a, A_log, dt_bias, do, dv, x, R, S, dS, plan):
            dq, dk, da, db = right(q, k, a, A_log, dt_bias, do, dv, x, R, S, dS, plan)
            for i, (begin, length) in enumerate(plan.chunks.tolist()):
                rows = slice(begin, begin + length)
                K = l2_normalise(k[rows]).repeat_interleave(v_heads // k.shape[1], 1).transpose(0, 1)
                c = x.gates[i, :, :2].sum(1)[:, :length]
                om = (c[:, -1:] - c).exp() * (K * (R[i, :, :length] @ dS[i].mT)).sum(-1)
                slope = A_log.exp() * (a[rows] + dt_bias).sigmoid()
                da[rows] += F.pad(om, (1, -1)).cumsum(-1).T * slope
            return dq, dk, da, db

        right, v_heads = backward.gradients, do.shape[1]
        with mock.patch.object(backward, "gradients", wrong):
            return _GatedDeltaRule.backward(ctx, do, dfinal)


def _without_om(*args, **more):
    with mock.patch.object(sys.modules[__name__], "_GatedDeltaRule", _WithoutOm):
        return gated_delta_rule_triton(*args, **more)


MUTANTS = {
    "no reset at a document's start": _one_document,
    "decay after the write": _decay_after_write,
    "no beta": _without_beta,
    "state transposed": _transposed_state,
    "no scale on q": _without_query_scale,
    "key heads tiled, not grouped": _tiled_heads,
    "no gradient of the decay through what a token writes": _without_om,
}


def work(lengths: tuple[int, ...], key_heads: int, value_heads: int, dk: int = 16, dv: int = 16, **_) -> Work:
    """bf16 inputs, outputs and their gradients once; the dots of the chunk form, a chunk padded to 64 tokens.

    Per chunk and value head, forward: K K^T, Q K^T; M E, P R; K S, Q S, K^T R. Backward: two through M and P, dP and Z,
    three with K or Q, six of the size of the state. Not counted: the inverse, and what backward recomputes.
    """
    T, chunks = sum(lengths), sum(-(-n // CHUNK) for n in lengths)
    keys, values, gates = T * key_heads * dk, T * value_heads * dv, T * value_heads
    square, wide = 2 * CHUNK * CHUNK, 2 * CHUNK * dk * dv
    per_head = square * (2 * dk + 2 * dv) + 3 * wide
    backward_per_head = square * (4 * dv + 3 * dk) + 6 * wide
    return Work(
        forward_bytes=2 * (2 * keys + 2 * values + 2 * gates),
        backward_bytes=2 * (4 * keys + 3 * values + 4 * gates),
        forward_flops=chunks * value_heads * per_head,
        backward_flops=chunks * value_heads * backward_per_head,
    )


def compile_specs(dtype: torch.dtype = torch.bfloat16) -> list[CompileSpec]:
    """The kernels as they are launched at 27B: 16 key heads, 48 value heads of 128."""
    x = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    sizes = {"H": 48, "GROUP": 3, "DK": 128, "BT": CHUNK}
    dot = {"PRECISION": "tf32" if dtype == torch.bfloat16 else "ieee"}
    tables = dict.fromkeys(("p_chunks", "p_documents", "p_segments"), "*i32")
    fp32 = ("p_gates", "p_norms", "p_initial", "p_final", "p_dfinal", "p_dinitial", "p_checkpoints", "p_dc", "p_A_log")
    types = tables | dict.fromkeys((*fp32, "p_state"), "*fp32")

    def spec(name: str, fn, how: dict[str, int] | None = None, absent=(), spills: int = 0, why: str = "", **constexprs):
        how = dict(how or {"num_warps": 4, "num_stages": 1})
        warps, stages = how.pop("num_warps"), how.pop("num_stages")
        constexprs = sizes | dot | constexprs | how | dict.fromkeys(absent)
        constexprs = {n: value for n, value in constexprs.items() if n in fn.arg_names}
        signature = {n: types.get(n, x if n[0] == "p" else "i32") for n in fn.arg_names if n not in constexprs}
        # The 27B model's row strides are multiples of 16: Triton sees that at the launch.
        aligned = tuple(signature)
        return CompileSpec(f"delta rule {name}", fn, signature, constexprs, warps, stages, spills, why, aligned)

    launch = {name: forward.options(name, dtype, 128) for name in ("states", "recompute", "reverse", "gradients")}
    return [
        spec("prepare", forward._prepare_kernel, EPS=L2_EPS),
        spec("states", forward._states_kernel, launch["states"], ("p_initial", "p_final"), DV=128,
             HAS_INITIAL=False, STORE_FINAL=False, STORE_CHECKPOINTS=True, SEGMENT=forward.SEGMENT),
        spec("states, prefill", forward._states_kernel, launch["states"], ("p_checkpoints",), DV=128,
             HAS_INITIAL=True, STORE_FINAL=True, STORE_CHECKPOINTS=False, SEGMENT=forward.SEGMENT),
        spec("recompute", backward._recompute_kernel, launch["recompute"], ("p_initial",), DV=128, HAS_INITIAL=False),
        spec("reverse", backward._reverse_kernel, launch["reverse"], ("p_dfinal", "p_dinitial"), DV=128,
             HAS_FINAL=False, STORE_INITIAL=False),
        spec("gradients", backward._gradients_kernel, launch["gradients"], DV=128, spills=64,
             why="a few addresses of reductions, stored once and read once per head"),
        spec("step", forward._step_kernel, DV=128, BV=32, EPS=L2_EPS),
    ]  # fmt: skip
