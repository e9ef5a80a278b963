"""SwiGLU with the adapter terms of gate and up, and the A projection of down.

    g, p = [gate | up] + s u B^T        x = round(silu(g) p)        u' = x A^T (fp32)
    dx += du' A     dp = dx silu(g)     dg = dx p sigmoid(g) (1 + g (1 - sigmoid(g)))
    du = s [dg B_g, dp B_p]     dB = s [dg^T u_g; dp^T u_p]     dA = du'^T x

One rounding at x, one at each of dg and dp; fp32 between. Source: transformers `Qwen3_5MLP`.

In Triton a program owns a block of columns, keeps its B, A and the running sums of dB and dA in registers and walks
over tokens. B and A are read once per program: a program per row would fetch 209 KB of them from L2 for every 104 KB
row. The price is that the row sums u' and du arrive in parts, one float a token and column block (17 at I = 17,408),
which a second pass adds in a fixed order; so do the (segments, I) parts of dB and dA. No atomics: two runs give the
same bits.

Bytes a token at I = 17,408 in bf16: forward reads gate_up and writes x (104,448 B), backward reads dx and gate_up and
writes dgate_up (174,080 B); the partial sums add under 2 % at 4,096 tokens. Saved for backward: gate_up, the GEMM's own
output (69,632 B a token), and u (8 B); x is computed again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.lora_term import LoRATerm, add_lora, add_lora_by_projection, lora_u
from kernels.ops._launch import adjacent, check_inputs, fuses_A, fuses_B, persistent_programs
from kernels.ops._triton import tl, triton
from kernels.proof.closeness import Case
from kernels.proof.protocol import CompileSpec, Work


def swiglu_reference(
    gate_up: Tensor, lora: LoRATerm | None = None, lora_A: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """gate_up (T, 2I), lora u (T, 2r), B (2I, r), lora_A (r, I) fp32 -> x (T, I), u (T, r) fp32 or None."""
    size = gate_up.shape[1] // 2
    gate, up = add_lora_by_projection(gate_up, lora, (size, size))
    x = (F.silu(gate) * up).to(gate_up.dtype)
    return x, lora_u(x, lora_A)


# Triton. Grid: (column blocks, segments). A segment's tiles of BT tokens lie `segments` tiles apart, and the loads of
# the next tiles are in flight (STAGES) while one is worked on.


@triton.jit
def _gate_and_up(p_gate_up, p_u, b_Bg, b_Bp, o_t, o_i, m_t, m, stride, I: tl.constexpr):
    """g and p (BT, BI) in fp32 with their adapter terms, and u_g, u_p (BT, 1). b_Bg, b_Bp carry the scale."""
    p_gate = p_gate_up + o_t[:, None] * stride + o_i[None, :]
    b_g = tl.load(p_gate, m, other=0).to(tl.float32)
    b_p = tl.load(p_gate + I, m, other=0).to(tl.float32)
    b_ug, b_up = 0.0, 0.0
    if p_u is not None:
        b_ug = tl.load(p_u + 2 * o_t, m_t, other=0)[:, None]
        b_up = tl.load(p_u + 2 * o_t + 1, m_t, other=0)[:, None]
        b_g += b_ug * b_Bg
        b_p += b_up * b_Bp
    return b_g, b_p, b_ug, b_up


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    p_gate_up, p_u, p_B, p_A, p_x, p_u_parts, T, stride, scale,
    I: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_b, blocks = tl.program_id(0), tl.num_programs(0)
    o_i = i_b * BI + tl.arange(0, BI)
    m_i = o_i < I
    b_Bg, b_Bp = 0.0, 0.0
    if p_B is not None:
        b_Bg = scale * tl.load(p_B + o_i, m_i, other=0)[None, :]
        b_Bp = scale * tl.load(p_B + I + o_i, m_i, other=0)[None, :]
    if p_A is not None:
        b_A = tl.load(p_A + o_i, m_i, other=0)[None, :]
    for i_t in tl.range(tl.program_id(1), tl.cdiv(T, BT), tl.num_programs(1), num_stages=STAGES):
        o_t = (i_t * BT + tl.arange(0, BT)).to(tl.int64)
        m_t = o_t < T
        m = m_t[:, None] & m_i[None, :]
        b_g, b_p, _, _ = _gate_and_up(p_gate_up, p_u, b_Bg, b_Bp, o_t, o_i, m_t, m, stride, I)
        b_x = (b_g * tl.sigmoid(b_g) * b_p).to(p_x.dtype.element_ty)
        tl.store(p_x + o_t[:, None] * I + o_i[None, :], b_x, m)
        if p_A is not None:
            # Columns beyond I hold x = 0 and A = 0, so the sum needs no mask of its own.
            tl.store(p_u_parts + o_t * blocks + i_b, tl.sum(b_x.to(tl.float32) * b_A, 1), m_t)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    p_dx, p_du_out, p_gate_up, p_u, p_B, p_A, p_dgate_up, p_du_parts, p_sums, T, stride_dx, stride, scale,
    I: tl.constexpr, DA: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums per segment: dB of gate, dB of up (if p_B), then dA (if DA)."""
    i_b, blocks = tl.program_id(0), tl.num_programs(0)
    o_i = i_b * BI + tl.arange(0, BI)
    m_i = o_i < I
    b_Bg, b_Bp = 0.0, 0.0
    if p_B is not None:
        b_Bg = scale * tl.load(p_B + o_i, m_i, other=0)[None, :]
        b_Bp = scale * tl.load(p_B + I + o_i, m_i, other=0)[None, :]
        b_dBg = tl.zeros([BT, BI], tl.float32)
        b_dBp = tl.zeros([BT, BI], tl.float32)
    if p_A is not None:
        b_A = tl.load(p_A + o_i, m_i, other=0)[None, :]
        b_dA = tl.zeros([BT, BI], tl.float32)
    for i_t in tl.range(tl.program_id(1), tl.cdiv(T, BT), tl.num_programs(1), num_stages=STAGES):
        o_t = (i_t * BT + tl.arange(0, BT)).to(tl.int64)
        m_t = o_t < T
        m = m_t[:, None] & m_i[None, :]
        b_g, b_p, b_ug, b_up = _gate_and_up(p_gate_up, p_u, b_Bg, b_Bp, o_t, o_i, m_t, m, stride, I)
        b_dx = tl.load(p_dx + o_t[:, None] * stride_dx + o_i[None, :], m, other=0).to(tl.float32)
        b_sigmoid = tl.sigmoid(b_g)
        b_silu = b_g * b_sigmoid
        if p_A is not None:
            b_du_out = tl.load(p_du_out + o_t, m_t, other=0)[:, None]
            b_dx += b_du_out * b_A
            if DA:
                b_dA += b_du_out * (b_silu * b_p).to(p_dx.dtype.element_ty).to(tl.float32)
        b_dp = b_dx * b_silu
        b_dg = b_dx * b_p * b_sigmoid * (1 + b_g * (1 - b_sigmoid))
        p_dgate = p_dgate_up + o_t[:, None] * (2 * I) + o_i[None, :]
        tl.store(p_dgate, b_dg.to(p_dgate_up.dtype.element_ty), m)
        tl.store(p_dgate + I, b_dp.to(p_dgate_up.dtype.element_ty), m)
        if p_B is not None:
            b_dBg += b_ug * b_dg
            b_dBp += b_up * b_dp
            p_du = p_du_parts + (o_t * blocks + i_b) * 2
            tl.store(p_du, tl.sum(b_dg * b_Bg, 1), m_t)
            tl.store(p_du + 1, tl.sum(b_dp * b_Bp, 1), m_t)
    BS: tl.constexpr = 2 if p_B is not None else 0
    p_sums += tl.program_id(1).to(tl.int64) * ((BS + DA) * I) + o_i
    if p_B is not None:
        tl.store(p_sums, scale * tl.sum(b_dBg, 0), m_i)
        tl.store(p_sums + I, scale * tl.sum(b_dBp, 0), m_i)
    if DA:
        tl.store(p_sums + BS * I, tl.sum(b_dA, 0), m_i)


BI, STAGES = 1024, 4  # 17,408 = 17 x 1,024: no lane idle
FORWARD_BT, BACKWARD_BT = 2, 1  # two tokens backward would take 188 registers, so half the programs a multiprocessor
PER_SM = 4  # programs of four warps: 17 blocks x 31 segments fill 132 multiprocessors exactly once


def _launch(x: Tensor, size: int, BT: int) -> tuple[tuple[int, int], dict[str, int]]:
    block = min(BI, triton.next_power_of_2(size))
    blocks, tiles = triton.cdiv(size, block), triton.cdiv(len(x), BT)
    segments = persistent_programs(x, tiles, PER_SM / blocks)
    return (blocks, segments), {"BT": BT, "BI": block, "STAGES": STAGES, "num_warps": 4}


def swiglu_backward(
    gate_up: Tensor, u: Tensor | None, B: Tensor | None, lora_A: Tensor | None, scale: float,
    dx: Tensor, du_out: Tensor | None, wanted: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dgate_up (T, 2I) and, of du (T, 2), dB (2I, 1), dA (1, I), those that are `wanted`."""
    wants_u, wants_B, wants_A = wanted
    T, size = dx.shape
    grid, constants = _launch(gate_up, size, BACKWARD_BT)
    adapted = 2 if B is not None else 0
    dgate_up = gate_up.new_empty(T, 2 * size)
    parts = gate_up.new_empty(T, grid[0], 2, dtype=torch.float32) if adapted else None
    sums = gate_up.new_empty(grid[1], adapted + wants_A, size, dtype=torch.float32)
    dx = adjacent(dx)
    _backward_kernel[grid](
        dx, du_out.contiguous() if lora_A is not None else None, gate_up, u, B, lora_A, dgate_up, parts, sums,
        T, dx.stride(0), gate_up.stride(0), scale, I=size, DA=wants_A, **constants,
    )  # fmt: skip
    total = sums.sum(0)
    du = parts.sum(1) if wants_u else None
    dB = total[:2].reshape(2 * size, 1) if wants_B else None
    return dgate_up, du, dB, total[-1:] if wants_A else None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, u, B, lora_A, scale, dtype):
        T, size = len(gate_up), gate_up.shape[1] // 2
        grid, constants = _launch(gate_up, size, FORWARD_BT)
        x = gate_up.new_empty(T, size, dtype=dtype)
        parts = None if lora_A is None else gate_up.new_empty(T, grid[0], dtype=torch.float32)
        _forward_kernel[grid](gate_up, u, B, lora_A, x, parts, T, gate_up.stride(0), scale, I=size, **constants)
        ctx.save_for_backward(gate_up, u, B, lora_A)
        ctx.scale = scale
        return x, None if parts is None else parts.sum(1, keepdim=True)

    @staticmethod
    def backward(ctx, dx, du_out):
        _, *wanted, _, _ = ctx.needs_input_grad
        return *swiglu_backward(*ctx.saved_tensors, ctx.scale, dx, du_out, wanted), None, None


def swiglu_triton(
    gate_up: Tensor, lora: LoRATerm | None = None, lora_A: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """swiglu_reference in Triton: rank-1 terms fused, other ranks by the plain matmuls around it. gate_up may be
    strided by row; its gradient is one dense (T, 2I).
    """
    check_inputs("swiglu", {"gate_up": gate_up}, {})
    dtype, size = gate_up.dtype, gate_up.shape[1] // 2
    if lora is not None and not fuses_B(lora):
        gate_up, lora = add_lora(gate_up, lora, (size, size)), None
    u, B, scale = (None, None, 0.0) if lora is None else (lora.u.contiguous(), lora.B.contiguous(), lora.scale)
    A = lora_A.contiguous() if fuses_A(lora_A) and len(lora_A) == 1 else None
    x, u_out = _SwiGLU.apply(gate_up, u, B, A, scale, dtype)
    return x, u_out if A is not None else lora_u(x, lora_A)


CASES = [
    {"T": 4096, "I": 17408, "rank": 1},
    {"T": 4095, "I": 17408, "rank": 0},
    {"T": 65, "I": 1100, "rank": 1, "strided": True},
    {"T": 63, "I": 40, "rank": 4},
]


def make_case(T, I, rank=1, strided=False, device="cpu", dtype=torch.float32, seed=0) -> Case:
    """Gate and up of unit size; adapters as after some training (B near 0.01)."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    inputs = {"gate_up": draw(T, 2 * I).to(dtype)}
    if rank:
        inputs |= {"u": draw(T, 2 * rank), "B": 0.01 * draw(2 * I, rank), "lora_A": draw(rank, I) / I**0.5}

    def call(op, x: dict[str, Tensor]) -> dict[str, Tensor | None]:
        # A slice of a wider row, as a fused GEMM's output is; cloning inputs would make it dense, so it is cut here.
        gate_up = torch.cat([x["gate_up"]] * 2, 1)[:, : 2 * I] if strided else x["gate_up"]
        out, u = op(gate_up, LoRATerm(x["u"], x["B"], 32.0) if rank else None, x.get("lora_A"))
        return {"x": out, "u_out": u}

    return Case(f"T {T}, I {I}, rank {rank}{', strided' if strided else ''}", inputs, call, tuple(inputs))


def _mutant(change):
    return lambda gate_up, lora=None, lora_A=None: swiglu_triton(**change(gate_up=gate_up, lora=lora, lora_A=lora_A))


def _swap_halves(gate_up, lora, lora_A):
    swapped = lora and lora._replace(u=lora.u.roll(lora.u.shape[1] // 2, 1))
    return {"gate_up": gate_up, "lora": swapped, "lora_A": lora_A}


def _without_u_gradient(gate_up, lora=None, lora_A=None):
    x, u = swiglu_triton(gate_up, lora, lora_A)
    return x, None if u is None else u.detach() + 0 * u


MUTANTS = {
    "adapter term dropped": _mutant(lambda **x: x | {"lora": None}),
    "u of gate and up swapped": _mutant(_swap_halves),
    "gate and up swapped": _mutant(lambda **x: x | {"gate_up": x["gate_up"].roll(x["gate_up"].shape[1] // 2, 1)}),
    "gradient of u lost": _without_u_gradient,
}


def work(T, I, rank=1, strided=False) -> Work:
    """In bf16: gate_up in, x out; backward dx and gate_up in, dgate_up out; the adapter's u, B, A and gradients."""
    adapter = 4 * rank * (3 * T + 3 * I)
    return Work(6 * T * I + adapter, 10 * T * I + 2 * adapter, 6 * rank * T * I, 14 * rank * T * I)


def compile_specs() -> list[CompileSpec]:
    """I = 17,408, with rank-1 adapters on all three and with none."""
    bf16 = ("p_gate_up", "p_x", "p_dx", "p_dgate_up")
    scalars = {"T": "i32", "stride": "i32", "stride_dx": "i32", "scale": "fp32"}
    specs = []
    for kernel, BT in ((_forward_kernel, FORWARD_BT), (_backward_kernel, BACKWARD_BT)):
        for adapted in (True, False):
            absent = () if adapted else ("p_u", "p_B", "p_A", "p_u_parts", "p_du_out", "p_du_parts")
            constexprs = dict.fromkeys(absent) | {
                "I": 17408, "DA": adapted, "BT": BT, "BI": BI, "STAGES": STAGES
            }  # fmt: skip
            constexprs = {n: v for n, v in constexprs.items() if n in kernel.arg_names}
            types = {n: scalars.get(n, "*bf16" if n in bf16 else "*fp32") for n in kernel.arg_names}
            signature = {n: t for n, t in types.items() if n not in constexprs}
            name = f"swiglu{kernel.__name__}{' rank 1' if adapted else ''}"
            specs.append(CompileSpec(name, kernel, signature, constexprs, num_warps=4))
    return specs
