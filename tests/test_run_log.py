"""Metrics that read back bit for bit, a log that a resume can cut back, trackers and plots that fail early."""

import errno
import importlib.util
import io
import json
import math
import os
import struct
import sys
import types

import pytest
import torch

from psysafe.program import UserError
from psysafe.runtime import DeviceTime, Peak, Runtime
from psysafe.training import run_log
from psysafe.training.config import KEYS, TrainConfig
from psysafe.training.run_log import (
    MAX_SKIPPED,
    RunLog,
    StepResult,
    check_packages,
    cut_metrics,
    plot_loss,
    print_run,
    read_metrics,
)
from psysafe.training.tracker import check_login
from tests.mistakes import refused

CPU = Runtime(torch.device("cpu"), torch.float32)


def write_run(run_dir, steps=range(1, 4), first_step=0, runtime=CPU, **options):
    with RunLog(run_dir, TrainConfig(), runtime, 3, first_step, **options) as log:
        for step in steps:
            log.step(step, loss=1 / step, lr=1e-4 / 3, grad_norm=0.1 * step, tokens=100, seconds=0.5, trained_tokens=40)
        log.validation(step, {"val_loss": 0.1 + 0.2})


def test_numbers_read_back_bit_for_bit(tmp_path):
    write_run(tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    bits = [struct.pack("<dd", row["loss"], row["lr"]) for row in rows[:3]]
    assert bits == [struct.pack("<dd", 1 / step, 1e-4 / 3) for step in (1, 2, 3)]
    assert rows[3] == {"step": 3, "val_loss": 0.1 + 0.2}
    assert rows[0]["trained_tokens"] == 40 and rows[0]["tokens_per_s"] == 200 and rows[0]["memory"] > 1e6


def result(step: int, skipped: int = 0, loss: float = 0.5) -> StepResult:
    scalars = {"loss": loss, "grad_norm": math.nan if skipped else 0.25, "skipped": skipped}
    fields = {"step": step, "lr": 1e-4, "tokens": 100, "trained_tokens": 40, "documents": [f"row {step}"]}
    return StepResult(DeviceTime(CPU.device), fields, **{name: torch.tensor(x) for name, x in scalars.items()})


def logged_steps(run_dir) -> list[int]:
    return [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")]


def test_a_step_is_logged_one_step_late_and_before_a_save(tmp_path):
    with RunLog(tmp_path, TrainConfig(), CPU, 3) as log:
        log.later(result(1))
        assert logged_steps(tmp_path) == []
        log.later(result(2))
        assert logged_steps(tmp_path) == [1]
        log.catch_up()
        log.catch_up()  # nothing is logged twice
        assert logged_steps(tmp_path) == [1, 2]
        log.later(result(3))
        log.sync()
        assert logged_steps(tmp_path) == [1, 2, 3]
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert row["loss"] == 0.5 and row["seconds"] >= 0 and not {"skipped", "documents"} & row.keys()


def test_a_skipped_step_names_its_rows_and_the_third_in_a_row_ends_the_run_on_every_rank(tmp_path, capsys):
    for rank in (0, 1):
        runtime = Runtime(torch.device("cpu"), torch.float32, rank=rank, world_size=2)
        with RunLog(tmp_path, TrainConfig(), runtime, 9) as log:
            for skipped in range(1, MAX_SKIPPED + 1):
                log.later(result(skipped, skipped))
            with pytest.raises(UserError, match="step 3: gradient norm not finite 3 times in a row, the last good"):
                log.later(result(4))
    assert read_metrics(tmp_path / "metrics.jsonl")[1]["documents"] == ["row 2"]
    assert "warning: step 2: gradient norm nan, nothing updated: ['row 2']" in capsys.readouterr().out


def test_an_error_is_not_hidden_by_a_step_that_never_arrives(tmp_path):
    class NeverArrives:
        def read(self):
            raise RuntimeError("CUDA error")

    with pytest.raises(ZeroDivisionError), RunLog(tmp_path, TrainConfig(), CPU, 3) as log:
        log.later(NeverArrives())
        raise ZeroDivisionError


def test_lines_stand_in_columns_and_mfu_needs_a_known_peak(tmp_path, capsys, monkeypatch):
    write_run(tmp_path, flops_per_token=1e9)
    header, first, *_, last = capsys.readouterr().out.splitlines()
    assert len(header) == len(first) and header.split()[:3] == ["step", "loss", "lr"]
    assert first.split()[:2] == ["1/3", "1.0000"] and " - " in first and first.split()[4] == "200"
    assert last.split() == ["3/3", "validation", "loss", "0.3000"]

    monkeypatch.setattr(Runtime, "peak", Peak(1e12, 1e12))
    write_run(tmp_path, flops_per_token=1e9)
    assert capsys.readouterr().out.splitlines()[1].split()[5] == "20.0%"  # 200 tokens/s x 1e9 / 1e12
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["mfu"] == pytest.approx(0.2)


def test_what_is_not_finite_becomes_null_and_the_file_stays_json(tmp_path):
    with RunLog(tmp_path, TrainConfig(), CPU, 1) as log:
        log.step(1, loss=math.nan, lr=1e-4, grad_norm=math.inf, tokens=1, seconds=0.0, skipped=True, documents=[3, 1])
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row["loss"] is None and row["grad_norm"] is None and row["documents"] == [3, 1]


@pytest.mark.parametrize("torn", [b"", b'{"step": 4, "lo', b'{"step": 4}', b"\0\0\0\n"])
def test_a_resume_cuts_the_log_back_and_mends_a_torn_last_line(tmp_path, torn):
    write_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    cut_metrics(path, 2)
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])
    write_run(tmp_path, steps=[3], first_step=2)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 3]


def test_damage_in_the_middle_of_the_log_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    refused(r"metrics.jsonl line 2: not a JSON object with a step; mend", RunLog, tmp_path, TrainConfig(), CPU, 3, 1)


class FullDisk:
    """Takes `room` bytes in all, then refuses, as a disk does: the last write is cut."""

    def __init__(self, file, room):
        self.file, self.room, self.name = file, room, file.name

    def write(self, data) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_costs_a_warning_and_no_row_once_there_is_room(tmp_path, capsys):
    with RunLog(tmp_path, TrainConfig(), CPU, 4) as log:
        log.file = FullDisk(log.file, 200)
        for step in range(1, 5):
            log.step(step, loss=1.0, lr=1e-4, grad_norm=0.1, tokens=100, seconds=0.5)
        log.sync()
        assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]
        log.file.room = 10**6
        log.validation(4, {"val_loss": 0.5})
        rows = read_metrics(tmp_path / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 4]
    out = capsys.readouterr().out
    assert out.count("No space left on device; training goes on") == 1 and "lacks" not in out


def test_a_disk_that_stays_full_is_reported_at_the_end(tmp_path, capsys):
    with RunLog(tmp_path, TrainConfig(), CPU, 2) as log:
        log.file = FullDisk(log.file, 0)
        log.validation(1, {"val_loss": 0.5})
    assert "lacks its last 1 row," in capsys.readouterr().out


def test_only_the_main_rank_writes(tmp_path, capsys):
    write_run(tmp_path, runtime=Runtime(torch.device("cpu"), torch.float32, rank=1, world_size=2))
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar_instead_of_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    write_run(tmp_path)
    shown = capsys.readouterr().out
    assert "3/3" in shown and "loss 0.3333" in shown and "validation loss 0.3000" in shown
    assert run_log.HEADER not in shown


def test_the_resolved_run_names_every_setting_and_its_source(capsys):
    print_run(TrainConfig(lr=2e-4), dict.fromkeys(KEYS, "default") | {"lr": "--lr"}, {"kernels": "reference"})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines if line] == [*KEYS, "kernels"]
    assert ["lr", "0.0002", "--lr"] in lines and ["plot", "false", "default"] in lines


def test_a_tracker_that_is_not_installed_is_an_error_at_the_start(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--report trackio: trackio is not installed; pip install trackio"):
        check_packages(TrainConfig(report="trackio"))
    refused("--plot: matplotlib is not installed; pip install matplotlib", check_packages, TrainConfig(plot=True))
    check_packages(TrainConfig())


def fake_tracker(monkeypatch, name: str, fails: str = "", error: BaseException | None = None) -> list[tuple]:
    """A module that notes its calls in the list that is returned; the function `fails` raises the error."""
    calls = []

    def function(function_name, note):
        def call(*args, **options):
            calls.append((function_name, *note(*args, **options)))
            if function_name == fails:
                raise error

        return call

    notes = {
        "login": lambda **_: (),
        "init": lambda **options: (options["project"], options["name"], options.get("id"), options["resume"]),
        "log": lambda row, step: (step, row.get("loss", row.get("val_loss"))),
        "finish": lambda: (),
    }
    tracker = types.ModuleType(name)
    tracker.__spec__ = importlib.util.spec_from_loader(name, None)  # as if it were installed
    for function_name, note in notes.items():
        setattr(tracker, function_name, function(function_name, note))
    monkeypatch.setitem(sys.modules, name, tracker)
    monkeypatch.setenv("WANDB_DIR", "")
    return calls


def tracked_run(folder, report: str, run_id: str = "0ab1") -> None:
    with RunLog(folder, TrainConfig(report=report, out=str(folder)), CPU, 1, run_id=run_id) as log:
        log.step(1, loss=0.5, lr=1e-4, grad_norm=1.0, tokens=1, seconds=1.0)
        log.validation(1, {"val_loss": 0.25})


@pytest.mark.parametrize(("report", "ending", "run_id"), [("wandb", "", "0ab1"), ("trackio", "-0ab1", None)])
def test_a_tracker_gets_every_row_in_a_run_that_can_be_continued(report, ending, run_id, tmp_path, monkeypatch):
    """wandb continues a run by its id, trackio by its name."""
    calls = fake_tracker(monkeypatch, report)
    tracked_run(tmp_path, report)
    init = ("init", "psych-safety-finetuning", tmp_path.name + ending, run_id, "allow")
    assert calls == [init, ("log", 1, 0.5), ("log", 1, 0.25), ("finish",)]


ERRORS = (RuntimeError("killed\nin the middle"), BrokenPipeError(errno.EPIPE, "Broken pipe"), SystemExit(1))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_costs_one_line_and_no_row(fails, error, tmp_path, monkeypatch, capsys):
    calls = fake_tracker(monkeypatch, "wandb", fails, error)
    tracked_run(tmp_path, "wandb")
    assert logged_steps(tmp_path) == [1, 1] and calls[-1][0] == fails  # and nothing is called after it
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and warnings[0].startswith(f"warning: --report wandb: {type(error).__name__}: ")
    assert warnings[0].endswith("training goes on without it, metrics.jsonl has every row")


def test_a_missing_login_is_an_error_before_the_weights_and_a_missing_network_is_none(monkeypatch):
    usage_error = type("UsageError", (Exception,), {})
    fake_tracker(monkeypatch, "wandb", "login", usage_error("No API key configured. Use `wandb login` to log in."))
    refused("--report wandb: No API key configured.*WANDB_MODE=offline", check_login, TrainConfig(report="wandb"))
    check_login(TrainConfig(report="trackio"))
    calls = fake_tracker(monkeypatch, "wandb", "login", ConnectionError("no network"))
    check_login(TrainConfig(report="wandb"))
    assert calls == [("login",)]


def test_the_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    write_run(tmp_path)
    assert plot_loss(tmp_path).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "loss.png"}


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(("number", "signal"), [(errno.EPIPE, 13), (errno.EIO, 13), (errno.ENOSPC, 0)])
def test_output_that_fails_costs_no_row_and_says_whether_anybody_reads(
    number, signal, terminal, tmp_path, monkeypatch, capsys
):
    """As with `| head`, a closed terminal, a log on a full disk: rows are written, the run is asked to end or not."""

    class Output(io.StringIO):
        fails = False
        isatty = staticmethod(lambda: terminal)

        def write(self, text):
            if self.fails:
                raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Output())
        with RunLog(tmp_path, TrainConfig(), CPU, 3) as log:
            sys.stdout.fails = True
            for step in (1, 2, 3):
                log.step(step, loss=1.0, lr=1e-4, grad_norm=0.1, tokens=100, seconds=0.5)
            log.validation(3, {"val_loss": 0.5})
    assert logged_steps(tmp_path) == [1, 2, 3, 3]
    lines = {
        13: "nobody reads this output any more: finishing this step, then saving\n",
        0: "warning: standard output: No space left on device; training goes on, lines are missing\n",
    }
    assert log.signal == signal and capsys.readouterr().err == lines[signal]
