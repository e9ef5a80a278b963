"""gated_delta_rule: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

import sys
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.documents import Documents
from kernels.ops import gated_delta_rule_backward as backward
from kernels.ops import gated_delta_rule_forward as forward
from kernels.ops.gated_delta_rule import _GatedDeltaRule, decay, gated_delta_rule_triton, l2_normalise
from kernels.ops.gated_delta_rule_forward import CHUNK, L2_EPS
from kernels.proof.closeness import Case
from kernels.proof.protocol import CompileSpec, Work

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
