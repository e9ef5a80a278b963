"""Ranks, signals and exit codes, in processes of their own where the process is what is tested."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import generate
import train
from psysafe import runtime
from psysafe.corpus import __main__ as corpus
from psysafe.data import __main__ as data
from psysafe.files import ASSETS
from psysafe.program import StopRequest, UserError, exit_on_signals, main_guard
from psysafe.runtime import PEAKS, Runtime
from psysafe.training import config
from tests.mistakes import refused, refused_by
from tests.stub_server import reserved_port

ROOT = Path(__file__).resolve().parents[1]
VAL = ASSETS / "rows" / "val.jsonl"
PORTS = contextlib.ExitStack()  # of ranks, kept to the end of this process: rank 0 listens once it has come so far
END_S = 300  # for a process to end; only one that hangs needs as long, however busy the machine is


def python(code: str, **environment) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=environment, **pipes)


def two_ranks(code: str) -> list[subprocess.Popen]:
    port = PORTS.enter_context(reserved_port())
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [python(code, RANK=rank, LOCAL_RANK=rank, **place) for rank in "01"]


LOOP = """
    import sys, time
    from psysafe.program import StopRequest, main_guard

    def main(argv):
        with StopRequest() as stop:
            print("ready", flush=True)
            while not stop.received:
                time.sleep(0.01)
            print("saved", flush=True)
            if argv == ["slow"]:
                time.sleep(600)
        return 128 + stop.received

    sys.exit(main_guard(main, ARGV))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_lets_the_step_finish_and_sets_the_exit_code(number, code):
    process = python(LOOP.replace("ARGV", "[]"))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=END_S)
    assert (process.returncode, out) == (code, "saved\n") and "Traceback" not in err


def test_a_second_ctrl_c_ends_the_process_at_once():
    process = python(LOOP.replace("ARGV", '["slow"]'))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saved\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=END_S)
    assert process.returncode == -signal.SIGINT  # a shell calls this 130


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.received == 0
        with exit_on_signals():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


NO_ROOM = "error: standard output: No space left on device\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("call", ["print('x')", "print('x', flush=True)", "print('x\\n' * 100_000)"])
def test_output_for_which_there_is_no_room_is_one_line_and_no_success(call, unbuffered):
    """At the end or before it; whether Python keeps what the disk refused, and would try it again, or not."""
    code = f"import sys; from psysafe.program import main_guard; sys.exit(main_guard(lambda argv: {call}, []))"
    with open("/dev/full", "w") as full:
        env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, env=env)
    assert (done.returncode, done.stderr) == (1, NO_ROOM)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (generate.main, ["hi", "--model", "assets:tiny", "--max-new-tokens", "3"]),
        (corpus.main, ["stats", str(VAL)]),
        (corpus.main, ["validate", str(VAL)]),
        (data.main, ["--show", str(VAL)]),
        (train.main, ["--dry-run"]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_command_whose_output_fails_says_so_in_one_line(main, argv, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert main_guard(main, argv) == 1
        assert sys.stdout is full
    assert capsys.readouterr().err.endswith(NO_ROOM)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # the first one decides the exit code
        assert stop.received == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert StopRequest().received == 0


def test_a_mistake_of_the_user_is_one_line_and_exit_code_2(capsys, monkeypatch, tmp_path):
    assert main_guard(config.resolve, ["--lrr", "1"]) == 2
    assert capsys.readouterr().err == "error: unknown flag '--lrr'; did you mean --lr?\n"
    assert main_guard(config.resolve, ["--config", str(tmp_path / "none.toml")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/none.toml: No such file or directory\n"
    assert main_guard(config.resolve, ["--config", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: Is a directory\n"

    def mistaken(argv):
        raise UserError("rows.jsonl row 3:\n  no answer")

    assert main_guard(mistaken, []) == 2
    assert capsys.readouterr().err == "error: rows.jsonl row 3: no answer\n"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main_guard(config.resolve, ["x"]) == 2
    assert capsys.readouterr().err.startswith("error (rank 1): unexpected argument 'x'")


def test_a_mistake_of_ours_keeps_its_traceback():
    def in_c(argv):
        int("x")

    def in_torch(argv):
        torch.distributions.Normal(0.0, torch.tensor(-1.0), validate_args=True)

    def ours(argv):
        raise ValueError("not a UserError")

    def ours_that_asserts(argv):
        raise AssertionError

    def about_no_file(argv):
        raise OSError(28, "No space left on device")

    cases = {
        in_c: ValueError,
        in_torch: ValueError,
        ours: ValueError,
        ours_that_asserts: AssertionError,
        about_no_file: OSError,
    }
    for main, kind in cases.items():
        with pytest.raises(kind):
            main_guard(main, [])

    def interrupted(argv):
        raise KeyboardInterrupt

    assert main_guard(interrupted, []) == 130 and main_guard(lambda argv: None, []) == 0


@pytest.mark.parametrize("lines", [1, 100_000])  # still in the buffer at the end, and beyond it before
def test_output_that_nobody_reads_ends_without_a_traceback(lines):
    code = f"""
    import sys
    from psysafe.program import main_guard
    sys.exit(main_guard(lambda argv: print("x\\n" * {lines})))
    """
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "stopped: nobody reads this output any more\n")


def test_one_process_is_one_rank_on_the_cpu(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    code = """
        import os, torch
        from psysafe.runtime import start, memory_peak, memory_total
        run = start("cpu", seed=3)
        assert run.is_main and run.dtype == torch.float32 and run.peak is None and run.largest(5) == 5
        assert start("cpu", "float64").dtype == torch.float64
        assert torch.are_deterministic_algorithms_enabled() and torch.initial_seed() == 0
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and os.environ["NCCL_NVLS_ENABLE"] == "0"
        assert 1e7 < memory_peak(run.device) < memory_total(run.device)
    """
    process = python(code)
    assert process.communicate(timeout=END_S)[1] == "" and process.returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_one_line():
    with pytest.raises(ValueError, match="--device cuda: rank 0 needs GPU 0, torch finds 0 here"):
        runtime.start("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_kernels_that_cannot_run_are_one_line_before_anything_is_read(capsys, monkeypatch):
    """kernels/ raises a plain ValueError; `start` turns it into the user's mistake."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for choice, expected in (("trition", "expected one of auto, triton, reference"), ("triton", "TRITON_INTERPRET=1")):
        monkeypatch.setenv("PSYSAFE_KERNELS", choice)
        line = refused_by(lambda argv: runtime.start("cpu"), [], capsys)
        assert line.startswith(f"error: PSYSAFE_KERNELS={choice}") and expected in line


def test_two_ranks_agree_on_a_stop():
    code = """
        import sys
        from psysafe.runtime import start
        from psysafe.program import main_guard

        def main(argv):
            run = start("cpu", timeout_s=200)
            print(run.rank, run.is_main, run.largest(15 * run.rank), run.largest(0))

        sys.exit(main_guard(main, []))
    """
    ranks = two_ranks(code)
    assert [rank.communicate(timeout=END_S)[0] for rank in ranks] == ["0 True 15 0\n", "1 False 15 0\n"]
    assert [rank.returncode for rank in ranks] == [0, 0]


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        (
            "The client socket has timed out after 3000ms",
            r"they did not within 3 s; did each of them start\? \(The client",
        ),
        ("wait timeout after 3000ms, keys: /0", r"they did not within 3 s; did each of them start\? \(wait timeout"),
        ("The server socket has failed to listen: address already in use", "The server socket .*already in use$"),
    ],
)
def test_why_the_ranks_did_not_meet(reason, line, monkeypatch):
    def join(*_):
        raise torch.distributed.DistNetworkError(f"{reason}\nException raised from listen at socket.cpp")

    monkeypatch.setattr(runtime, "_join", join)
    refused(f"^the ranks could not meet: {line}", runtime._meet, "gloo", 3)


def test_ranks_that_were_given_other_things_end_before_they_begin():
    code = """
        import sys
        from psysafe.runtime import start
        from psysafe.program import main_guard

        def main(argv):
            run = start("cpu", timeout_s=200)
            run.agree(lr=0.1)
            run.agree(lr=0.1, resumes_after_step=200 * (1 - run.rank))

        sys.exit(main_guard(main, []))
    """
    ranks = two_ranks(code)
    for rank, process in enumerate(ranks):
        line = process.communicate(timeout=END_S)[1]
        assert line.startswith(f"error (rank {rank}): resumes_after_step: 0 on rank 1, 200 on rank 0; start every rank")
    assert [rank.returncode for rank in ranks] == [2, 2]


def test_the_peak_is_known_by_the_exact_name_only(monkeypatch):
    run = Runtime(torch.device("cuda", 0), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert run.peak == (989e12, 4.8e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 MIG 1g.18gb")
    assert run.peak is None
    assert all(1e14 < peak.flops < 1e16 and 1e11 < peak.bandwidth < 1e13 for peak in PEAKS.values())


PROGRAMS = ("train.py", "generate.py", "eval.py", "-m psysafe.data", "-m psysafe.checkpoint", "-m psysafe.corpus",
            "-m psysafe.serve", "-m psysafe.publish")  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_during_the_imports_ends_without_a_traceback(program, tmp_path):
    """A torch that does not come to the end of its import stands in for the real one."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(600)\n")
    (tmp_path / "numpy.py").write_text("import torch\n")
    process = subprocess.Popen(
        [sys.executable, *program.split()],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=END_S)[1] == "" and process.returncode == -signal.SIGINT  # 130 in a shell


def test_a_program_of_somebody_else_keeps_its_own_ctrl_c():
    code = "import signal, psysafe.interrupt; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    for folder in ("/", ROOT):  # code of one's own, also where it is started inside the checkout
        subprocess.run([sys.executable, "-c", code], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


@pytest.mark.parametrize("own", ["", "max_split_size_mb:128"])
def test_segments_that_can_grow_are_asked_for_before_cuda_starts(own, monkeypatch):
    """A setting of the user's own stays as it is."""
    seen = []
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", own)
    else:
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", "removed again when the test ends")
        monkeypatch.delenv("PYTORCH_ALLOC_CONF")

    def set_device(device):
        seen.append(os.environ.get("PYTORCH_ALLOC_CONF"))
        raise UserError("no GPU here")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with pytest.raises(UserError, match="no GPU here"):
        runtime.start("cuda")
    assert seen == [None if own else "expandable_segments:True"]


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_stream_that_is_closed_from_the_start_changes_nothing(closed, tmp_path):
    """As with `>&-`: Python has None in its place, and a question whether it is a terminal would end in a traceback."""
    program = (
        "import pathlib, sys\nfrom psysafe.program import main_guard\n"
        "def main(argv):\n    print('out', sys.stdout.isatty()); print('err', sys.stderr.isatty(), file=sys.stderr)\n"
        "    pathlib.Path(argv[0]).write_text('done')\n"
        "sys.exit(main_guard(main))\n"
    )
    number = {"stdout": 1, "stderr": 2}[closed]
    command = ["bash", "-c", f'exec "$@" {number}>&-', "-", sys.executable, "-c", program, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_text() == "done"
    assert (done.stdout, done.stderr) == (("", "err False\n") if closed == "stdout" else ("out False\n", ""))
