"""Saved states: bit for bit, whole or not at all whatever kills the save, damage found, the one before it used."""

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from psysafe.files import temporary_for, write_atomic
from psysafe.training import run_state
from psysafe.training.config import TrainConfig
from psysafe.training.run_state import (
    State,
    StateNotSaved,
    check_resume,
    check_run_dir,
    load_state,
    prepare_run_dir,
    recipe,
    save_state,
)
from tests.mistakes import refused


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(700, generator=generator)
    return {
        "p": flat[:400].view(20, 20),  # views of one buffer, as the optimiser keeps them
        "q": flat[400:],
        "codes": torch.randint(0, 256, (700,), generator=generator, dtype=torch.uint8),
        "t": torch.tensor(3.5, dtype=torch.float64),
        "w": flat[:6].bfloat16().view(2, 3).t(),
        "none": torch.empty(0),
    }


def assert_is_state(state, step: int):
    assert state.step == step and state.meta == {"best": 0.1 + step, "who": "ü"}
    assert state.tensors.keys() == tensors(step).keys()
    for name, expected in tensors(step).items():
        assert state.tensors[name].dtype == expected.dtype
        assert torch.equal(state.tensors[name], expected), name


def save(run_dir, step: int, **options):
    return save_state(run_dir, step, tensors(step), {"best": 0.1 + step, "who": "ü"}, **options)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_state_comes_back_bit_for_bit_and_the_last_two_stay(tmp_path):
    assert load_state(tmp_path, "auto") is None and load_state(tmp_path, "") is None
    for step in (5, 42, 100_000_000):
        path = save(tmp_path, step)
    assert names(tmp_path / "state") == ["step-00000042", "step-100000000"]
    assert names(path) == ["SHA256SUMS", "state.json", "state.safetensors"]
    for place, resume in ((tmp_path, "auto"), ("elsewhere", tmp_path), ("x", tmp_path / "state"), ("x", path)):
        assert_is_state(load_state(place, str(resume)), 100_000_000)
    assert_is_state(load_state("x", str(tmp_path / "state" / "step-00000042")), 42)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=path, check=True)


def test_a_second_save_of_a_step_does_not_overwrite_the_first(tmp_path):
    save(tmp_path, 7)
    save_state(tmp_path, 7, tensors(7), {"best": "later"})
    assert names(tmp_path / "state") == ["step-00000007", "step-00000007.1"]
    assert load_state(tmp_path).meta == {"best": "later"}


def test_of_many_saves_of_a_step_the_last_two_stay(tmp_path):
    """The first free name would be that of the oldest one, and the newest but one would go."""
    for number in range(5):
        save_state(tmp_path, 7, tensors(number), {"number": number})
        states = sorted((tmp_path / "state").iterdir())
        assert len(states) == min(2, number + 1) and load_state(tmp_path).meta == {"number": number}
    shutil.rmtree(states[-1])
    assert load_state(tmp_path).meta == {"number": 3}


def test_states_of_a_future_that_was_cut_off_go(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    save(tmp_path, 15)
    assert names(tmp_path / "state") == ["step-00000010", "step-00000015"]


@pytest.mark.parametrize("name", ["SHA256SUMS", "state.json", "state.safetensors"])
def test_a_flipped_bit_anywhere_is_found_and_the_state_before_is_used(tmp_path, name):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    whole = path.read_bytes()
    for position in sorted({0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1}):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        state = load_state(tmp_path)
        assert_is_state(state, 1)
        assert len(state.warnings) == 1 and "step-00000002 is damaged and passed over" in state.warnings[0]
    path.write_bytes(whole)
    assert_is_state(load_state(tmp_path), 2)


def test_the_check_sums_are_what_finds_it(tmp_path, monkeypatch):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / "state.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    monkeypatch.setattr(run_state, "_sums", lambda contents: (path.parent / "SHA256SUMS").read_bytes())
    with pytest.raises(AssertionError):
        assert_is_state(load_state(tmp_path), 1)


def test_damage_does_not_use_up_the_states_that_are_kept(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "state.json").unlink()
    save(tmp_path, 3)
    assert names(tmp_path / "state") == ["step-00000001", "step-00000003"]


def test_when_no_state_is_whole_the_run_does_not_silently_start_afresh(tmp_path):
    for path in [save(tmp_path, step) for step in (1, 2)]:
        (path / "state.safetensors").write_bytes(b"")
    refused(r"no whole state to resume from; .*-00000002 is damaged.*-00000001 is", load_state, tmp_path)
    with pytest.raises(ValueError, match=r"--resume .*nowhere: no saved state there; give a run directory"):
        load_state(tmp_path, str(tmp_path / "nowhere"))


@pytest.mark.parametrize("meta", ["[]", "{", '{"step": "2", "meta": {}}', '{"step": 2}', "[" * 10_000])
def test_a_state_that_checks_but_makes_no_sense_is_damage_too(tmp_path, meta):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    (path / "state.json").write_text(meta)
    contents = {name: (path / name).read_bytes() for name in ("state.safetensors", "state.json")}
    (path / "SHA256SUMS").write_bytes(run_state._sums(contents))
    assert_is_state(load_state(tmp_path), 1)


# Everything through which a save touches the disk. A kill before each such call in turn is a kill anywhere.
CALLS = [
    *((os, name) for name in ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")),
    *((pathlib.Path, name) for name in ("mkdir", "write_bytes")),
]


def run_killed_at(call: int, action) -> bool:
    """Do the action in a child that gets SIGKILL at its n-th touch of the disk. True if it got that far."""
    child = os.fork()
    if child == 0:
        left = [call]

        def killing(original):
            def wrapped(*args, **options):
                left[0] -= 1
                if left[0] < 0:
                    if original is pathlib.Path.write_bytes:  # half a file
                        original(args[0], args[1][: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **options)

            return wrapped

        for owner, name in CALLS:
            setattr(owner, name, killing(getattr(owner, name)))
        try:
            action()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kill_everywhere(run_dir, build) -> int:
    """Kill a save of step 3 at every point; each time the run must resume from step 2 or 3 and train on."""
    call = 0
    while True:
        shutil.rmtree(run_dir, ignore_errors=True)
        build()
        killed = run_killed_at(call, lambda: save(run_dir, 3))
        state = load_state(run_dir)
        assert state is not None and state.step in (2, 3) and not state.warnings
        assert_is_state(state, state.step)
        prepare_run_dir(run_dir, "auto").close()
        assert not [path for path in run_dir.rglob("*") if ".tmp-" in path.name]
        assert_is_state(load_state(run_dir), state.step)
        save(run_dir, 4)
        assert len(names(run_dir / "state")) == 2
        if not killed:
            return call
        call += 1


def test_kill_9_at_every_point_of_a_save_leaves_a_state_to_resume_from(tmp_path):
    run_dir = tmp_path / "run"
    assert kill_everywhere(run_dir, lambda: [save(run_dir, step) for step in (1, 2)]) >= 15


def test_the_kill_test_rejects_a_save_under_the_final_name(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    monkeypatch.setattr(run_state, "temporary_for", lambda path: path)
    with pytest.raises(AssertionError):
        kill_everywhere(run_dir, lambda: [save(run_dir, step) for step in (1, 2)])


def test_a_full_disk_keeps_the_old_state_and_leaves_nothing_behind(tmp_path, monkeypatch):
    save(tmp_path, 1)
    write_bytes = pathlib.Path.write_bytes

    def full(path, content):
        write_bytes(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(StateNotSaved, match=r"state of step 2 not saved in .*state: No space left on device"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert names(tmp_path / "state") == ["step-00000001"]
    assert_is_state(load_state(tmp_path), 1)


def test_an_atomic_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    write_atomic(path, "old")
    with pytest.raises(ZeroDivisionError):
        write_atomic(path, lambda temporary: (temporary.write_text("half"), 1 / 0))
    assert path.read_text() == "old" and names(tmp_path) == ["config.toml"]
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full") as caught:
            write_atomic(path, b"new")
    assert caught.value.filename == str(path)  # so that it ends as one line
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_an_atomic_write_does_not_take_the_place_of_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused("pipe: not a regular file; expected the name of a file", write_atomic, tmp_path / "pipe", "text")
    (tmp_path / "link").symlink_to("pipe")
    refused("link: not a regular file", write_atomic, tmp_path / "link", "text")
    assert (tmp_path / "pipe").is_fifo() and names(tmp_path) == ["link", "pipe"]


def test_an_atomic_write_to_a_link_writes_the_file_that_it_names(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to("disk/file")
    for text in ("new", "newer"):  # the file is not there yet, and then it is
        write_atomic(link, text)
        assert link.is_symlink() and (tmp_path / "disk/file").read_text() == text
        assert names(tmp_path / "disk") == ["file"]


def test_an_atomic_write_that_fails_names_its_own_file(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "none" / "file"):
        with pytest.raises(OSError) as caught:
            write_atomic(path, "text")
        assert caught.value.filename == str(path)
    assert names(tmp_path) == ["folder"]


def test_an_out_that_cannot_be_a_folder_is_one_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    for out in (file, file / "run", file / "a" / "b"):
        line = f"--out {out}: {file} is a file, not a folder; choose another folder"
        assert refused("is a file", prepare_run_dir, out) == line


def test_an_out_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def refuse(path, content):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(pathlib.Path, "write_bytes", refuse)
    refused(r"--out .*: cannot be written: Permission denied; choose another folder", prepare_run_dir, tmp_path / "run")


def test_a_fresh_start_sets_an_earlier_run_aside_and_touches_nothing_else(tmp_path):
    for run in (1, 2):
        prepare_run_dir(tmp_path).close()
        save(tmp_path, run)
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": {run}}}\n')
        (tmp_path / "notes.txt").write_text("the user's own")
    assert names(tmp_path) == [".lock", "earlier-1", "metrics.jsonl", "notes.txt", "state"]
    assert_is_state(load_state("x", str(tmp_path / "earlier-1")), 1)
    for resume in ("auto", str(tmp_path), str(tmp_path / "state" / "step-00000002")):
        prepare_run_dir(tmp_path, resume).close()
        assert_is_state(load_state(tmp_path), 2)
    prepare_run_dir(tmp_path, str(tmp_path / "earlier-1"))  # another run's state: this run's must not mix with it
    assert names(tmp_path) == [".lock", "earlier-1", "earlier-2", "notes.txt"]


@pytest.mark.parametrize("resume", ["", "auto"])
def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(resume, tmp_path):
    with prepare_run_dir(tmp_path):
        save(tmp_path, 1)
        temporary_for(tmp_path / "state" / "step-00000002").mkdir()  # of a save that is going on
        for enter in (check_run_dir, lambda out: prepare_run_dir(out, resume)):
            refused(r"--out .*: another process is writing it; wait, or give another --out", enter, tmp_path)
        unfinished = temporary_for(tmp_path / "state" / "step-00000002").name
        assert names(tmp_path / "state") == ["step-00000001", unfinished]
    prepare_run_dir(tmp_path, "auto").close()
    assert names(tmp_path / "state") == ["step-00000001"]


def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    prepare_run_dir(tmp_path).close()
    assert "No locks available; do not start a second process that writes it" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_recipe():
    meta = {"recipe": json.loads(json.dumps(recipe(TrainConfig(data=["a"]))))}
    saved = State(5, {}, meta, pathlib.Path("state/step-00000005"))
    check_resume(saved, TrainConfig(data=["b"], out="x", resume="auto", micro_batch_tokens=64, plot=True))
    check_resume(saved, TrainConfig(adapter_layout="text"))  # names in a file, not numbers of the run
    saved.meta["recipe"]["adapter_layout"] = "auto"  # of a run from before there was "both"
    check_resume(saved, TrainConfig())
    del saved.meta["recipe"]["train_turns"]  # of a run from before there was this setting
    check_resume(saved, TrainConfig())
    refused("train_turns .saved 'last', now 'all'.", check_resume, saved, TrainConfig(train_turns="all"))
    with pytest.raises(ValueError, match=r"differ: epochs \(saved 5, now 6\), lr \(saved 0.0001, now 0.001\); set"):
        check_resume(saved, TrainConfig(lr=1e-3, epochs=6))


def test_what_a_killed_write_left_is_removed_by_the_next_write_of_that_name(tmp_path):
    """Of the file that is written, whatever characters its name has; not what another living process is writing."""
    name = "answers [1].jsonl"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = f".tmp-{os.uname().nodename}-"
    others = [f"{name}{here}{os.getppid()}", f"other.jsonl{here}{dead.pid}", f"answers 1.jsonl{here}{dead.pid}"]
    others += [f"{name}.tmp-another-machine-{dead.pid}"]  # on a shared disk, whose process may well run
    others += [f"{name}.tmp-old", f"{name}.tmp-{dead.pid}", f"{name}{here}old", f"{name}{here}0"]  # the user's own
    for path in (f"{name}{here}{dead.pid}", f"{name}{here}{os.getpid()}", *others):
        (tmp_path / path).write_text("half")
    write_atomic(tmp_path / name, "whole")
    assert {path.name for path in tmp_path.iterdir()} == {name, *others}
