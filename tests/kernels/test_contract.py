"""One record states all that is needed to prove, time and compile an operation; training loads nothing of it.

A toy operation that no other file knows goes through check, bench and compile check: one entry in the list is enough.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels.ops._triton import HAS_TRITON, tl, triton
from kernels.proof import registry
from kernels.proof.bench import calls_of, without_adapter, worth_timing
from kernels.proof.cases._shared import random_on, with_changes
from kernels.proof.check import check_op
from kernels.proof.closeness import Case
from kernels.proof.compile import compile_all, complaints
from kernels.proof.contract import CompileSpec, Op, Work

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


def relu_squared_reference(x):
    return x.relu().square()


@triton.jit
def relu_squared_kernel(p_x, p_y, n, BN: tl.constexpr):
    o = tl.program_id(0) * BN + tl.arange(0, BN)
    b_x = tl.maximum(tl.load(p_x + o, o < n), 0)
    tl.store(p_y + o, b_x * b_x, o < n)


def relu_squared_triton(x):
    y = torch.empty_like(x)
    relu_squared_kernel[(triton.cdiv(x.numel(), 256),)](x, y, x.numel(), BN=256)
    return y


def make_case(n, device="cpu", dtype=torch.float32, seed=0) -> Case:
    normal, _ = random_on(device, seed)
    return Case({"x": normal(n).to(dtype)}, lambda op, x: {"y": op(x["x"])})


TOY = Op(
    "relu_squared", relu_squared_reference, relu_squared_triton, [{"n": 2**26}, {"n": 300}, {"n": 1}], make_case,
    with_changes(relu_squared_reference, {"negative numbers pass": lambda x: {"x": x.abs()}}), lambda n: Work(4 * n, 0),
    lambda: [CompileSpec("relu", relu_squared_kernel, {"p_x": "*bf16", "p_y": "*bf16", "n": "i32"}, {"BN": 256})],
)  # fmt: skip


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(registry, "OPERATIONS", [*registry.OPERATIONS, TOY])
    return registry.operations(["relu_squared"])[0]


@needs_triton
def test_the_check_takes_a_new_operation(toy):
    rows = list(check_op(toy, 2, "cpu"))
    assert [(row.case, row.dtype) for row in rows] == [
        ("n 1", "bfloat16"),
        ("n 300", "bfloat16"),
        ("n 1", "float32"),
        ("n 300", "float32"),
        ("mutant: negative numbers pass", "float32"),
    ]
    assert all(row.ok for row in rows), rows


@needs_triton
def test_the_bench_takes_a_new_operation(toy):
    """As far as it goes without a GPU: what is timed, without what, and the calls themselves."""
    assert worth_timing(toy) == [{"n": 2**26}] and without_adapter(toy, {"n": 1}) is None
    case = toy.make_case(300)
    (ours, backward), (plain, _) = (calls_of([case], op) for op in (toy.triton, toy.reference))
    assert torch.equal(ours[0](), plain[0]()) and not backward


@needs_triton
@pytest.mark.slow
def test_the_compile_check_takes_a_new_operation(toy):
    (spec,) = toy.compile_specs()
    (used,) = compile_all([spec])
    assert complaints(spec, used, "sm_90") == [] and used.registers > 0


def test_the_records_are_those_of_the_public_operations():
    assert tuple(op.name for op in registry.OPERATIONS) == kernels.OPS
    for op in registry.OPERATIONS:
        switched = getattr(kernels, op.name)
        assert (switched.reference, switched.triton) == (op.reference, op.triton), op.name


def proof_in(source: str) -> set[str]:
    """What a file imports of that which only a proof needs."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if f"{name}.".startswith(("unittest.", "kernels.proof."))}


def test_training_loads_nothing_of_the_proof():
    """torch itself loads unittest.mock, so that sys.modules cannot tell: the loaded files are read."""
    script = "import json, sys, train; print(json.dumps([getattr(m, '__file__', 0) for m in sys.modules.values()]))"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [Path(file) for file in json.loads(run.stdout) if file]
    files = [file for file in files if file.is_relative_to(ROOT / "psysafe") or file.is_relative_to(ROOT / "kernels")]
    assert ROOT / "kernels/ops/swiglu.py" in files and len(files) > 30
    assert {file.name: proof_in(file.read_text()) for file in files if proof_in(file.read_text())} == {}


@pytest.mark.parametrize(
    "source",
    ["from unittest import mock", "import unittest.mock", "def f():\n    from kernels.proof.closeness import Case",
     "from kernels import proof"],
)  # fmt: skip
def test_an_import_of_the_proof_is_seen(source):
    assert proof_in(source)
