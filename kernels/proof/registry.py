"""What `kernels.check` and `kernels.bench` find in the kernel files, and the plain PyTorch that bf16 is measured by.

A bf16 kernel must not be worse than plain PyTorch *with the same rounding points*. For most ops that is the reference.
Three round where their reference does not, because tensor cores take 16-bit operands: those have their plain version
here.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from kernels.documents import Documents
from kernels.lora_term import compute_dtype
from kernels.ops.gated_delta_rule import decay, gated_delta_rule_step_reference, make_case
from kernels.ops.gated_delta_rule_forward import CHUNK, L2_EPS
from kernels.proof.closeness import Case
from kernels.proof.protocol import Work


@dataclass(frozen=True)
class Offer:
    """One public operation with what its file offers for it (kernels/proof/protocol.py)."""

    op: str
    reference: Callable
    triton: Callable
    cases: tuple[dict, ...]
    make_case: Callable[..., Case]
    mutants: dict[str, Callable]
    work: Callable[..., Work]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)


# Two key heads with two value heads each, small: without it only the 27B sizes tell grouped heads from tiled ones.
EXTRA_CASES = {"gated_delta_rule": ({"lengths": (4, 3), "key_heads": 2, "value_heads": 4, "state": True},)}


def offer(op: str) -> Offer:
    """ValueError for a name that is no operation, or one without Triton kernels."""
    if op not in kernels.OPS or kernels.OPS[op][1] is None:
        known = ", ".join(name for name, (_, triton_op) in kernels.OPS.items() if triton_op)
        raise ValueError(f"--op {op}: no Triton operation of that name; expected one of {known}")
    reference, triton_op = kernels.OPS[op]
    if op == "gated_delta_rule_step":
        return Offer(op, reference, triton_op, STEP_CASES, make_step_case, STEP_MUTANTS, step_work)
    file = sys.modules[reference.__module__]
    # The optimiser's parameters and gradients are fp32 in every run.
    dtypes = (torch.float32,) if op == "adamw_8bit" else Offer.dtypes
    cases = (*file.CASES, *EXTRA_CASES.get(op, ()))
    return Offer(op, reference, triton_op, cases, file.make_case, file.MUTANTS, file.work, dtypes)


def offers(ops: list[str] | None = None) -> list[Offer]:
    """All operations that have Triton kernels, or those named."""
    return [offer(op) for op in ops or [name for name, (_, triton_op) in kernels.OPS.items() if triton_op]]


# One decoding step of the delta rule shares its file with the rule itself, whose CASES do not fit it.

STEP_CASES = (
    {"batch": 64, "key_heads": 16, "value_heads": 48, "d": 128},
    {"batch": 2, "key_heads": 16, "value_heads": 48, "d": 128},
    {"batch": 3, "key_heads": 1, "value_heads": 3, "d": 32},
)


def make_step_case(batch, key_heads, value_heads, d, device="cpu", dtype=torch.float32, seed=0) -> Case:
    """One token for each of `batch` sequences. With bf16 inputs only o is compared: the state is fp32 on both sides."""
    like = {"state": True, "device": device, "dtype": dtype, "seed": seed}
    inputs = dict(make_case((1,) * batch, key_heads, value_heads, d, d, **like).inputs)
    inputs["state"] = inputs.pop("initial_state")

    def call(op, x: dict[str, Tensor]) -> dict[str, Tensor | None]:
        x = dict(x)
        a, b = x.pop("ab").chunk(2, dim=1)
        state = x.pop("state").clone()
        o = op(**x, a=a, b=b, state=state)
        return {"o": o, "state": None if dtype == torch.bfloat16 else state}

    return Case(f"{batch} sequences, {key_heads}/{value_heads} heads of {d}", inputs, call)


def _state_kept(q, k, v, a, b, A_log, dt_bias, state):
    return gated_delta_rule_step_reference(q, k, v, a, b, A_log, dt_bias, state.clone())


STEP_MUTANTS = {
    "no decay": lambda q, k, v, a, *rest, **more: gated_delta_rule_step_reference(q, k, v, a - 1e4, *rest, **more),
    "state not updated": _state_kept,
}


def step_work(batch, key_heads, value_heads, d) -> Work:
    """The fp32 states read and written, the rest in bf16. Three products with the state."""
    states = batch * value_heads * d * d
    return Work(8 * states + 2 * batch * (2 * key_heads + 2 * value_heads) * d, 0, 6 * states)


# Plain PyTorch that rounds where the Triton kernels do


def plain_peer(found: Offer) -> Callable:
    """What a bf16 result of this op is compared with."""
    return {"gated_delta_rule": rounded_delta_rule, "attention_decode": sdpa_decode}.get(found.op, found.reference)


def torch_flash_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """torch's FlashAttention-2, one call a document."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return kernels.OPS["causal_attention"][0](q, k, v, documents)


def sdpa_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """attention_decode by torch's scaled_dot_product_attention, one call a sequence: P enters its dot in 16 bits."""
    outs = [
        F.scaled_dot_product_attention(
            q[i][None, :, None], *(x[i, :n].transpose(0, 1)[None] for x in (k_cache, v_cache)), enable_gqa=True
        )[0, :, 0]
        for i, n in enumerate(lengths.tolist())
    ]
    return torch.stack(outs)


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


def rounded_delta_rule(
    q, k, v, a, b, A_log, dt_bias, documents, initial_state=None, output_final_state=False
) -> tuple[Tensor, Tensor | None]:
    """gated_delta_rule by the equations of its Triton path (ops/gated_delta_rule.py), chunk by chunk through autograd.

    Every dot takes operands in the inputs' dtype, as tensor cores do; the inverse, sums, gates and states stay wide.
    """
    dtype, wide, group, dk = v.dtype, compute_dtype(v), v.shape[1] // k.shape[1], k.shape[2]
    dot = lambda x, y: _RoundedDot.apply(x, y, dtype)  # noqa: E731
    Q, K = (x.to(wide).repeat_interleave(group, 1).transpose(0, 1) for x in (q, k))  # (H, T, dk)
    V = v.to(wide).transpose(0, 1)
    fq, fk = ((x.square().sum(-1, keepdim=True) + L2_EPS).rsqrt() for x in (Q, K))
    fq, beta, g = fq * dk**-0.5, b.to(wide).sigmoid().T[..., None], decay(a, A_log, dt_bias).T[..., None]
    outs, finals = [], []
    for i, (first, last) in enumerate(zip(documents.bounds, documents.bounds[1:], strict=False)):
        S = V.new_zeros(len(V), dk, V.shape[2]) if initial_state is None else initial_state[i]
        for begin in range(first, last, CHUNK):
            rows = slice(begin, min(begin + CHUNK, last))
            Qc, Kc, Vc, q_scale, k_scale, beta_c, g_c = (x[:, rows] for x in (Q, K, V, fq, fk, beta, g))
            c = g_c.cumsum(1)
            # Exponents that are always 0 are no differences of c (see gated_delta_rule_reference).
            rest = F.pad(g_c[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)
            eye = torch.eye(c.shape[1], device=c.device, dtype=wide)
            below = torch.ones_like(eye, dtype=torch.bool).tril(-1)
            D = (c - c.mT).masked_fill(~below, float("-inf")).exp() + eye
            M = torch.linalg.inv(eye + (beta_c * k_scale * k_scale.mT * dot(Kc, Kc.mT) * D).tril(-1))
            P = q_scale * k_scale.mT * dot(Qc, Kc.mT) * D
            R = dot(M, beta_c * (Vc - c.exp() * k_scale * dot(Kc, S)))
            outs.append(c.exp() * q_scale * dot(Qc, S) + dot(P, R))
            S = c[:, -1:].exp() * S + dot(Kc.mT, rest.exp() * k_scale * R)
        finals.append(S)
    o = torch.cat(outs, 1).transpose(0, 1).to(dtype)
    return o, torch.stack(finals) if output_final_state else None
