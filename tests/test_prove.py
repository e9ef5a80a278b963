"""benchmarks/prove.py: no stage stops another, every result is in a valid file at once, the exit code says the rest."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import prove, prove_tasks
from benchmarks.prove import FAILED, NOT_REACHED, ROOT, Stage
from kernels.proof import bench
from kernels.proof.registry import operations
from tests.prove_stages import broken, fine, hanging, troubled

KERNELS = [
    {"direction": direction, "name": f"gated_rms_norm {direction}", "function": f"_{direction}_kernel"}
    for direction in ("forward", "backward")
]


def stage(tasks, share: float = 1, silence: float = 30) -> Stage:
    return Stage(tasks.__name__, share, silence, f"tests.prove_stages:{tasks.__name__}")


def ends(pid: int) -> bool:
    """Whether a process ends, within two minutes however busy the machine is."""
    for _ in range(2400):
        status = Path(f"/proc/{pid}/status")
        if not status.exists() or "\nState:\tZ" in status.read_text():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def pid_file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PROVE_TEST_PID", str(tmp_path / "pid"))
    return tmp_path / "pid"


def results(out: Path, name: str) -> dict[str, str]:
    return {row["task"]: row["result"] for row in json.loads(out.read_text())["rows"] if row["stage"] == name}


def test_what_fails_or_crashes_is_a_row_and_the_rest_goes_on(tmp_path, capsys):
    out = tmp_path / "prove.json"
    assert prove.prove([stage(broken), stage(troubled), stage(fine)], 1, out) == FAILED
    document = json.loads(out.read_text())
    assert results(out, "broken") == {"start": "failed"}
    assert list(results(out, "troubled").values()) == ["failed", "not measured", "ok", "failed", "ok", "failed", "ok"]
    assert results(out, "fine") == {"one": "ok", "two": "ok"}
    assert document["ended"] and document["on_paper"] and document["not_reached"] == []
    first, second, third = (row["pid"] for row in document["rows"] if "pid" in row)
    assert len({first, second, third}) == 3, "after a lost context or a crash a new process goes on"
    reasons = "\n".join(document["failed"])
    for text in ("no module of that name", "ValueError: a wrong value", "illegal memory access", "(-11)"):
        assert text in reasons
    assert len(document["failed"]) == 4
    assert all(line.startswith("on paper: ") for line in capsys.readouterr().out.splitlines())


def test_a_task_that_hangs_is_killed_with_all_it_started_and_the_rest_goes_on(tmp_path, pid_file):
    out, began = tmp_path / "prove.json", time.monotonic()
    assert prove.prove([stage(fine)], 1, tmp_path / "fine.json") == 0
    start_s = time.monotonic() - began  # of one stage, on this machine as busy as it is
    assert prove.prove([stage(hanging, silence=1.5), stage(fine)], 1, out) == FAILED
    assert results(out, "hanging") == {"before": "ok", "hangs": "hung", "after": "ok"}
    assert 1.5 <= json.loads(out.read_text())["rows"][1]["seconds"] < 1.5 + start_s, "from the result before it"
    assert results(out, "fine") == {"one": "ok", "two": "ok"}
    assert ends(int(pid_file.read_text()))


@pytest.mark.slow
def test_a_stage_ends_with_its_time_and_leaves_the_next_one_theirs(tmp_path, pid_file):
    out = tmp_path / "prove.json"
    assert prove.prove([stage(hanging), stage(fine, share=2)], 30 / 60, out) == NOT_REACHED
    document = json.loads(out.read_text())
    assert results(out, "hanging") == {"before": "ok", "hangs": "unfinished"}
    assert document["not_reached"] == ["hanging: hangs", "hanging: after"] and document["failed"] == []
    assert results(out, "fine") == {"one": "ok", "two": "ok"}


def test_all_that_holds_and_a_missing_peer_is_success(tmp_path):
    assert prove.prove([stage(fine)], 1, tmp_path / "prove.json") == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_killed_in_the_middle_it_leaves_a_valid_file_and_no_process(number, tmp_path, pid_file):
    out = tmp_path / "prove.json"
    program = (
        "import sys; from pathlib import Path; from benchmarks.prove import Stage, exit_on_signals, prove\n"
        "stages = [Stage(name, 1, 30, f'tests.prove_stages:{name}') for name in ('fine', 'hanging')]\n"
        "with exit_on_signals(): prove(stages, 1, Path(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(out)], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (pid_file.exists() and pid_file.read_text() and results(out, "hanging")):
        assert process.poll() is None
        if out.exists():
            json.loads(out.read_text())  # valid at every moment
        time.sleep(0.02)
    process.send_signal(number)
    process.wait(300)
    document = json.loads(out.read_text())
    assert not document["ended"]
    assert results(out, "fine") == {"one": "ok", "two": "ok"} and results(out, "hanging") == {"before": "ok"}
    assert document["not_reached"] == ["hanging: hangs", "hanging: after"]
    assert ends(int(pid_file.read_text()))


def test_stages_without_time_are_named(tmp_path):
    report = prove.Report(tmp_path / "prove.json", 1, [stage(fine), stage(hanging)])
    report.tasks["fine"] = ["one", "two"]
    report.add(stage(fine), {"task": "one", "result": "ok", "seconds": 0.0})
    assert json.loads(report.out.read_text())["not_reached"] == ["fine: two", "hanging: all"]


def test_every_kernel_is_shown_on_paper_against_measured():
    """The kernels' names in the profile are the functions'; the bandwidth of the table is 3.0 TB/s."""
    (op,) = operations(["gated_rms_norm"])
    kernels = prove_tasks.predicted(op, op.cases[0])
    assert [(k["direction"], k["name"]) for k in kernels] == [
        ("forward", "gated_rms_norm forward"),
        ("backward", "gated_rms_norm backward"),
    ]
    floor = 1e6 * op.work(**op.cases[0]).forward_bytes / 3.0e12
    assert floor <= kernels[0]["paper_us"] <= 1.2 * floor
    prove_tasks.set_measured(kernels, "forward", {"_forward_kernel": 100.0, "_backward_kernel": 7.0})
    row = {"stage": "bench", "task": op.name, "result": "ok", "seconds": 1.0, "kernels": kernels}
    _, forward, backward = prove.lines(row)
    assert "measured     100 us" in forward and f"{100 / kernels[0]['paper_us']:.2f} x" in forward
    assert backward.endswith("us, not measured")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU in the eyes of the tasks; what is timed there runs as the reference on the CPU."""
    monkeypatch.setattr(prove_tasks, "on_paper", lambda: False)
    monkeypatch.setattr(prove_tasks.torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(prove_tasks, "_measured_ceilings", lambda: bench.Ceilings(3e12, 700e12))
    monkeypatch.setattr(prove_tasks, "_profiled", lambda call: {"_forward_kernel": 40.0})
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "median_ms", lambda calls, repeats: (calls[0]() and repeats / 10) or repeats / 10)
    (op,) = operations(["gated_rms_norm"])
    reference = dataclasses.replace(op, triton=op.reference, cases=op.cases[-1:], peers=())
    monkeypatch.setattr(prove_tasks, "_operations", lambda: [reference])


def test_on_a_gpu_the_bench_times_triton_and_then_one_baseline(gpu, monkeypatch):
    monkeypatch.setattr(prove_tasks, "predicted", lambda op, size: [entry | {"paper_us": 20.0} for entry in KERNELS])
    ours, baseline = prove_tasks.bench()
    row = ours.run()
    assert row["numbers"]["forward ms"] == row["numbers"]["backward ms"] == bench.REPEATS / 10
    assert [kernel.get("measured_us") for kernel in row["kernels"]] == [40.0, None]
    assert baseline.name == "gated_rms_norm, torch"
    assert baseline.run()["numbers"]["forward ms"] == prove_tasks.BASELINE_REPEATS / 10
    assert all(time["version"] == "torch" for time in baseline.run()["times"])
    json.dumps(row)


def test_what_was_measured_counts_without_a_prediction(gpu, monkeypatch):
    monkeypatch.setattr(prove_tasks, "predicted", lambda op, size: 1 / 0)
    row = prove_tasks.bench()[0].run()
    assert "no prediction: ZeroDivisionError" in row["reason"] and row["numbers"]["forward ms"]


def test_on_a_gpu_every_stage_knows_its_tasks(gpu):
    assert [task.name for task in prove_tasks.check()] == ["gated_rms_norm"]
    assert [task.name for task in prove_tasks.generate()] == ["0.8B", "27B"]
    names = [task.name for task in prove_tasks.rest()]
    assert any("bfloat16" in name for name in names) and any("mutant" in name for name in names)
    assert "NVIDIA H100" in prove_tasks.environment()[0].run()["reason"]
    row = prove_tasks.environment()[1].run()
    assert row["numbers"]["copy GB/s"] == pytest.approx(3000)


@pytest.mark.parametrize("options", [["--minutes", "0"], ["--minutes", "nan"], ["--out", "nowhere/prove.json"]])
def test_wrong_use_is_refused(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(prove.UserError, match=r"expected|does not exist"):
        prove.main(options)


@pytest.mark.slow
def test_on_paper_it_runs_to_its_end(tmp_path):
    out = tmp_path / "prove.json"
    command = [sys.executable, "-m", "benchmarks.prove", "--minutes", "0.2", "--out", str(out)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    document = json.loads(out.read_text())
    assert document["ended"] and document["on_paper"] and document["failed"] == []
    assert finished.returncode == (NOT_REACHED if document["not_reached"] else 0), finished.stderr
    reached = {row["stage"] for row in document["rows"]} | {name.partition(":")[0] for name in document["not_reached"]}
    assert reached == {s.name for s in prove.STAGES}
    assert all(line.startswith("on paper: ") for line in finished.stdout.splitlines())
