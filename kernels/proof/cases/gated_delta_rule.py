"""gated_delta_rule: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

from importlib import import_module
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.lora_term import compute_dtype
from kernels.ops import gated_delta_rule as rule
from kernels.ops import gated_delta_rule_backward as backward
from kernels.ops.gated_delta_rule_forward import CHUNK, L2_EPS
from kernels.proof.cases._shared import packed, random_on, with_changes
from kernels.proof.closeness import Case
from kernels.proof.contract import Op, Peer, Work
from kernels.proof.launches import launched

# The 27B layer, then what breaks kernels: one token, both sides of a chunk's end, many short documents, every ratio.
CASES = (
    {"lengths": (4096,), "key_heads": 16, "value_heads": 48, "K": 128, "V": 128},
    {"lengths": (4096,) * 4, "key_heads": 16, "value_heads": 48, "K": 128, "V": 128},
    {"lengths": (300, 1, 64, 63, 65, 1027, 212), "key_heads": 16, "value_heads": 48, "K": 128, "V": 128},
    {"lengths": (1,), "key_heads": 1, "value_heads": 1},
    {"lengths": (63, 1, 64, 2), "key_heads": 1, "value_heads": 2, "state": True},
    {"lengths": (65, 130), "key_heads": 1, "value_heads": 3},
    {"lengths": (3, 1, 1, 5, 1, 2, 1, 4), "key_heads": 2, "value_heads": 2, "K": 32, "state": True},
    {"lengths": (66,), "key_heads": 1, "value_heads": 6, "V": 32},
    {"lengths": (70, 5), "key_heads": 1, "value_heads": 2, "shift": 20.0, "state": True},
    {"lengths": (70, 5), "key_heads": 1, "value_heads": 2, "shift": -20.0, "state": True},
    {"lengths": (1090, 3), "key_heads": 1, "value_heads": 1, "state": True},
    # Without it only the 27B sizes tell grouped heads from tiled ones.
    {"lengths": (4, 3), "key_heads": 2, "value_heads": 4, "state": True},
)


def make_case(
    lengths: tuple[int, ...], key_heads: int, value_heads: int, K: int = 16, V: int = 16, shift: float = 0.0,
    state: bool = False, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0,
) -> Case:  # fmt: skip
    """shift moves a: log-decays of -20 to -50 at 20, none at -20. a and b are column slices of one tensor."""
    normal, uniform = random_on(device, seed)
    T = sum(lengths)
    documents = packed(lengths, device)
    inputs = {
        "q": normal(T, key_heads, K),
        "k": normal(T, key_heads, K),
        "v": normal(T, value_heads, V),
        "ab": normal(T, 2 * value_heads) + torch.tensor([shift, 0.0], device=device).repeat_interleave(value_heads),
    }
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    inputs |= {"A_log": uniform(value_heads), "dt_bias": uniform(value_heads)}
    if state:
        inputs["initial_state"] = normal(len(lengths), value_heads, K, V)

    def call(op, x: dict[str, Tensor]) -> dict[str, Tensor | None]:
        x = dict(x)
        a, b = x.pop("ab").chunk(2, dim=1)
        o, final = op(**x, a=a, b=b, documents=documents, output_final_state=state)
        return {"o": o, "final_state": final}

    grads = ("q", "k", "v", "ab", *(("initial_state",) if state else ()))
    return Case(inputs, call, grads)


def _one_document(q, k, v, a, b, A_log, dt_bias, documents, initial_state=None, output_final_state=False):
    one = packed([documents.total], documents.device)
    initial = None if initial_state is None else initial_state[:1]
    o, final = rule.gated_delta_rule_triton(q, k, v, a, b, A_log, dt_bias, one, initial, output_final_state)
    return o, final if final is None else final.expand(len(documents), -1, -1, -1)


def _decay_after_write(q, k, v, a, b, A_log, dt_bias, documents, initial_state=None, output_final_state=False):
    """S <- e^g (S + k (beta e)^T): every token decays by its predecessor's g, and what is read by its own as well."""
    keep = rule.decay(a, A_log, dt_bias).exp()
    before = torch.cat([torch.full_like(a[:1], -80.0), a[:-1]])
    before = before.index_fill(0, documents.cu_seqlens[:-1].long(), -80.0)
    o, final = rule.gated_delta_rule_triton(
        q, k, v, before, b, A_log, dt_bias, documents, initial_state, output_final_state
    )
    last = keep[documents.cu_seqlens[1:].long() - 1, :, None, None]
    return o * keep[..., None], final if final is None else final * last


def _transposed_state(*args, initial_state=None, **more):
    initial = None if initial_state is None else initial_state.mT.contiguous()
    o, final = rule.gated_delta_rule_triton(*args, initial_state=initial, **more)
    return o, final if final is None else final.mT


def _without_query_scale(q, *rest, **more):
    o, final = rule.gated_delta_rule_triton(q, *rest, **more)
    return o * q.shape[-1] ** 0.5, final


def _tiled_heads(q, k, v, **_):
    """Value head h reads key head h % Hk."""
    group = v.shape[1] // k.shape[1]
    return {"q": q.repeat(1, group, 1), "k": k.repeat(1, group, 1)}


class _WithoutOm(rule._GatedDeltaRule):
    @staticmethod
    def backward(ctx, do, dfinal):
        def wrong(q, k, a, A_log, dt_bias, do, dv, x, factors, RT, ST, dST, plan):
            dq, dk, da, db = right(q, k, a, A_log, dt_bias, do, dv, x, factors, RT, ST, dST, plan)
            for i, (begin, length) in enumerate(plan.chunks.tolist()):
                rows = slice(begin, begin + length)
                K = rule.l2_normalise(k[rows]).repeat_interleave(v_heads // k.shape[1], 1).transpose(0, 1)
                c = x.gates[i, :, :2].sum(1)[:, :length]
                om = (c[:, -1:] - c).exp() * (K * (RT[i, :, :, :length].mT @ dST[i])).sum(-1)
                slope = A_log.exp() * (a[rows] + dt_bias).sigmoid()
                da[rows] += F.pad(om, (1, -1)).cumsum(-1).T * slope
            return dq, dk, da, db

        right, v_heads = backward.gradients, do.shape[1]
        with mock.patch.object(backward, "gradients", wrong):
            return rule._GatedDeltaRule.backward(ctx, do, dfinal)


def _without_om(*args, **more):
    with mock.patch.object(rule, "_GatedDeltaRule", _WithoutOm):
        return rule.gated_delta_rule_triton(*args, **more)


MUTANTS = {
    "no reset at a document's start": _one_document,
    "decay after the write": _decay_after_write,
    "state transposed": _transposed_state,
    "no scale on q": _without_query_scale,
    "no gradient of the decay through what a token writes": _without_om,
} | with_changes(rule.gated_delta_rule_triton, {
    "no beta": lambda b, **_: {"b": torch.full_like(b, 100.0)},
    "key heads tiled, not grouped": _tiled_heads,
})  # fmt: skip


def work(lengths: tuple[int, ...], key_heads: int, value_heads: int, K: int = 16, V: int = 16, **_) -> Work:
    """bf16 inputs, outputs and their gradients once; the dots of the chunk form, a chunk padded to 64 tokens.

    Per chunk and value head, forward: K K^T, Q K^T; M E, P R; K S, Q S, K^T R. Backward: two through M and P, dP and Z,
    three with K or Q, six of the size of the state. Not counted: the inverse, and what backward recomputes.
    """
    T, chunks = sum(lengths), sum(-(-n // CHUNK) for n in lengths)
    keys, values, gates = T * key_heads * K, T * value_heads * V, T * value_heads
    square, wide = 2 * CHUNK * CHUNK, 2 * CHUNK * K * V
    per_head = square * (2 * K + 2 * V) + 3 * wide
    backward_per_head = square * (4 * V + 3 * K) + 6 * wide
    return Work(
        forward_bytes=2 * (2 * keys + 2 * values + 2 * gates),
        backward_bytes=2 * (4 * keys + 3 * values + 4 * gates),
        forward_flops=chunks * value_heads * per_head,
        backward_flops=chunks * value_heads * backward_per_head,
    )


SPECS = launched(
    "gated_delta_rule_forward", "gated_delta_rule_backward",
    spill_budgets={"_dk_kernel": (8, "one number a thread, with triton 3.6.0 only")},
)  # fmt: skip


# Plain PyTorch that rounds where the kernels do, and other people's kernels


class _RoundedDot(torch.autograd.Function):
    """x @ y from operands rounded to `dtype`; backward its gradient is such an operand as well."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        x, y = (t.to(dtype).to(t.dtype) for t in (x, y))
        ctx.save_for_backward(x, y)
        ctx.dtype = dtype
        return x @ y

    @staticmethod
    def backward(ctx, g: Tensor):
        x, y = ctx.saved_tensors
        g = g.to(ctx.dtype).to(g.dtype)
        return g @ y.mT, x.mT @ g, None


class _CarriedOn(torch.autograd.Function):
    """factor * S, the state after a chunk's decay. The factor's gradient <S, dS> reads both as they were stored."""

    @staticmethod
    def forward(ctx, factor: Tensor, S: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(factor, S)
        ctx.dtype = dtype
        return factor * S

    @staticmethod
    def backward(ctx, dS: Tensor):
        factor, S = ctx.saved_tensors
        stored, d_stored = (x.to(ctx.dtype).to(x.dtype) for x in (S, dS))
        return (stored * d_stored).sum((1, 2), keepdim=True), factor * dS, None


class _Beta(torch.autograd.Function):
    """E itself. beta's whole gradient is taken here, as the kernels do: diag(dv R^T) / beta^2, of dv and R as stored.

    R = M E is computed after E: forward gets an empty list that holds it by the time of backward.
    """

    @staticmethod
    def forward(ctx, beta: Tensor, E: Tensor, R: list[Tensor], dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(beta)
        ctx.R, ctx.dtype = R, dtype
        return E.view_as(E)

    @staticmethod
    def backward(ctx, dE: Tensor):
        (beta,), (R,) = ctx.saved_tensors, ctx.R
        dv, stored = (x.to(ctx.dtype).to(x.dtype) for x in (beta * dE, R))
        # beta may underflow to 0, and then dv is 0 as well. Its square would underflow earlier.
        beta = beta.clamp(min=1e-30)
        return (dv * stored).sum(-1, keepdim=True) / beta / beta, dE, None, None


def rounded_delta_rule(
    q, k, v, a, b, A_log, dt_bias, documents, initial_state=None, output_final_state=False
) -> tuple[Tensor, Tensor | None]:
    """gated_delta_rule by the equations of its Triton path (ops/gated_delta_rule.py), chunk by chunk through autograd.

    Every dot takes operands in the inputs' dtype, as tensor cores do, and so do the gradients of beta and of a state's
    decay: S, R and their gradients are stored so. The inverse, sums, gates and the states carried on stay wide.
    """
    dtype, wide, group, K = v.dtype, compute_dtype(v), v.shape[1] // k.shape[1], k.shape[2]
    dot = lambda x, y: _RoundedDot.apply(x, y, dtype)  # noqa: E731
    q, k = (x.to(wide).repeat_interleave(group, 1).transpose(0, 1) for x in (q, k))  # (H, T, K)
    v = v.to(wide).transpose(0, 1)
    fq, fk = ((x.square().sum(-1, keepdim=True) + L2_EPS).rsqrt() for x in (q, k))
    fq, beta, g = fq * K**-0.5, b.to(wide).sigmoid().T[..., None], rule.decay(a, A_log, dt_bias).T[..., None]
    outs, finals = [], []
    for i, (first, last) in enumerate(zip(documents.bounds, documents.bounds[1:], strict=False)):
        S = v.new_zeros(len(v), K, v.shape[2]) if initial_state is None else initial_state[i]
        for begin in range(first, last, CHUNK):
            rows = slice(begin, min(begin + CHUNK, last))
            q_c, k_c, v_c, q_scale, k_scale, beta_c, g_c = (x[:, rows] for x in (q, k, v, fq, fk, beta, g))
            c = g_c.cumsum(1)
            # Exponents that are always 0 are no differences of c (see gated_delta_rule_reference).
            rest = F.pad(g_c[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)
            eye = torch.eye(c.shape[1], device=c.device, dtype=wide)
            below = torch.ones_like(eye, dtype=torch.bool).tril(-1)
            D = (c - c.mT).masked_fill(~below, float("-inf")).exp() + eye
            beta_only = beta_c.detach()  # its gradient is _Beta's
            M = torch.linalg.inv(eye + (beta_only * k_scale * k_scale.mT * dot(k_c, k_c.mT) * D).tril(-1))
            P = q_scale * k_scale.mT * dot(q_c, k_c.mT) * D
            solved = []
            R = dot(M, _Beta.apply(beta_c, beta_only * (v_c - c.exp() * k_scale * dot(k_c, S)), solved, dtype))
            solved.append(R.detach())
            outs.append(c.exp() * q_scale * dot(q_c, S) + dot(P, R))
            S = _CarriedOn.apply(c[:, -1:].exp(), S, dtype) + dot(k_c.mT, rest.exp() * k_scale * R)
        finals.append(S)
    o = torch.cat(outs, 1).transpose(0, 1).to(dtype)
    return o, torch.stack(finals) if output_final_state else None


def _fla(size: dict, device: str):
    fla_rule = import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    cu = packed(size["lengths"], device).cu_seqlens.long()

    def call(x: dict[str, Tensor]) -> Tensor:
        a, b = x["ab"].chunk(2, dim=1)
        o, _ = fla_rule(
            *(x[name][None] for name in ("q", "k", "v")), g=a[None], beta=b[None], use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, A_log=x["A_log"], dt_bias=x["dt_bias"],
            cu_seqlens=cu,
        )  # fmt: skip
        return o[0]

    return call


_27B = {"key_heads": 16, "value_heads": 48, "K": 128, "V": 128}
OP = Op(
    "gated_delta_rule", rule.gated_delta_rule_reference, rule.gated_delta_rule_triton, CASES, make_case, MUTANTS, work,
    SPECS, plain=rounded_delta_rule, weights=("A_log", "dt_bias"), by_document=("initial_state", "final_state"),
    permuted=(
        {"lengths": (1, 63, 64, 65, 127, 128, 129, 650, 2048), **_27B},
        {"lengths": (1, 3, 66), "key_heads": 1, "value_heads": 2},
    ),
    peers=(Peer("flash-linear-attention", "fla", _fla),),
)  # fmt: skip
