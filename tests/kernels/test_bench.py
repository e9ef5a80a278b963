"""`kernels.bench` without a GPU: what it counts, what it refuses, what it writes. Nothing here is a measurement."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import kernels
from kernels.proof import bench
from kernels.proof.bench import Ceilings, Timing, bench_case, calls_of, without_adapter
from kernels.proof.cases import adamw_8bit, swiglu
from kernels.proof.contract import Op, Peer
from kernels.proof.registry import OPERATIONS

pytestmark = pytest.mark.skipif(not kernels.HAS_TRITON, reason="needs Triton")

CEILINGS = Ceilings(copy=4e12, gemm=8e14)
SIZE = {"T": 5, "I": 40, "rank": 1}


@pytest.fixture
def clock(monkeypatch):
    """A CPU in the place of the GPU; every version is called and takes 2 ms, the adapter's absence saves a quarter."""
    seen = []

    def median_ms(calls, repeats=0):
        for call in calls:
            call()
        seen.append(calls)
        return 2.0

    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "median_ms", median_ms)
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return seen


def swiglu_in_fp32(**changes) -> Op:
    return dataclasses.replace(swiglu.OP, dtypes=(torch.float32,), **changes)


def test_every_version_is_timed_both_ways(clock):
    right = Peer("right", "torch", lambda size, device: lambda x: swiglu.OP.reference(x["gate_up"])[0])
    wrong = Peer("wrong", "torch", lambda size, device: lambda x: swiglu.OP.reference(x["gate_up"])[0] * 1.1)
    absent = Peer("absent", "no_such_package", None)
    op = swiglu_in_fp32(peers=(right, wrong, absent))
    rows = list(bench_case(op, SIZE, CEILINGS))
    measured = {(row.version, row.direction) for row in rows if row.ms is not None}
    versions = ("Triton", "Triton, LoRA off", "torch", "torch.compile", "right")
    assert measured == {(version, way) for version in versions for way in ("forward", "backward")}
    remarks = {row.version: row.remark for row in rows if row.ms is None}
    assert remarks.keys() == {"wrong", "absent"}
    assert "not the op's" in remarks["wrong"] and "not installed" in remarks["absent"]
    work, first = op.work(**SIZE), rows[0]
    assert first.gb_s == pytest.approx(work.forward_bytes / 2e-3 / 1e9)
    assert first.tflop_s == pytest.approx(work.forward_flops / 2e-3 / 1e12)
    assert first.roofline == pytest.approx(work.forward_bytes / 4e12 / 2e-3)
    text = bench.table(rows)
    assert "1.00 x" in text and "not measured: AssertionError: not installed" in text


def test_the_roofline_is_the_larger_of_the_two():
    assert CEILINGS.seconds(4 * 10**12, 0) == 1 == CEILINGS.seconds(0, 8 * 10**14)
    assert CEILINGS.seconds(4 * 10**12, 16 * 10**14) == 2


def test_an_op_whose_check_fails_is_refused(clock):
    wrong = swiglu_in_fp32(triton=swiglu.OP.mutants["adapter term dropped"])
    (row,) = bench_case(wrong, SIZE, CEILINGS)
    assert row.ms is None and row.remark.startswith("REFUSED") and not clock


def test_calls_time_the_op_alone():
    """The optimiser's case copies its state before each call: not part of the op. Backward yields every gradient."""
    case = adamw_8bit.OP.make_case([300, 20], min_8bit_size=1)
    forward, backward = calls_of([case], adamw_8bit.OP.reference)
    assert not backward
    (call,) = forward
    assert call.args[0].data_ptr() != case.inputs["param"].data_ptr()
    case = swiglu.OP.make_case(**SIZE, strided=True)
    forward, (backward,) = calls_of([case], swiglu.OP.reference)
    assert forward[0].args[0].stride() == (160, 1), "the strided view itself"
    assert [tuple(g.shape) for g in backward()] == [(5, 80), (5, 2), (80, 1), (1, 40)]


def test_without_adapter():
    sizes = {op.name: without_adapter(op, op.cases[0]) for op in OPERATIONS}
    assert sizes["residual_rms_norm"] | {"T": 0} == {"T": 0, "D": 5120, "J": 0, "rank": 0}
    assert sizes["swiglu"]["rank"] == sizes["qk_norm_rope"]["rank"] == sizes["sigmoid_gate"]["J"] == 0
    assert sizes["causal_attention"] is sizes["causal_conv1d_silu"] is sizes["linear_cross_entropy"] is None


def test_every_op_has_a_case_worth_timing():
    assert all(bench.worth_timing(op) for op in OPERATIONS)


def made_up_rows():
    return [
        Timing("swiglu", "T 4096", "forward", "Triton", 1.0, 100.0, 1.0, 0.9),
        Timing("swiglu", "T 4096", "forward", "torch", 3.0, 33.0, 0.3, 0.3),
        Timing("swiglu", "T 4096", "", "Liger", remark="not measured: AssertionError: not installed"),
    ]


def test_plot_and_document(tmp_path):
    pytest.importorskip("matplotlib")
    (png,) = bench.plot(made_up_rows(), tmp_path, "a made-up GPU")
    assert png.name == "swiglu.png" and png.read_bytes().startswith(b"\x89PNG")
    document = json.loads(json.dumps(bench.document(made_up_rows(), CEILINGS)))
    assert document["copy_gb_s"] == 4000 and document["gemm_tflop_s"] == 800
    assert {"gpu", "torch", "triton", "cuda"} <= document.keys() and len(document["rows"]) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_and_checks_instead(tmp_path):
    file = tmp_path / "bench.json"
    command = [sys.executable, "-m", "kernels.bench", "--op", "gated_delta_rule_step", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no GPU" in done.stdout and "0 failed" in done.stdout and not file.exists()
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["gpu"] is None and document["check"] == "ok"
    assert document["rows"] and all(row["ms"] is None for row in document["rows"])


def test_mistakes_get_one_line():
    command = [sys.executable, "-m", "kernels.bench", "--plot", "/no/such/folder"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --plot /no/such/folder")
