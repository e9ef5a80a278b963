"""`kernels.check` has to reject what it exists for: wrong numbers, unwritten memory, runs that differ, a leak.

The machinery runs here on a CPU with plain PyTorch in the place of the kernels.
"""

import dataclasses
import json
import os
import subprocess
import sys
from itertools import cycle

import pytest
import torch

import kernels
from kernels.proof import check
from kernels.proof.cases._shared import packed
from kernels.proof.cases.attention_decode import sdpa_decode
from kernels.proof.cases.causal_attention import torch_flash_attention
from kernels.proof.cases.gated_delta_rule import make_case, rounded_delta_rule
from kernels.proof.check import closeness_of, mutant_rejected, permuted_documents, tasks
from kernels.proof.closeness import outputs_and_gradients
from kernels.proof.command import Parser, write_json
from kernels.proof.contract import Op
from kernels.proof.registry import OPERATIONS, operations

pytestmark = pytest.mark.skipif(not kernels.HAS_TRITON, reason="needs Triton")

BF16, FP32 = torch.bfloat16, torch.float32
DOCUMENTS = {"lengths": (5, 1, 66), "key_heads": 1, "value_heads": 2, "state": True}


def record(name: str) -> Op:
    return operations([name])[0]


def standing_in(name: str) -> Op:
    """An op whose reference stands in the place of its Triton kernels."""
    return dataclasses.replace(record(name), triton=record(name).reference)


@pytest.fixture
def gate():
    return standing_in("sigmoid_gate"), {"T": 9, "F": 40, "J": 1}


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_the_reference_itself_holds(gate, dtype):
    assert closeness_of(*gate, dtype, 2, "cpu") < 1e-2


def nudged(op):
    """Every second run differs in the last bit, which closeness forgives."""
    factors = cycle([1.0, 1.0 + 2**-23])

    def call(o, gate, A):
        x, u = op(o, gate, A)
        return x, u * next(factors)

    return call


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda op: lambda o, gate, A: op(o * 1.02, gate, A), "RMS error|max error|out of tolerance"),
        (lambda op: lambda o, gate, A: op(o + torch.empty_like(o)[:1] * 0, gate, A), "nan|NaN"),
        (nudged, "two runs differ in u"),
    ],
    ids=["two percent off", "unwritten memory", "not deterministic"],
)
def test_wrong_kernels_are_rejected(gate, dtype, wrong, message):
    op, size = gate
    with pytest.raises(AssertionError, match=message):
        closeness_of(dataclasses.replace(op, triton=wrong(op.reference)), size, dtype, 1, "cpu")


def test_a_mutant_that_is_right_is_no_mutant(gate):
    op, size = gate
    right = op.reference
    op = dataclasses.replace(op, mutants={"right": right, "wrong": lambda o, g, A: right(g, o, A)})
    assert mutant_rejected(op, "wrong", [size], "cpu")
    with pytest.raises(AssertionError, match="accepted by all 1 cases"):
        mutant_rejected(op, "right", [size], "cpu")


def test_documents_that_see_each_other_are_caught():
    size = {"lengths": (5, 1, 66), "splits": (8, 8, 16)}
    op = standing_in("causal_conv1d_silu")
    permuted_documents(op, size, FP32, "cpu")

    def leaking(x, weight, documents, splits, initial_state=None):
        return op.reference(x, weight, packed([len(x)]), splits)

    with pytest.raises(AssertionError, match="two runs differ in c0, c1, c2, dx"):
        permuted_documents(dataclasses.replace(op, triton=leaking), size, FP32, "cpu")


# The plain PyTorch that bf16 is measured by


@pytest.mark.parametrize("shift", [0.0, 20.0, -20.0])
def test_the_rounded_delta_rule_is_the_delta_rule(shift):
    case = make_case(**DOCUMENTS, shift=shift)
    expected = outputs_and_gradients(case, record("gated_delta_rule").reference, torch.float64)
    actual = outputs_and_gradients(case, rounded_delta_rule, torch.float64)
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x, rtol=1e-11, atol=1e-12, msg=name)


def test_the_rounded_delta_rule_rounds_its_dots():
    """In bf16 twice the error of the reference, which rounds nothing but o: that is why it takes its place."""
    case = make_case((130,), 1, 2, 64, 64, dtype=BF16)
    expected, rounded, reference = (
        outputs_and_gradients(case, op, dtype)["o"].double()
        for op, dtype in (
            (record("gated_delta_rule").reference, torch.float64), (rounded_delta_rule, None),
            (record("gated_delta_rule").reference, None),
        )
    )  # fmt: skip
    size = expected.norm()
    assert 1.3 < (rounded - expected).norm() / (reference - expected).norm() < 3
    assert (rounded - expected).norm() / size < 6e-3


@pytest.mark.parametrize(
    ("op", "peer", "size"),
    [
        ("causal_attention", torch_flash_attention, {"lengths": [7, 12], "heads": 4, "kv_heads": 2, "head_dim": 64}),
        ("attention_decode", sdpa_decode, {"lengths": [1, 9], "heads": 4, "kv_heads": 2, "head_dim": 64}),
    ],
)
def test_plain_peers_compute_the_op(op, peer, size):
    op = record(op)
    case = op.make_case(**size)
    expected = outputs_and_gradients(case, op.reference, torch.float64)
    for name, x in outputs_and_gradients(case, peer).items():
        torch.testing.assert_close(x.double(), expected[name], rtol=1e-5, atol=1e-5, msg=name)


# What is found, and the command


def test_every_op_offers_what_the_check_needs():
    for op in OPERATIONS:
        assert op.cases and op.mutants and callable(op.reference) and callable(op.triton)
        assert any(check.is_small(op, size) for size in op.cases), f"{op.name} has no case for the interpreter"
        assert op.work(**op.cases[0]).forward_bytes > 1e6, f"{op.name}: its first case is not the 27B size"


def test_on_a_gpu_everything_is_checked():
    for op in OPERATIONS:
        todo = list(tasks(op, 3, "cuda"))
        in_bf16 = [case for case, dtype, _ in todo if dtype == "bfloat16"]
        if BF16 in op.dtypes:
            assert {check.shown(size) for size in op.cases} <= set(in_bf16), op.name
        assert sum(case.startswith("mutant") for case, _, _ in todo) == len(op.mutants)
        assert any(dtype == "float32" and not case.startswith("mutant") for case, dtype, _ in todo), op.name
    attention = [case for case, _, _ in tasks(record("causal_attention"), 3, "cuda")]
    assert sum("against torch's flash" in case for case in attention) == 18
    assert any(case.startswith("documents permuted") for case in attention)


def command(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_command_checks_in_the_interpreter(tmp_path):
    file = tmp_path / "check.json"
    done = command("--op", "gated_delta_rule_step", "--json", str(file))
    if torch.cuda.is_available():
        pytest.skip("a GPU is at hand")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no GPU" in done.stdout and "0 failed" in done.stdout
    result = json.loads(file.read_text())
    assert result["gpu"] is None and result["failed"] == 0 and len(result["rows"]) >= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "flash"), "--op flash: no operation of that name"),
        (("--seeds", "0"), "--seeds 0: expected 1 or more"),
        (("--json", "/no/such/folder/x.json"), "does not exist"),
    ],
)
def test_mistakes_get_one_line(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_the_results_never_take_the_place_of_a_pipe_or_a_link(tmp_path, capsys, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(sys, "argv", ["check", "--json", str(tmp_path / "pipe")])
    with pytest.raises(SystemExit, match="2"):
        Parser("check", "").parse()
    assert "pipe: not a regular file" in capsys.readouterr().err and (tmp_path / "pipe").is_fifo()
    (tmp_path / "link").symlink_to("file")
    write_json(tmp_path / "link", {"a": 1})
    assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "file").read_text()) == {"a": 1}


def test_a_crash_is_a_failed_row(gate):
    def broken(*_):
        raise RuntimeError("out of memory\nmore")

    op = dataclasses.replace(gate[0], triton=broken, cases=(gate[1],))
    rows = list(check.check_op(op, 1, "cpu"))
    assert rows[0].result == "RuntimeError: out of memory" and not rows[0].ok
    assert "FAILED sigmoid_gate" in check.table(rows)
