"""The strict interpreter: its bf16 against torch's, and the mistakes that it has to see, in small kernels and in ours.

A mistake in ours is one changed piece of an operation's source; it must fail as the right kernel's test would.
"""

import dataclasses
import importlib.util
import inspect
import sys

import pytest
import torch

from kernels.ops._triton import HAS_TRITON, tl, triton
from kernels.ops.attention_schedule import tile_items
from kernels.proof.cases._shared import packed
from kernels.proof.check import closeness_of
from kernels.proof.registry import operations

if not HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from kernels.proof.interpreter import bf16_to_fp32, fp32_to_bf16, strict_interpreter

BF16 = torch.bfloat16


# Numbers


def test_every_bf16_number_survives_a_round_trip():
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    wide = torch.from_numpy(bf16_to_fp32(bits.numpy().view("uint16")))
    assert torch.equal(wide.nan_to_num(7), bits.view(BF16).float().nan_to_num(7))
    again = torch.from_numpy(fp32_to_bf16(wide.numpy()).view("int16")).view(BF16)
    assert torch.equal(again.nan_to_num(7), bits.view(BF16).nan_to_num(7))


def test_bf16_rounds_as_torch_does():
    """Random bits of every exponent, and numbers exactly between two bf16 numbers, which go to the even one."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=generator).to(torch.int32)
    ties = (bits & ~0xFFFF) | 0x8000
    x = torch.cat([bits, ties, ties + 1, ties - 1]).view(torch.float32)
    rounded = torch.from_numpy(fp32_to_bf16(x.numpy()).view("int16")).view(BF16)
    assert torch.equal(rounded.nan_to_num(7), x.to(BF16).nan_to_num(7))


@triton.jit
def arithmetic_kernel(p_x, p_y, p_out, n, N: tl.constexpr):
    """Sum, product, negative, comparison, int -> bf16 and a constant, all in bf16, a row each."""
    o = tl.arange(0, N)
    b_x, b_y = tl.load(p_x + o), tl.load(p_y + o)
    tl.store(p_out + o, b_x + b_y)
    tl.store(p_out + N + o, b_x * b_y)
    tl.store(p_out + 2 * N + o, -b_x)
    tl.store(p_out + 3 * N + o, tl.where(b_x < b_y, b_x, b_y))
    tl.store(p_out + 4 * N + o, (o * n).to(tl.bfloat16))
    tl.store(p_out + 5 * N + o, tl.full([N], 1.01, tl.bfloat16))


def test_arithmetic_in_bf16_equals_torch():
    x, y, out = torch.randn(64).to(BF16), torch.randn(64).to(BF16), torch.empty(6, 64, dtype=BF16)
    with strict_interpreter():
        arithmetic_kernel[(1,)](x, y, out, 37, 64)
    whole = (torch.arange(64) * 37).to(BF16)
    expected = [x + y, x * y, -x, torch.minimum(x, y), whole, torch.full_like(x, 1.01)]
    assert torch.equal(out, torch.stack(expected))


@triton.jit
def sum_kernel(p_x, p_out, N: tl.constexpr):
    tl.store(p_out, tl.sum(tl.load(p_x + tl.arange(0, N)), 0))


def test_a_sum_in_bf16_is_refused():
    """Triton's interpreter would add the bits as integers."""
    with pytest.raises(Exception, match="convert them to fp32 first"), strict_interpreter():
        sum_kernel[(1,)](torch.ones(4, dtype=BF16), torch.empty(1, dtype=BF16), 4)


@triton.jit
def matmul_kernel(p_x, p_y, p_out, N: tl.constexpr, PRECISION: tl.constexpr):
    o = tl.arange(0, N)
    o_tile = o[:, None] * N + o[None, :]
    tl.store(p_out + o_tile, tl.dot(tl.load(p_x + o_tile), tl.load(p_y + o_tile), input_precision=PRECISION))


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_dots_multiply_numbers(dtype):
    x, y, out = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype), torch.empty(32, 32)
    with strict_interpreter():
        matmul_kernel[(1,)](x, y, out, 32, "ieee")
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=1e-5, atol=1e-5)


def test_tf32_drops_thirteen_bits_of_an_operand():
    x, out = torch.eye(16) * (1 + 2**-10 + 2**-11), torch.empty(16, 16)
    with strict_interpreter():
        matmul_kernel[(1,)](x, torch.eye(16), out, 16, "tf32")
    assert torch.equal(out, torch.eye(16) * (1 + 2**-10))


# Memory


@triton.jit
def copy_kernel(p_x, p_out, n, EXTRA: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """out = x, a block of STEP elements a program. Right if EXTRA is 0 and STEP is BLOCK."""
    o = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(p_out + o, tl.load(p_x + o, o < n + EXTRA, other=0.0), o < n)


@triton.jit
def halo_kernel(p_x, n, BLOCK: tl.constexpr):
    """x_i += x_{i+1}, in place: the last element of a block reads what the next program writes."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_next = tl.load(p_x + o + 1, o + 1 < n, other=0.0)
    tl.store(p_x + o, tl.load(p_x + o, o < n, other=0.0) + b_next, o < n)


@triton.jit
def undefined_kernel(p_x, p_out, n, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_out + o, tl.load(p_x + o, o < n))


def test_right_kernels_pass():
    x, out = torch.randn(33), torch.empty(33)
    for backwards in (False, True):
        with strict_interpreter(backwards):
            copy_kernel[(5,)](x, out, 33, 0, 8, 8)
        assert torch.equal(x, out)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_a_read_past_the_end(dtype):
    x = torch.zeros(33, dtype=dtype)
    message = f"copy_kernel: program 5 reads 1 elements outside p_x, the first at byte {x.nbytes} of {x.nbytes}"
    with pytest.raises(AssertionError, match=message), strict_interpreter():
        copy_kernel[(5,)](x, torch.empty_like(x), 33, 1, 8, 8)


def test_a_read_before_the_start():
    message = "program 2 reads 8 elements outside p_x, the first at byte -32"
    with pytest.raises(AssertionError, match=message), strict_interpreter():
        copy_kernel[(2,)](torch.zeros(8), torch.empty(8), 8, 0, 8, -8)


def test_a_write_past_the_end_is_not_made():
    pair = torch.zeros(2, 64)
    out = pair[0].clone()
    with pytest.raises(AssertionError, match="writes 1 elements outside p_out"), strict_interpreter():
        copy_kernel[(9,)](torch.ones(65), out, 65, 0, 8, 8)


def test_a_pointer_into_another_argument():
    """Inside an argument's memory, but reached from another one's pointer."""
    x, out = torch.zeros(8), torch.zeros(64)
    distance = (out.data_ptr() - x.data_ptr()) // 4
    with pytest.raises(AssertionError, match="outside p_x"), strict_interpreter():
        copy_kernel[(2,)](x, out, distance + 8, 0, 8, distance)


def test_a_view_may_read_all_of_its_storage():
    x, out = torch.arange(16.0), torch.empty(8)
    with strict_interpreter():
        copy_kernel[(1,)](x[4:], out, 8, 0, 8, 8)
    assert torch.equal(out, x[4:12])


@pytest.mark.parametrize("backwards", [False, True])
def test_two_programs_that_write_one_element(backwards):
    """Blocks that overlap by one. Both write the same number: no comparison of results could see it."""
    x, out = torch.randn(29), torch.empty(29)
    message = "program 2 writes an element of p_out that program 1 writes"
    with pytest.raises(AssertionError, match=message), strict_interpreter(backwards):
        copy_kernel[(4,)](x, out, 29, 0, 8, 7)
    assert torch.equal(x, out)


@pytest.mark.parametrize(
    ("backwards", "message"),
    [(False, "writes an element of p_x that another program reads"), (True, "reads an element of p_x that program 1")],
)
def test_a_program_that_reads_what_another_one_writes(backwards, message):
    with pytest.raises(AssertionError, match=message), strict_interpreter(backwards):
        halo_kernel[(4,)](torch.randn(32), 32, 8)


def test_one_program_may_read_what_it_writes():
    with strict_interpreter():
        halo_kernel[(1,)](torch.randn(32), 32, 32)


def test_two_arguments_in_one_storage():
    """Columns of one buffer, as the projections of one GEMM: apart they are no race, on the same rows they are."""
    both = torch.zeros(64)
    with strict_interpreter():
        copy_kernel[(4,)](both[:32], both[32:], 32, 0, 8, 8)
    with pytest.raises(AssertionError, match="reads an element of p_x that program 1 writes"), strict_interpreter():
        copy_kernel[(4,)](both[:32], both[8:], 32, 0, 8, 8)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_masked_lanes_without_other_are_poisoned(dtype):
    out = torch.zeros(8, dtype=dtype)
    with strict_interpreter():
        undefined_kernel[(1,)](torch.ones(5, dtype=dtype), out, 5, 8)
    assert out.isnan().tolist() == [False] * 5 + [True] * 3


@triton.jit
def atomic_kernel(p_x):
    tl.atomic_add(p_x, 1.0)


def test_atomic_operations_are_refused():
    with pytest.raises(Exception, match="order of programs"), strict_interpreter():
        atomic_kernel[(2,)](torch.zeros(1))


def test_outside_nothing_is_changed():
    from triton.runtime import interpreter

    before = {name: getattr(interpreter, name) for name in ("interpreter_builder", "interpreter_semantic")}
    with strict_interpreter():
        assert interpreter.interpreter_builder is not before["interpreter_builder"]
    assert all(getattr(interpreter, name) is value for name, value in before.items())


# Mistakes in our kernels

DECODE = {"lengths": [65], "heads": 3, "kv_heads": 1, "head_dim": 64}  # a tile is 64 keys x 64 columns: square
# name: operation, size, the right piece of its source, the wrong one, what is said
MISTAKES = {
    "mask off by one": (
        "sigmoid_gate", {"T": 3, "F": 40, "J": 1}, "m_f = o_f < F", "m_f = o_f <= F", "reads 1 elements outside p_A",
    ),
    "mask off by one, into the next row": (
        "linear_cross_entropy", {"T": 3, "D": 16, "vocab": 100}, "element_ty), o < VOCAB)", "element_ty), o <= VOCAB)",
        "reads an element of p_z that program 1 writes; .* writes 1 elements outside p_z",
    ),
    "mask off by one, a key too many": (
        "attention_decode", DECODE, "m_s = o_s < last", "m_s = o_s <= last", "o: max error",
    ),
    "tile transposed": ("attention_decode", DECODE, "tl.dot(b_q, b_k.T,", "tl.dot(b_q, b_k,", "o: max error"),
    "read past the end": (
        "causal_conv1d_silu", {"lengths": (1, 2), "splits": (8,), "state": True},
        "(pos == 0) & (i_t < T), other=0)", "pos == 0, other=0)", "reads 1 elements outside p_index",
    ),
    "segments that overlap": (
        "causal_conv1d_silu", {"lengths": (5,), "splits": (8,)}, "tl.minimum(begin + length, T)",
        "tl.minimum(begin + length + 1, T)", "writes an element of p_c0 that program 1 writes",
    ),
    "mask off by one, behind the last row": (
        "residual_rms_norm", {"T": 3, "D": 40, "J": 1}, "mask=o_d < D, other=0)", "mask=o_d <= D, other=0)",
        "reads 1 elements outside p_",
    ),
    "mask off by one, behind gate and up": (
        "swiglu", {"T": 3, "I": 40, "rank": 1}, "m_i = o_i < I", "m_i = o_i <= I", "elements outside p_",
    ),
    "heads that overlap": (
        "qk_norm_rope", {"T": 3, "H": 2, "G": 1, "K": 24, "P": 3}, "2 * i_h, H + i_h) * K", "2 * i_h, H + i_h - 1) * K",
        "writes an element of p_din that program",
    ),
    "key heads in turn instead of in groups": (
        "gated_delta_rule_step", {"batch": 2, "key_heads": 2, "value_heads": 4, "K": 16}, "i_g = i_h // GROUP",
        "i_g = i_h % GROUP", "o: max error",
    ),
    "lanes left undefined": (
        "gated_rms_norm", {"T": 3, "H": 3, "V": 24}, "mask=m_f, other=0).to", "mask=m_f).to", "error nan",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_kernel(name, tmp_path):
    """The right kernel holds at the same size, in bf16."""
    op_name, size, right, wrong, message = MISTAKES[name]
    (op,) = operations([op_name])
    closeness_of(op, size, BF16, 1, "cpu")
    source = inspect.getsource(sys.modules[op.triton.__module__])
    assert right in source, f"{op_name} no longer has the line that this test breaks"
    file = tmp_path / "wrong.py"
    file.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("wrong", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    op = dataclasses.replace(op, triton=getattr(module, op.triton.__name__))
    with pytest.raises(AssertionError, match=message):
        closeness_of(op, size, BF16, 1, "cpu")


def test_tiles_of_attention_that_overlap(monkeypatch):
    """Two programs that compute the same rows write the same numbers: only the race shows."""
    (op,) = operations(["causal_attention"])
    size = {"lengths": [129, 3], "heads": 2, "kv_heads": 1, "head_dim": 64}

    def halved(documents, keys, block, late_first):
        return tile_items(documents, keys, block // 2, late_first)

    module = sys.modules[op.triton.__module__]
    monkeypatch.setattr(module, "tile_items", halved)
    with pytest.raises(AssertionError, match=r"_forward_kernel: program \d+ writes an element of \w+ that program"):
        closeness_of(op, size, BF16, 1, "cpu")
    assert len(tile_items(packed([129]), packed([129]), 64, True)) == 3
