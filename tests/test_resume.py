"""Exact resume: killed at random moments, stopped by signals, and continued, a run repeats the uninterrupted one bit
for bit: loss, lr, gradient norm, validation loss, adapter. Also the lines that bad input gets from train.py."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from psysafe.files import ASSETS, TEMPORARY
from psysafe.program import main_guard
from tests.oracles import BASE
from tests.test_runtime import END_S

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
EXACT = ("loss", "lr", "grad_norm", "val_loss", "contrast_loss", "contrast_kl", "tokens", "trained_tokens")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return write_workspace(tmp_path_factory.mktemp("resume"))


def write_workspace(folder: Path) -> Path:
    """A micro model with random weights, the bundled tokenizer, and a few rows: a step takes some 20 ms."""
    shutil.copy(ASSETS / "tiny" / "tokenizer.json", folder)
    vocab = json.loads((ASSETS / "tiny" / "config.json").read_text())["vocab_size"]
    (folder / "config.json").write_text(json.dumps({**BASE, "vocab_size": vocab, "model_type": "qwen3_5_text"}))
    rows = (ASSETS / "rows" / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(rows[:22]))
    (folder / "val.jsonl").write_text("\n".join(rows[30:34]))
    return folder


def command(folder: Path, out: str, *more: str) -> list[str]:
    """22 rows, 2 a step, 3 epochs (or --max-steps): 33 steps with a validation after 0, 11, 22 and 33."""
    flags = f"--model random:{folder}/config.json --data {folder}/train.jsonl --val-data {folder}/val.jsonl "
    flags += f"--out {folder / out} --batch-size 2 --save-every 2 --warmup-steps 3 --max-tokens 80 --lr 1e-2"
    flags += "" if "--max-steps" in more else " --epochs 3"
    return [sys.executable, str(ROOT / "train.py"), "--resume", "auto", *flags.split(), *more]


def finish(folder: Path, out: str, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(folder, out, *more), env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("step", *EXACT) if key in row} for row in rows]


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    first, second = (load_file(run / "adapter_model.safetensors") for run in (a, b))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


INTERRUPTED = """
import os, sys, train
original = train.train_step

def train_step(run):
    if run.step == {step}:
        os.kill(os.getpid(), {number})
    return original(run)

train.train_step = train_step
sys.exit(train.main_guard(train.main))
"""


def interrupt(folder: Path, out: str, step: int, number: int) -> int:
    """Starts or continues a run that gets the signal at the beginning of a step, finishes it, and makes no other one ->
    the exit code. Sent from here, the signal could come when a short run has ended."""
    script = INTERRUPTED.format(step=step, number=int(number))
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script, *command(folder, out)[2:]], env=environment, timeout=END_S)
    assert max(row["step"] for row in metrics(folder / out)) == step + 1
    return done.returncode


def kill(folder: Path, out: str, chance: random.Random, saving: bool) -> str:
    """Starts or continues a run and sends SIGKILL at a random moment; `saving`: while a file of a save is half there.

    Returns where it hit: "a save" or "a step", or "" when the run came to its end before.
    """
    process = subprocess.Popen(command(folder, out), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    lines = iter(process.stdout.readline, "")
    for _ in range(chance.randint(1, 4)):  # the first line of the table is its head
        next((line for line in lines if "/33 " in line or line.lstrip().startswith("step ")), None)
    end = time.monotonic() + (60 if saving else chance.uniform(0, 0.1))
    while time.monotonic() < end and process.poll() is None and not (saving and unfinished(folder / out)):
        time.sleep(0 if saving else 0.001)
    process.kill()
    process.stdout.read()
    if process.wait(timeout=END_S) == 0:
        return ""
    assert process.returncode == -signal.SIGKILL
    return "a save" if unfinished(folder / out) else "a step"


def unfinished(run: Path) -> bool:
    """Whether a file or folder of a save lies there under its temporary name."""
    return any(TEMPORARY in name for place in (run, run / "state") if place.is_dir() for name in os.listdir(place))


def soak(folder: Path, whole: Path, kills: int, chance: random.Random, say=print) -> None:
    """Kills runs `kills` times, every second time inside a save, continues each, and compares every one that comes to
    its end with the uninterrupted run. AssertionError where they differ."""
    done, run = 0, 0
    while done < kills:
        hit = kill(folder, f"killed-{run}", chance, saving=done % 2 == 1)
        if hit:
            done += 1
            rows = (folder / f"killed-{run}" / "metrics.jsonl").read_bytes().count(b"\n")
            say(f"kill {done:>2} of {kills}: run {run}, inside {hit}, {rows} rows of metrics on the disk")
        if not hit or done == kills:
            ended = finish(folder, f"killed-{run}")
            assert ended.returncode == 0, ended.stderr
            assert_same_run(whole, folder / f"killed-{run}")
            say(f"run {run} came to its end: metrics and adapter bit-identical to the uninterrupted run's")
            run += 1


@pytest.fixture(scope="module")
def uninterrupted(workspace) -> Path:
    return run_whole(workspace)


def run_whole(workspace: Path) -> Path:
    done = finish(workspace, "whole")
    assert done.returncode == 0, done.stderr
    rows = metrics(workspace / "whole")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 34))
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 11, 22, 33]
    return workspace / "whole"


@pytest.mark.slow
def test_killed_at_five_random_moments(workspace, uninterrupted):
    soak(workspace, uninterrupted, 5, random.Random(0))


@pytest.mark.slow
def test_stop_signals_save_and_exit(workspace, uninterrupted):
    """The step is finished, the state saved, the exit code says which signal; continuing gives the same run."""
    assert interrupt(workspace, "stopped", 3, signal.SIGTERM) == 143
    assert list((workspace / "stopped" / "state").iterdir())
    assert interrupt(workspace, "stopped", 12, signal.SIGINT) == 130
    assert finish(workspace, "stopped").returncode == 0
    assert_same_run(uninterrupted, workspace / "stopped")


@pytest.mark.slow
def test_a_forgotten_part_of_the_state_is_caught(workspace, uninterrupted, tmp_path):
    """A resume that forgot the optimiser's state (here: zeroed in the saved file) is not bit-identical."""
    from safetensors.torch import save_file

    from psysafe.training.run_state import _sums

    interrupt(workspace, "damaged", 6, signal.SIGTERM)
    newest = max((workspace / "damaged" / "state").iterdir())
    tensors = load_file(newest / "state.safetensors")
    tensors["absmax_m"].zero_()
    save_file(tensors, newest / "state.safetensors")
    contents = {name: (newest / name).read_bytes() for name in ("state.safetensors", "state.json")}
    (newest / "SHA256SUMS").write_bytes(_sums(contents))
    assert finish(workspace, "damaged").returncode == 0
    with pytest.raises(AssertionError):
        assert_same_run(uninterrupted, workspace / "damaged")


@pytest.mark.slow
def test_training_goes_on_from_an_adapter(workspace, uninterrupted):
    """--adapter-init: the first step of a warm-up has rate 0, so after it the adapter is still the one that was given;
    after two steps it has moved."""
    first = load_file(uninterrupted / "adapter_model.safetensors")
    for steps, same in ((1, True), (2, False)):
        out = f"from-adapter-{steps}"
        done = finish(workspace, out, "--adapter-init", str(uninterrupted), "--max-steps", str(steps))
        assert done.returncode == 0, done.stderr
        tensors = load_file(workspace / out / "adapter_model.safetensors")
        assert all(torch.equal(tensors[name], first[name]) for name in first) == same
    assert metrics(workspace / "from-adapter-1")[0]["val_loss"] == metrics(uninterrupted)[-1]["val_loss"]


def refused(workspace, capfd, *flags: str) -> str:
    """Runs train.py in this process; it has to end with code 2 and one line on stderr."""
    import train
    from psysafe.program import main_guard

    argv = command(workspace, "refused", *flags)[4:]
    assert main_guard(train.main, argv) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": ', "malformed JSON at line 2"),
        ('{"prompt": "a"}\n', "no answer"),
        ("[1]", "row 1"),
    ],
)
def test_bad_rows_are_one_line(workspace, capfd, tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_text(content)
    line = refused(workspace, capfd, "--data", str(tmp_path / "rows.jsonl"))
    assert message in line and "rows.jsonl" in line


def test_bad_settings_are_one_line(workspace, capfd):
    assert "--lora-rank" in refused(workspace, capfd, "--lora-rnak", "2")
    assert "no such model folder" in refused(workspace, capfd, "--model", "./nowhere")
    assert "lora_targets" in refused(workspace, capfd, "--lora-targets", "q_porj")


def test_a_bad_out_or_resume_is_found_before_the_weights(workspace, uninterrupted, capfd, tmp_path, monkeypatch):
    """Nor is anything made or moved: the finished run that stands in --out stays as it is."""
    import train

    def load_model(*args, **kwargs):
        raise AssertionError("the weights came first")

    monkeypatch.setattr(train, "load_model", load_model)
    (tmp_path / "file").write_text("x")
    assert "file is a file" in refused(workspace, capfd, "--out", str(tmp_path / "file" / "run"))
    assert "no saved state there" in refused(workspace, capfd, "--resume", str(tmp_path))
    state = str(uninterrupted)
    assert "lr (saved 0.01, now 0.5)" in refused(workspace, capfd, "--resume", state, "--lr", "0.5")
    assert "other rows" in refused(workspace, capfd, "--resume", state, "--data", f"{workspace}/val.jsonl")
    assert not (workspace / "refused").exists() and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({}, []),
        ({"torch": "2.11.0"}, ["saved with torch 2.11.0, continued with torch 2.13.0: no longer bit for bit"]),
        ({"ranks": 2}, ["saved with ranks 2, continued with ranks 1"]),
        ({"psysafe": None}, ["saved with psysafe unknown, continued with psysafe 0.1.0"]),
    ],
)
def test_other_software_is_a_warning(meta, expected, tmp_path):
    from psysafe.training.run_state import State

    now = {"psysafe": "0.1.0", "python": "3.11", "torch": "2.13.0", "triton": "3.7.1", "ranks": 1}
    saved = now | meta
    ranks = saved.pop("ranks")
    lines = State(1, {}, {"versions": saved, "world_size": ranks}, tmp_path).changed(now)
    assert len(lines) == len(expected) and all(text in line for text, line in zip(expected, lines, strict=True))


def test_the_version_is_that_of_the_package():
    import tomllib

    from psysafe import __version__

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__


def run_here(workspace, out, monkeypatch, failing) -> int:
    """A short run in this process in which the saves that `failing(n)` names find the disk full."""
    import errno

    import train
    from psysafe.training import run_state

    calls, save_state = [0], run_state.save_state

    def save(*args, **kwargs):
        calls[0] += 1
        if failing(calls[0]):
            raise run_state.StateNotSaved(errno.ENOSPC, "No space left on device")
        return save_state(*args, **kwargs)

    monkeypatch.setattr(run_state, "save_state", save)
    return train.main(command(workspace, out, "--max-steps", "6")[4:])


def test_a_full_disk_costs_a_warning(workspace, capsys, monkeypatch):
    """The save after step 4 fails: training goes on, and the one before and the last are there."""
    assert run_here(workspace, "full-once", monkeypatch, lambda n: n == 3) == 0
    assert "step 4 was not saved" in capsys.readouterr().out
    states = [path.name for path in (workspace / "full-once" / "state").iterdir()]
    assert sorted(states) == ["step-00000002", "step-00000006"]


def test_a_disk_that_stays_full_is_no_success(workspace, capsys, monkeypatch):
    assert run_here(workspace, "full", monkeypatch, lambda n: True) == 1
    assert "make room and finish with --resume auto" in capsys.readouterr().err


def test_a_flipped_byte_in_the_newest_state_is_a_warning_and_the_older_one_used(workspace, capsys):
    import train

    argv = command(workspace, "flipped", "--max-steps", "4")[2:]
    assert train.main(argv) == 0
    newest = max((workspace / "flipped" / "state").iterdir())
    assert newest.name.startswith("step-00000004")
    content = bytearray((newest / "state.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "state.safetensors").write_bytes(content)
    capsys.readouterr()
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    assert f"{newest} is damaged and passed over: its checksums do not hold" in out and "resuming after step" in out
    assert [row["step"] for row in metrics(workspace / "flipped") if "loss" in row] == [1, 2, 3, 4]


def test_a_tokenizer_of_another_model_is_named(workspace, capfd, tmp_path):
    small = {**json.loads((workspace / "config.json").read_text()), "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(small))
    shutil.copy(workspace / "tokenizer.json", tmp_path)
    line = refused(workspace, capfd, "--model", f"random:{tmp_path}/config.json")
    assert "its config.json says vocab_size 100" in line


def test_two_runs_in_one_folder_do_not_mix(workspace, capfd):
    """The second one, started during the first one's third step, ends in one line; the first one is unharmed."""
    import train

    first = train.train_step
    lines = []

    def step(run):
        if run.step == 2:
            lines.append(refused(workspace, capfd, "--out", str(workspace / "shared"), "--lr", "1"))
        return first(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", step)
        assert train.main(command(workspace, "shared", "--max-steps", "4")[2:]) == 0
    assert lines == [f"error: --out {workspace}/shared: another process is writing it; wait, or give another --out"]
    assert train.main(command(workspace, "alone", "--max-steps", "4")[2:]) == 0
    assert_same_run(workspace / "shared", workspace / "alone")


def test_going_back_to_a_state_and_a_kill_before_the_first_save_lose_no_row_without_a_word(workspace, capsys):
    """The run goes back from step 6 to step 4, dies in step 5, and continues with --resume auto."""
    import train

    def run(out, *flags):
        return train.main(command(workspace, out, "--max-steps", "6", *flags)[2:])

    assert run("gone-back") == run("straight") == 0
    states = workspace / "gone-back" / "state"
    earlier, latest = sorted(states.iterdir())
    assert earlier.name.startswith("step-00000004") and latest.name.startswith("step-00000006")

    def dies(run):
        raise SystemExit("killed")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "train_step", dies)
        run("gone-back", "--resume", str(earlier))
    assert f"{latest} was saved later and is removed, with its rows of metrics.jsonl" in capsys.readouterr().out
    assert run("gone-back") == 0
    out = capsys.readouterr().out
    assert f"resuming after step 4 from {earlier}" in out and "warning" not in out
    assert_same_run(workspace / "gone-back", workspace / "straight")


def test_metrics_without_the_rows_before_the_resumed_step_are_said(workspace, capsys):
    import train

    argv = command(workspace, "cut-off", "--max-steps", "4")[2:]
    assert train.main(argv) == 0
    path = workspace / "cut-off" / "metrics.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(row for row in rows if '"step": 2' not in row and '"step": 3' not in row))
    capsys.readouterr()
    assert train.main(argv) == 0
    assert f"warning: {path} has no rows of 2 of the steps 2 to 3: they were made" in capsys.readouterr().out


def test_a_resumed_run_goes_on_in_the_same_run_of_its_tracker(workspace, monkeypatch):
    """--resume auto keeps the id that the state holds; a run that goes on from another one's state has its own."""
    import train
    from tests.test_run_log import fake_tracker

    calls = fake_tracker(monkeypatch, "wandb")
    for out, resume in (("tracked", "auto"), ("tracked", "auto"), ("forked", str(workspace / "tracked"))):
        flags = ("--max-steps", "2", "--report", "wandb", "--resume", resume)
        assert train.main(command(workspace, out, *flags)[2:]) == 0
    ids = [call[3] for call in calls if call[0] == "init"]
    assert calls[0] == ("login",) and len(ids) == 3 and ids[0] == ids[1] != ids[2]


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_any_more_saves_and_ends(workspace, uninterrupted):
    """As with `| head`: no traceback, and the continued run is the uninterrupted one."""
    process = subprocess.Popen(
        command(workspace, "unread", "--save-every", "0"),
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    next(line for line in process.stdout if " 3/33 " in line)
    process.stdout.close()
    assert process.wait(timeout=END_S) == 141
    assert process.stderr.read() == "nobody reads this output any more: finishing this step, then saving\n"
    newest = max((workspace / "unread" / "state").iterdir()).name
    assert newest >= "step-00000003"
    assert finish(workspace, "unread").returncode == 0
    assert_same_run(uninterrupted, workspace / "unread")


@pytest.mark.slow
def test_a_run_whose_log_is_on_a_full_disk_goes_on_to_its_end(workspace, uninterrupted):
    script = "import os, sys, train\nrun = train.train\n"
    script += "def full(*args):\n    os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n    return run(*args)\n"
    script += "train.train = full\nsys.exit(train.main_guard(train.main))"
    flags = command(workspace, "full-log")[2:]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script, *flags], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stderr.count("warning: standard output: No space left on device; training goes on") == 1
    assert_same_run(uninterrupted, workspace / "full-log")


def test_a_run_that_began_from_an_adapter_resumes_without_its_folder(workspace, tmp_path, capsys):
    """Also one that is scaled by the root of its rank, which no setting says."""
    import train

    assert train.main(command(workspace, "first-adapter", "--max-steps", "2", "--lora-rank", "2")[2:]) == 0
    folder = tmp_path / "adapter"
    shutil.copytree(workspace / "first-adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))

    def flags(out, *more):
        return command(workspace, out, "--adapter-init", str(folder), "--max-steps", "6", *more)[2:]

    assert train.main(flags("unbroken")) == train.main(flags("homeless")) == 0
    assert "  lora_rank           2" in capsys.readouterr().out
    newest = max((workspace / "homeless" / "state").iterdir())
    shutil.rmtree(newest)
    shutil.rmtree(folder)
    assert train.main(flags("homeless")) == 0
    assert "resuming after step 4" in capsys.readouterr().out
    assert_same_run(workspace / "unbroken", workspace / "homeless")
    assert json.loads((workspace / "homeless" / "adapter_config.json").read_text())["use_rslora"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_fails_from_the_first_line_on_ends_no_run(workspace, capfd):
    """The settings that a start prints, and what a resumed run prints of its state."""
    import train

    for _ in ("begun", "resumed"):
        with open("/dev/full", "w") as full, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            assert main_guard(train.main, command(workspace, "no-room", "--max-steps", "2")[2:]) == 0
        err = capfd.readouterr().err
        assert err == "warning: standard output: No space left on device; training goes on, lines are missing\n"


def test_an_out_folder_that_is_another_runs_by_now_is_left_alone(workspace, capfd):
    import train

    original, out = train.train_step, workspace / "taken"

    def step(run):
        if run.step == 2:
            shutil.rmtree(out)
            out.mkdir()
            (out / ".lock").touch()
            (out / "metrics.jsonl").write_text("the other run's")
        return original(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", step)
        assert main_guard(train.main, command(workspace, "taken", "--max-steps", "6")[2:]) == 2
    assert f"--out {out}: was deleted or moved while this run was going on, and is another" in capfd.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == [".lock", "metrics.jsonl"]
    assert (out / "metrics.jsonl").read_text() == "the other run's"


def test_an_adapter_to_start_from_that_was_trained_on_another_base_is_named(workspace, tmp_path, capfd):
    import train

    assert train.main(command(workspace, "own-base", "--max-steps", "1")[2:]) == 0
    folder = shutil.copytree(workspace / "own-base", tmp_path / "adapter")
    init = ("--max-steps", "1", "--adapter-init", str(folder))
    assert train.main(command(workspace, "same-base", *init)[2:]) == 0
    assert "warning" not in capfd.readouterr().err
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/other"}))
    assert train.main(command(workspace, "other-base", *init)[2:]) == 0
    assert f"warning: {folder}: the adapter was trained on org/other, and runs on " in capfd.readouterr().err


def test_an_adapter_s_shape_is_said_to_be_its_own_and_a_flag_that_says_otherwise_is_refused(workspace, capfd):
    import train

    assert train.main(command(workspace, "shape", "--max-steps", "1", "--lora-rank", "2")[2:]) == 0
    init = ("--adapter-init", str(workspace / "shape"))
    assert "--lora-rank 3: the adapter of --adapter-init" in refused(workspace, capfd, *init, "--lora-rank", "3")
    assert "has ['down_proj'" in refused(workspace, capfd, *init, "--lora-targets", "q_proj")
    assert train.main(command(workspace, "all", "--max-steps", "1", "--lora-targets", "all-linear")[2:]) == 0
    every = ("--adapter-init", str(workspace / "all"), "--lora-targets", "all-linear")
    assert train.main(command(workspace, "same", *every, "--max-steps", "1", "--dry-run")[2:]) == 0
    capfd.readouterr()
    assert train.main(command(workspace, "same", *init, "--lora-rank", "2", "--max-steps", "1", "--dry-run")[2:]) == 0
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert ["lora_rank", "2", "--adapter-init"] in lines and ["lora_alpha", "32.0", "--adapter-init"] in lines


def test_an_out_folder_that_is_deleted_while_running_is_said_and_made_anew(workspace, capsys):
    import train

    original = train.train_step

    def step(run):
        if run.step == 2:
            shutil.rmtree(workspace / "deleted")
        return original(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", step)
        assert train.main(command(workspace, "deleted", "--max-steps", "6")[2:]) == 0
    out = capsys.readouterr().out
    warning = f"warning: {workspace}/deleted/metrics.jsonl was deleted or moved while the run was going on: a new one"
    assert out.count(warning) == 1
    assert [row["step"] for row in metrics(workspace / "deleted") if "loss" in row] == [4, 5, 6]
    assert (workspace / "deleted" / "adapter_model.safetensors").exists()
    assert (workspace / "deleted" / ".lock").exists()
    assert train.main(command(workspace, "deleted", "--max-steps", "6")[2:]) == 0  # nothing left to do
    assert "has no rows of 3 of the steps 1 to 3" in capsys.readouterr().out
