"""gate_proj and up_proj as one persistent GEMM with the adapter terms, SwiGLU and down's A projection in its epilogue.

    [g | p] = round(x [W_gate; W_up]^T) + s u B^T        y = round(silu(g) p)        u' = y A^T (fp32)

The rival of cuBLAS + kernels/glu.py, with the same rounding points and the same backward: dgate_up and the adapters'
gradients come from glu's kernel, then dx = dgate_up W by cuBLAS. W is frozen. Neither has run against the other on a
GPU (not measured), so the model runs cuBLAS + `swiglu`; this op is public for the bench, which decides.

What it can win: where no gradient is wanted (prefill, validation), gate_up never exists; at I = 17,408 in bf16 that is
69,632 B a token not written and not read again. A training step needs gate_up in backward, and making it twice would
cost the GEMM again (356 MFLOP a token), so there the epilogue stores it; only the read is saved: at 4,096 tokens 285 MB
or 0.1 ms at 3 TB/s, beside 2.1 ms for the GEMM at 700 TFLOP/s. A GEMM 5 % slower than cuBLAS's gives that back.
Saved for backward: gate_up (69,632 B a token) and u.

Every multiprocessor runs one program, which walks over output tiles of 128 tokens x 128 columns of gate *and* of up:
two accumulators share a tile of x. Operands come by TMA. u' arrives in parts, one float a token and column tile, added
by a second pass in a fixed order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._common import check_inputs, fuses_A, fuses_B, persistent_programs
from kernels._triton import TensorDescriptor, tl, triton
from kernels.closeness import Case
from kernels.glu import swiglu_backward, swiglu_reference, swiglu_triton
from kernels.protocol import CompileSpec, Work
from kernels.seams import LoRATerm


def gate_up_swiglu_reference(
    x: Tensor, weight: Tensor, lora: LoRATerm | None = None, lora_A: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """x (T, D), weight (2I, D) [gate; up], lora u (T, 2r), B (2I, r), lora_A (r, I) fp32 -> y (T, I), u' (T, r)."""
    return swiglu_reference(F.linear(x, weight), lora, lora_A)


@triton.jit
def _halves(b_x):
    """The left and the right columns of a tile."""
    return b_x.reshape(b_x.shape[0], 2, b_x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _finish(b_g, b_p, p_u, p_B, p_A, d_gate, d_up, d_y, i_t, i_i, T, scale, I: tl.constexpr):
    """Stores these columns of y, and of gate and up if they are kept; returns their part of u' (zeros without A)."""
    o_t = tl.cast(i_t + tl.arange(0, b_g.shape[0]), tl.int64)
    o_i = i_i + tl.arange(0, b_g.shape[1])
    m_t, m_i = o_t < T, o_i < I
    b_g, b_p = b_g.to(d_y.dtype), b_p.to(d_y.dtype)
    # Stored by TMA in the accumulators' layout: through pointers y would be computed once more in the stores' own.
    if d_gate is not None:
        d_gate.store([i_t, i_i], b_g)
        d_up.store([i_t, i_i], b_p)
    b_g, b_p = b_g.to(tl.float32), b_p.to(tl.float32)
    if p_B is not None:
        b_ug = tl.load(p_u + 2 * o_t, m_t, other=0)[:, None]
        b_up = tl.load(p_u + 2 * o_t + 1, m_t, other=0)[:, None]
        b_g += b_ug * (scale * tl.load(p_B + o_i, m_i, other=0))[None, :]
        b_p += b_up * (scale * tl.load(p_B + I + o_i, m_i, other=0))[None, :]
    b_y = (b_g * tl.sigmoid(b_g) * b_p).to(d_y.dtype)
    d_y.store([i_t, i_i], b_y)
    b_A = tl.zeros([b_g.shape[1]], tl.float32)
    if p_A is not None:
        b_A = tl.load(p_A + o_i, m_i, other=0)  # zero where the columns end: up's rows must not count
    return tl.sum(b_y.to(tl.float32) * b_A[None, :], 1)


@triton.jit(do_not_specialize=["T"])
def _gate_up_kernel(
    d_x, d_w, p_u, p_B, p_A, d_gate, d_up, d_y, p_u_parts, T, scale, D: tl.constexpr, I: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_gate, d_up None: nothing is kept for backward."""
    N: tl.constexpr = (I + BN - 1) // BN
    M = tl.cdiv(T, BM)
    for i in tl.range(tl.program_id(0), M * N, tl.num_programs(0)):
        # Groups of GROUP tiles of tokens, column after column: what runs at one time shares x and W in L2.
        group = i // (GROUP * N) * GROUP
        height = tl.minimum(M - group, GROUP)
        i_t = (group + i % (GROUP * N) % height) * BM
        i_n = i % (GROUP * N) // height
        b_g = tl.zeros([BM, BN], tl.float32)
        b_p = tl.zeros([BM, BN], tl.float32)
        for i_k in range(0, D, BK):
            b_x = d_x.load([i_t, i_k])
            # The last gate tile may reach into up's rows, the last up tile beyond W (zeros): cut off when stored.
            b_g = tl.dot(b_x, d_w.load([i_n * BN, i_k]).T, b_g, input_precision=PRECISION)
            b_p = tl.dot(b_x, d_w.load([I + i_n * BN, i_k]).T, b_p, input_precision=PRECISION)
        # Half the columns at a time: a whole tile raw, rounded and finished at once would spill.
        b_gl, b_gr = _halves(b_g)
        b_pl, b_pr = _halves(b_p)
        i_i = i_n * BN
        b_part = _finish(b_gl, b_pl, p_u, p_B, p_A, d_gate, d_up, d_y, i_t, i_i, T, scale, I)
        b_part += _finish(b_gr, b_pr, p_u, p_B, p_A, d_gate, d_up, d_y, i_t, i_i + BN // 2, T, scale, I)
        if p_A is not None:
            o_t = tl.cast(i_t + tl.arange(0, BM), tl.int64)
            tl.store(p_u_parts + o_t * N + i_n, b_part, o_t < T)


# By element size: 2 B on the tensor cores at full rate; fp32 in exact products, for proofs and not for speed.
TILES = {
    2: {"BM": 128, "BN": 128, "BK": 64, "GROUP": 16, "num_warps": 8, "num_stages": 4},
    4: {"BM": 64, "BN": 64, "BK": 32, "GROUP": 16, "num_warps": 8, "num_stages": 2},
}


def _descriptor(name: str, x: Tensor, rows: int, columns: int):
    if x.stride(1) != 1 or x.data_ptr() % 16 or x.stride(0) * x.element_size() % 16:
        raise ValueError(
            f"gate_up_swiglu: {name} has strides {x.stride()} at address {x.data_ptr():#x}; TMA takes adjacent "
            f"elements in rows at multiples of 16 bytes, so D and I must be multiples of {16 // x.element_size()}"
        )
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


class _GateUpSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, u, B, lora_A, scale, keep):
        (T, D), size = x.shape, len(weight) // 2
        tiles = TILES[x.element_size()]
        BM, BN, BK = tiles["BM"], tiles["BN"], tiles["BK"]
        columns = triton.cdiv(size, BN)
        programs = persistent_programs(x, triton.cdiv(T, BM) * columns, per_sm=1)
        gate_up = x.new_empty(T, 2 * size) if keep else None
        halves = gate_up.chunk(2, dim=1) if keep else ()
        y = x.new_empty(T, size)
        parts = None if lora_A is None else x.new_empty(T, columns, dtype=torch.float32)
        d_gate, d_up = [_descriptor("gate_up", half, BM, BN // 2) for half in halves] or (None, None)
        _gate_up_kernel[(programs,)](
            _descriptor("x", x, BM, BK), _descriptor("weight", weight, BN, BK), u, B, lora_A, d_gate, d_up,
            _descriptor("y", y, BM, BN // 2), parts, T, scale, D=D, I=size,
            PRECISION="ieee" if x.element_size() == 4 else "tf32", **tiles,
        )  # fmt: skip
        ctx.save_for_backward(weight, gate_up, u, B, lora_A)
        ctx.scale = scale
        return y, None if parts is None else parts.sum(1, keepdim=True)

    @staticmethod
    def backward(ctx, dy, du_out):
        weight, *saved = ctx.saved_tensors
        wants_x, _, *wanted, _, _ = ctx.needs_input_grad
        dgate_up, *grads = swiglu_backward(*saved, ctx.scale, dy, du_out, wanted)
        return dgate_up @ weight if wants_x else None, None, *grads, None, None


def gate_up_swiglu_triton(
    x: Tensor, weight: Tensor, lora: LoRATerm | None = None, lora_A: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """gate_up_swiglu_reference as one Triton GEMM for rank 1; other ranks run F.linear + swiglu_triton. x and weight
    may be strided by row, at multiples of 16 bytes.
    """
    check_inputs("gate_up_swiglu", {"x": x}, {"weight": weight})
    if weight.dtype != x.dtype:
        raise ValueError(f"gate_up_swiglu: x is {x.dtype}, weight {weight.dtype}; expected one dtype")
    if (lora is not None and not fuses_B(lora)) or (lora_A is not None and not (fuses_A(lora_A) and len(lora_A) == 1)):
        return swiglu_triton(F.linear(x, weight), lora, lora_A)
    u, B, scale = (None, None, 0.0) if lora is None else (lora.u.contiguous(), lora.B.contiguous(), lora.scale)
    A = None if lora_A is None else lora_A.contiguous()
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, u, B, A))
    return _GateUpSwiGLU.apply(x, weight, u, B, A, scale, keep)


CASES = [
    {"T": 4096, "D": 5120, "I": 17408, "rank": 1},
    {"T": 4095, "D": 5120, "I": 17408, "rank": 0},
    {"T": 65, "D": 72, "I": 136, "rank": 1},
    {"T": 63, "D": 40, "I": 40, "rank": 4},
]


def make_case(T, D, I, rank=1, device="cpu", dtype=torch.float32, seed=0) -> Case:
    """Gate and up of unit size; adapters as after some training (B near 0.01)."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    inputs = {"x": draw(T, D).to(dtype), "weight": (draw(2 * I, D) / D**0.5).to(dtype)}
    if rank:
        inputs |= {"u": draw(T, 2 * rank), "B": 0.01 * draw(2 * I, rank), "lora_A": draw(rank, I) / I**0.5}

    def call(op, x: dict[str, Tensor]) -> dict[str, Tensor | None]:
        y, u = op(x["x"], x["weight"], LoRATerm(x["u"], x["B"], 32.0) if rank else None, x.get("lora_A"))
        return {"y": y, "u_out": u}

    return Case(f"T {T}, D {D}, I {I}, rank {rank}", inputs, call, tuple(n for n in inputs if n != "weight"))


def _mutant(change):
    def op(x, weight, lora=None, lora_A=None):
        return gate_up_swiglu_triton(**change(x=x, weight=weight, lora=lora, lora_A=lora_A))

    return op


MUTANTS = {
    "adapter term dropped": _mutant(lambda **a: a | {"lora": None}),
    "gate and up swapped": _mutant(lambda **a: a | {"weight": a["weight"].roll(len(a["weight"]) // 2, 0)}),
    "last feature of x dropped": _mutant(
        lambda **a: a | {"x": torch.cat([a["x"][:, :-1], torch.zeros_like(a["x"][:, -1:])], 1)}
    ),
}


def work(T, D, I, rank=1) -> Work:
    """In bf16, training: x and W in, gate_up and y out; backward dy, gate_up and W in, dx out (dgate_up between)."""
    gemm, adapter = 4 * T * D * I, 4 * rank * (3 * T + 3 * I)
    weight = 4 * I * D
    forward, backward = 2 * T * D + weight + 6 * T * I, 14 * T * I + weight + 2 * T * D
    return Work(forward + adapter, backward + 2 * adapter, gemm + 6 * rank * T * I, gemm + 14 * rank * T * I)


def compile_specs() -> list[CompileSpec]:
    """D = 5,120 and I = 17,408 in bf16: a training step, a forward without gradient, and one without adapters."""
    tiles = TILES[2]
    BM, BN, BK = tiles["BM"], tiles["BN"], tiles["BK"]
    boxes = {"d_x": (BM, BK), "d_w": (BN, BK)} | dict.fromkeys(("d_gate", "d_up", "d_y"), (BM, BN // 2))
    types = {n: f"tensordesc<bf16[{rows},{columns}]>" for n, (rows, columns) in boxes.items()}
    types |= {"T": "i32", "scale": "fp32"}
    shape = {"D": 5120, "I": 17408, "PRECISION": "tf32"} | {n: v for n, v in tiles.items() if n.isupper()}
    kept, adapter = ("d_gate", "d_up"), ("p_u", "p_B", "p_A", "p_u_parts")
    absent = {"training": (), "training, no adapter": adapter, "no gradient": kept}
    specs = []
    for name, gone in absent.items():
        constexprs = shape | dict.fromkeys(gone)
        signature = {n: types.get(n, "*fp32") for n in _gate_up_kernel.arg_names if n not in constexprs}
        options = {n: tiles[n] for n in ("num_warps", "num_stages")}
        specs.append(CompileSpec(f"gate_up_kernel {name}", _gate_up_kernel, signature, constexprs, **options))
    return specs
