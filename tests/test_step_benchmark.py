"""benchmarks/step.py: what it refuses, what it compares before it times, how it sorts times and extrapolates."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.profiler import record_function

from benchmarks import measure, step
from benchmarks.baselines import CONTENDERS
from psysafe.model.config import ModelConfig
from psysafe.program import main_guard
from tests.mistakes import refused_by

TASK = measure.Task("ours", False, "cpu", 1, [24, 24], 20, 0, 1, result="")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arm", "unsloth"], "--arm unsloth: not installed: unsloth"),
        (["--arm", "trl-liger"], "--arm trl-liger: not installed: transformers, peft, liger_kernel"),
        (["--arm", "ours", "--device", "cuda"], "torch finds no GPU here"),
        (["--arm", "ours", "--tokens", "4096"], "--tokens 4096"),
        (["--arm", "ours", "--tokens", "4x1"], "--tokens 4x1"),
        (["--arm", "ours", "--labelled", "1.5"], "--labelled 1.5"),
        (["--arm", "ours", "--labelled", "most"], "--labelled most"),
        (["--arm", "ours", "--layers", "65"], "--layers 65: expected 1 to 64"),
    ],
)
def test_a_mistake_is_one_line(capsys, monkeypatch, argv, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in refused_by(step.main, argv, capsys)


def test_the_script_starts_from_any_folder(tmp_path):
    """`python PATH/step.py` puts benchmarks/ on the path, not the repository's root."""
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "step.py"
    command = [sys.executable, script, "--arm", "ours", "--tokens", "4x1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "--tokens 4x1" in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("tokens", "labelled", "expected"),
    [
        ("recipe", "recipe", ([640] * 4, 560)),
        ("4x4096", "0.4", ([4096] * 4, 1638)),
        ("2x16", "1.0", ([16, 16], 15)),  # the first token is never predicted
    ],
)
def test_documents(tokens, labelled, expected):
    assert step.documents(tokens, labelled) == expected


def test_contenders_run_with_and_without_checkpointing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in ("transformers", "peft") else None)
    args = step.parse(["--all", "--device", "cpu", "--profile", "/tmp/trace.json"])
    tasks = step.entries(args)
    assert [step.label(task) for task in tasks] == ["ours", "ours, checkpointed", "hf-peft", "hf-peft, checkpointed"]
    assert len({task.profile for task in tasks}) == 4


def agreement(tmp_path, monkeypatch, factor: float) -> dict:
    """The agreement of ours with an oracle that is ours as well, with the last gradient scaled."""
    gradients = {"layers.0.mlp.up_proj.lora_A": torch.ones(3), "layers.0.mlp.up_proj.lora_B": torch.ones(2)}

    def run(task, folder):
        b_factor = factor if task.contender == "ours" else 1.0
        save_file({name: b_factor * x if name.endswith("B") else x for name, x in gradients.items()}, task.gradients)
        return {"loss": 2.0}

    monkeypatch.setattr(step, "run", run)
    tasks = {"ours": TASK, "hf-peft": replace(TASK, contender="hf-peft")}
    errors, not_compared = step.compare(tasks, tmp_path, 1)
    assert not not_compared
    return errors["ours"]


def test_a_contender_that_differs_is_not_timed(tmp_path, monkeypatch):
    assert "failed" not in agreement(tmp_path, monkeypatch, 1 + 5e-5)
    assert "differs from hf-peft: gradients by 1.0e-03" in agreement(tmp_path, monkeypatch, 1.001)["failed"]
    assert "failed" in agreement(tmp_path, monkeypatch, float("nan"))


@pytest.mark.parametrize(
    ("argv", "installed", "why"),
    [
        (["--all"], (), "hf-peft: not installed: transformers, peft (benchmarks/README.md lists versions)"),
        (["--all"], ("transformers", "peft"), "hf-peft failed: no such model"),
        (["--arm", "ours"], (), "--arm runs one contender alone; --all compares"),
    ],
)
def test_a_run_without_comparison_says_so(argv, installed, why, capsys, monkeypatch):
    """In the table and in the JSON. Ours is timed all the same."""
    failed, timed = {"failed": "no such model"}, {"seconds": 1.0, "cpu_seconds": 1.0, "loss": 2.0}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in installed else None)
    monkeypatch.setattr(step, "run", lambda task, folder: failed if task.contender == step.ORACLE else timed)
    monkeypatch.setattr(step, "take_turns", lambda tasks, folder: {name: step.run(tasks[name], "") for name in tasks})
    assert step.main([*argv, "--device", "cpu"]) == int(bool(installed))
    *lines, last = capsys.readouterr().out.splitlines()
    assert f"not compared: {why}" in lines and json.loads(last)["not compared"] == why
    assert json.loads(last)["contenders"]["ours"] == timed


def test_a_contender_that_trains_other_tensors_differs():
    assert step.gradient_error({"a": torch.ones(1)}, {"b": torch.ones(1)})["gradients"] == float("inf")


def test_a_contender_that_fails_says_why_and_stops_no_other(tmp_path, monkeypatch):
    script = "import sys; sys.stdin.readline(); sys.exit('no such kernel')"
    monkeypatch.setattr(step, "command", lambda task: [sys.executable, "-S", "-c", script])
    results = step.take_turns({"ours": TASK, "hf-peft": replace(TASK, contender="hf-peft")}, tmp_path)
    assert results == {name: {"failed": "no such kernel"} for name in ("ours", "hf-peft")}
    monkeypatch.setattr(step, "command", lambda task: [sys.executable, "-S", "-c", "import sys; sys.exit(3)"])
    assert step.run(TASK, tmp_path) == {"failed": "exit code 3"}


def test_64_layers_follow_from_the_slope(monkeypatch, tmp_path):
    monkeypatch.setattr(step, "run", lambda task, folder: {"seconds": 0.5 + 0.01 * task.layers})
    result = step.extrapolated(replace(TASK, layers=64), tmp_path)["extrapolated"]
    assert result["seconds"] == pytest.approx(0.5 + 0.64) and result["tokens_per_s"] == pytest.approx(48 / 1.14)
    monkeypatch.setattr(step, "run", lambda task, folder: {"failed": "out of memory"})
    assert step.extrapolated(TASK, tmp_path) == {}


def on_an_h200(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in ("transformers", "peft") else None)


@pytest.mark.parametrize("own", [None, "max_split_size_mb:128"])
def test_a_contender_on_a_gpu_has_the_allocator_of_training(own, monkeypatch):
    """Ours fills the GPU as its plan allows, which is made for segments that can grow."""
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", own or "removed again when the test ends")
    if own is None:
        monkeypatch.delenv("PYTORCH_ALLOC_CONF")

    def starts_cuda(device):
        raise OSError(os.environ["PYTORCH_ALLOC_CONF"])

    monkeypatch.setattr(torch.cuda, "get_device_properties", starts_cuda)
    with pytest.raises(OSError, match=own or "expandable_segments:True"):
        measure.main(replace(TASK, device="cuda"))


def test_the_table_of_a_gpu(capsys, monkeypatch):
    """A baseline that runs out of memory at 64 layers is extrapolated and marked so; a missing one is named."""
    on_an_h200(monkeypatch)

    def run(task, folder):
        if task.gradients:
            save_file({"a": torch.ones(2)}, task.gradients)
            return {"loss": 1.0}
        if task.layers == 64 and task.contender != "ours":
            return {"failed": "CUDA out of memory"}
        text_config = measure.architecture(torch.device("cuda"), task.layers)
        seconds = task.layers / 16 * (1 if task.contender == "ours" else 2)
        speed = {"seconds": seconds, "tokens_per_s": sum(task.lengths) / seconds, "peak": 8e10, "reserved": 8.4e10}
        return speed | measure.mfu(text_config, task, speed["tokens_per_s"]) | {"launches": 5000}

    monkeypatch.setattr(step, "run", run)
    assert step.main(["--all", "--layers", "64", "--labelled", "1.0"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    results, table = json.loads(last)["contenders"], "\n".join(lines)
    assert list(results) == ["ours", "hf-peft", "hf-peft, checkpointed"]
    assert results["ours"]["mfu"] == pytest.approx(4096 * 106.7e9 / 989e12, rel=1e-3)
    assert results["hf-peft"]["time_ratio"] == pytest.approx(2) and "memory_ratio" not in results["hf-peft"]
    assert "extrapolated from 8 and 16 layers; at 64: CUDA out of memory" in table and "44.2%" in table
    assert "unsloth                   not measured: not installed: unsloth" in table


def test_the_roofline_counts_what_the_plan_recomputes(monkeypatch):
    on_an_h200(monkeypatch)
    config = ModelConfig.from_dict(measure.architecture(torch.device("cuda"), 64))
    task = replace(TASK, device="cuda", layers=64, lengths=[4096] * 4, trained=4095)
    seconds = measure.roofline(SimpleNamespace(recompute_seconds=lambda: 0.2), task, config)
    assert seconds["recompute"] == pytest.approx(0.2) and seconds["GEMM"] == pytest.approx(2.121, abs=1e-3)
    assert 0.1 < seconds["elementwise"] < 0.2 and 0 < seconds["loss"] < 0.01


def test_work_is_sorted_by_kind_forward_and_backward():
    """Products named as attention are attention's, in backward, too; an optimiser's are its own; the rest is GEMM."""
    x, w = torch.randn(64, 128), torch.randn(128, 128, requires_grad=True)
    with torch.profiler.profile() as trace:
        y = x @ w
        with record_function("op:causal_attention"):
            y = y @ w
        y.exp().sum().backward()
        with record_function("optimiser"):
            torch.mm(x, x.T)
    events = list(trace.events())
    seconds, total = measure.by_kind(events, cuda=False), sum(e.self_cpu_time_total for e in events) / 1e6
    assert set(seconds) == {"GEMM", "attention", "elementwise", "optimiser"} and min(seconds.values()) > 0
    assert sum(seconds.values()) == pytest.approx(total, rel=1e-6)
    # Mutant: without forward's sequence numbers the backward pass of attention is not recognised.
    for event in events:
        event.sequence_nr = -1
    assert measure.by_kind(events, cuda=False)["attention"] < seconds["attention"]


def test_one_contender_from_beginning_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    task = replace(TASK, result=str(tmp_path / "result.json"), profile=str(tmp_path / "trace.json"))
    measure.main(task)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["seconds"] > 0 and result["cpu_seconds"] > 0 and "mfu" not in result
    assert {"GEMM", "delta rule", "loss", "optimiser", "idle"} <= set(result["profile"])
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    cells = step.cells(result)
    assert cells[5] == "-" and len(cells) == 11
    measure.main(replace(task, gradients=str(tmp_path / "g.safetensors")))
    assert all(g.abs().max() > 0 for g in load_file(tmp_path / "g.safetensors").values()), "B is zero"


@pytest.mark.slow
def test_the_benchmark_runs_and_the_contenders_agree(tmp_path, capfd):
    """In processes of their own, down to the JSON line."""
    argv = ["--device", "cpu", "--all", "--layers", "4", "--compare-layers", "4", "--tokens", "2x40"]
    assert main_guard(step.main, [*argv, "--steps", "1", "--warmups", "0", "--out", str(tmp_path / "out.json")]) == 0
    report = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert report == json.loads((tmp_path / "out.json").read_text())
    assert report["agreement"]["ours"]["gradients"] < 1e-4 and report["contenders"]["hf-peft"]["time_ratio"] > 0
    assert set(report["not measured"]) | {x.split(",")[0] for x in report["contenders"]} == set(CONTENDERS)
