"""The compile check must reject what it exists for: spills, too much shared memory, errors, transposed accumulators."""

import dataclasses
import json
import subprocess
import sys

import pytest

from kernels import compile_check
from kernels.ops._triton import HAS_TRITON, tl, triton
from kernels.proof.compile import Resources, compile_all, complaints, table, ttgir_of
from kernels.proof.contract import CompileSpec
from kernels.proof.registry import OPERATIONS, operations
from tests.kernels.ttgir import transposed_accumulators

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


@triton.jit
def copy_kernel(p_x, p_y, T, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_y + o, tl.load(p_x + o, o < T), o < T)


@triton.jit
def wide_kernel(p_x, p_y, N: tl.constexpr):
    """All of N live at once, twice: at N = 32,768 in one warp, 2,048 registers a thread would be needed."""
    o = tl.arange(0, N)
    a = tl.load(p_x + o)
    b = tl.load(p_x + N + o)
    scale = tl.sum(a * b)
    tl.store(p_y + o, a * scale)
    tl.store(p_y + N + o, b * scale)


@triton.jit
def broken_kernel(p_x, N: tl.constexpr):
    tl.store(p_x + tl.arange(0, N), no_such_name)  # noqa: F821


@triton.jit
def two_dots_kernel(p_x, p_y, steps, TRANS_ACC: tl.constexpr, TRANS_LOAD: tl.constexpr, LOOP: tl.constexpr):
    o = tl.arange(0, 64)
    tile = o[:, None] * 64 + o[None, :]
    x = tl.load(p_x + tile)
    acc = tl.dot(x, tl.trans(x))
    acc = acc * (1 / tl.max(acc, 1))[:, None]
    left = acc.to(tl.bfloat16)
    if TRANS_ACC:
        left = tl.trans(left)
    right = x * tl.max(acc, 1)[:, None].to(tl.bfloat16)
    if TRANS_LOAD:
        right = tl.trans(right)
    out = tl.zeros((64, 64), tl.float32)
    if LOOP:
        for _ in range(steps):
            out = tl.dot(left, right, out)
            left = tl.trans(out.to(tl.bfloat16)) if TRANS_ACC else out.to(tl.bfloat16)
    else:
        out = tl.dot(left, right, out)
    tl.store(p_y + tile, out)


def copy_spec(n: int = 1024, **changes) -> CompileSpec:
    signature = {"p_x": "*fp32", "p_y": "*fp32", "T": "i32"}
    return dataclasses.replace(CompileSpec("copy", copy_kernel, signature, {"N": n}), **changes)


def two_dots_spec(**flags) -> CompileSpec:
    signature = {"p_x": "*bf16", "p_y": "*fp32", "steps": "i32"}
    return CompileSpec("two dots", two_dots_kernel, signature, flags)


WIDE = CompileSpec("wide", wide_kernel, {"p_x": "*fp32", "p_y": "*fp32"}, {"N": 32768}, num_warps=1)
BROKEN = CompileSpec("broken", broken_kernel, {"p_x": "*fp32"}, {"N": 64})


def test_budgets_and_limits():
    """The rules alone: one number beyond each limit, and the number that is just allowed."""
    fine = Resources(registers=255, shared=232_448)
    spec = copy_spec()
    assert complaints(spec, fine, "sm_90") == []
    assert complaints(spec, dataclasses.replace(fine, shared=232_449), "sm_90")
    assert complaints(spec, fine, "sm_89"), "sm_89 has less shared memory"
    assert complaints(spec, dataclasses.replace(fine, spills=4), "sm_90")
    assert complaints(spec, dataclasses.replace(fine, serialised=True), "sm_90")
    assert complaints(copy_spec(num_warps=16), fine, "sm_90"), "255 registers in 512 threads exceed the register file"
    budget = copy_spec(spill_budget=64, why="twice a thread, outside the loop")
    assert complaints(budget, dataclasses.replace(fine, spills=64), "sm_90") == []
    assert complaints(dataclasses.replace(budget, why=""), fine, "sm_90"), "a budget needs its reason"
    assert complaints(dataclasses.replace(budget, spill_budget=65), fine, "sm_90"), "and at most 64 B"


@pytest.mark.slow
def test_rejects_what_does_not_fit(tmp_path):
    shared = dataclasses.replace(two_dots_spec(TRANS_ACC=False, TRANS_LOAD=False, LOOP=False), name="dots")
    missing = copy_spec(signature={"p_x": "*fp32", "T": "i32"})
    specs = [copy_spec(), WIDE, BROKEN, shared, missing]
    copy, wide, broken, dots, wrong = compile_all(specs)
    assert complaints(specs[0], copy, "sm_90") == [] and 0 < copy.registers <= 32
    assert wide.spills > 64 and complaints(WIDE, wide, "sm_90")
    assert "no_such_name" in broken.error and complaints(BROKEN, broken, "sm_90")
    assert "p_y" in wrong.error
    assert dots.shared > 0 and dots.spills == 0
    text = table(specs, [copy, wide, broken, dots, wrong], "sm_90")
    assert text.count("FAILS") == 3
    assert compile_all([copy_spec()]) == [copy], "from Triton's cache, with the same numbers"


@pytest.mark.slow
def test_finds_transposed_accumulators():
    """Both shapes of the trap, and their innocent twins: a loaded tile transposed, an accumulator used as it is."""
    accumulators = {
        (acc, load, loop): transposed_accumulators(ttgir_of(two_dots_spec(TRANS_ACC=acc, TRANS_LOAD=load, LOOP=loop)))
        for acc, load, loop in [(True, False, False), (True, True, True), (False, True, False), (False, True, True)]
    }
    assert len(accumulators[True, False, False]) == 1 and "operand a" in accumulators[True, False, False][0]
    assert accumulators[True, True, True]
    assert accumulators[False, True, False] == [] and accumulators[False, True, True] == []


WITH_DOTS = operations(["causal_attention", "attention_decode", "gated_delta_rule", "gated_delta_rule_step"])


@pytest.mark.slow
@pytest.mark.parametrize("spec", [spec for op in WITH_DOTS for spec in op.compile_specs()], ids=lambda spec: spec.name)
def test_no_transposed_accumulator_is_a_dot_operand(spec):
    """Some Triton versions get such a dot wrong on Hopper; the interpreter cannot show it, the compiled form can."""
    assert transposed_accumulators(ttgir_of(spec)) == []


@pytest.mark.slow
def test_attention_compiles_without_spills_and_serialised_wgmma():
    specs = [spec for op in WITH_DOTS[:2] for spec in op.compile_specs()]
    for spec, used in zip(specs, compile_all(specs), strict=True):
        assert complaints(spec, used, "sm_90") == [], (spec.name, used)


@pytest.mark.slow
def test_command_line(tmp_path):
    """The command itself, with the interpreter's switch set: it must compile all the same."""
    report = tmp_path / "resources.json"
    command = [sys.executable, "-m", "kernels.compile_check", "--op", "swiglu", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(report.read_text())
    assert document["target"] == "sm_90" and all(row["registers"] > 0 for row in document["kernels"])


def test_unknown_op_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compile_check", "--op", "no_such_op"])
    with pytest.raises(SystemExit, match="2"):
        compile_check.main()
    error = capsys.readouterr().err
    assert error.startswith("error: --op no_such_op") and error.count("\n") == 1


def test_every_spec_names_its_kernels_arguments():
    for spec in [spec for op in OPERATIONS for spec in op.compile_specs()]:
        assert set(spec.signature) | set(spec.constexprs) == set(spec.fn.arg_names), spec.name
