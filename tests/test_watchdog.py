"""A rank that dies, freezes, hangs or fails: every other rank ends soon, and one line names the rank and the step."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_ranks import torchrun
from tests.test_resume import ENVIRONMENT, ROOT, assert_same_run, command, workspace  # noqa: F401
from tests.test_runtime import END_S, two_ranks

LOOP = """
    import os, signal, sys, time
    from psysafe.program import main_guard
    from psysafe.runtime import start
    from psysafe.training.watchdog import Watchdog

    def main(argv):
        runtime = start("cpu", timeout_s=60)
        with Watchdog(runtime, timeout=TIMEOUT) as watch:
            runtime.largest(0)
            for step in range(1, 6):
                watch.progress(step)
                if (runtime.rank, step) == (1, 3):
                    TROUBLE
                if (runtime.rank, step) == (0, 3):
                    MEANWHILE
                watch.progress(step)
                runtime.largest(0)
            if runtime.rank == 0:
                AFTER
        print("done")

    sys.exit(main_guard(main, []))
"""


def loop(trouble="pass", meanwhile="pass", after="pass", timeout=4) -> list[subprocess.Popen]:
    """Two ranks. trouble: what the second does in step 3; meanwhile, after: the first, then and at the loop's end."""
    code = LOOP.replace("TROUBLE", trouble).replace("MEANWHILE", meanwhile).replace("AFTER", after)
    return two_ranks(code.replace("TIMEOUT", str(timeout)))


def assert_one_line(ranks: list[subprocess.Popen], message: str, frozen: bool = False) -> None:
    """Every rank ends by itself, except one that is frozen."""
    out, err = ranks[0].communicate(timeout=END_S)
    if frozen:
        ranks[1].kill()
    lines = (err + ranks[1].communicate(timeout=END_S)[1]).splitlines()
    errors = [line for line in lines if line.startswith("error")]
    assert len(errors) == 1 and message in errors[0], lines
    assert ranks[0].returncode == 1 and out == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "error (rank 0): rank 1 died in step 3; all ranks end here"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "rank 1 is dead or frozen in step 3: silent for 2 s; all"),
        ("time.sleep(60)", "rank 1 hangs in step 3: no progress for 4 s (--timeout)"),
        ("raise AssertionError", "error (rank 0): rank 1 ended in step 3 by an error of its own; all ranks"),
    ],
)
def test_one_line_names_the_rank_and_the_step(trouble, message):
    assert_one_line(loop(trouble), message, frozen="SIGSTOP" in trouble)


@pytest.mark.slow
def test_an_error_reaches_a_rank_that_waits_where_nothing_returns():
    """As in a collective of NCCL, which does not fail when a rank is gone."""
    ranks = loop("raise AssertionError", meanwhile="time.sleep(60)", timeout=30)
    assert_one_line(ranks, "error (rank 0): rank 1 ended in step 3 by an error of its own; all ranks")


@pytest.mark.slow
def test_a_failure_here_is_not_hidden_by_a_silence_there():
    failure = "raise RuntimeError('CUDA error: unspecified launch failure\\nand more')"
    ranks = loop("os.kill(os.getpid(), signal.SIGSTOP)", meanwhile=failure, timeout=30)
    assert_one_line(ranks, "--resume auto; here RuntimeError: CUDA error: unspecified launch failure", frozen=True)


@pytest.mark.slow
def test_ranks_that_are_well_print_nothing():
    """Also when the rank that holds the store ends before the other one, or long after it."""
    for ranks in (loop(), loop("time.sleep(3)"), loop(after="time.sleep(3)")):
        assert [rank.communicate(timeout=END_S) for rank in ranks] == [("done\n", "")] * 2
        assert [rank.returncode for rank in ranks] == [0, 0]


def rank_of(launcher: subprocess.Popen, rank: int) -> int:
    """The process id of one of torchrun's ranks."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return next(int(pid) for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text())


def kill_a_rank(workspace, out, script, steps=100000, restarts=0) -> tuple[float, list[str]]:  # noqa: F811
    """Two ranks under torchrun; the second is killed in training. Seconds until all is over, lines of ours."""
    flags = command(workspace, out, "--max-steps", str(steps))[2:]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--max-restarts", str(restarts), str(script)]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*launch, *flags], env=environment, **pipes) as process:
        for line in process.stdout:
            if f" 5/{steps} " in line:
                break
        os.kill(rank_of(process, 1), signal.SIGKILL)
        began = time.monotonic()
        process.stdout.read()
        errors = process.stderr.read()
        assert process.wait(timeout=END_S) == (0 if restarts else 1)
        return time.monotonic() - began, [line for line in errors.splitlines() if line.startswith("error")]


@pytest.mark.slow
def test_a_killed_rank_ends_the_job(workspace):  # noqa: F811
    seconds, lines = kill_a_rank(workspace, "killed-rank", ROOT / "train.py")
    assert seconds < 30
    assert len(lines) == 1 and lines[0].startswith("error (rank 0): rank 1 died in step "), lines


@pytest.mark.slow
def test_torchrun_restarts_it_where_its_state_stands(workspace):  # noqa: F811
    """The killed and restarted run repeats one on two ranks that nobody killed."""
    lines = kill_a_rank(workspace, "restarted", ROOT / "train.py", 200, restarts=1)[1]
    assert len(lines) == 1
    flags = "--dtype auto --optimizer adamw8bit --lr 1e-2 --max-steps 200"
    torchrun(workspace, "unharmed", 2, *flags.split())
    assert_same_run(workspace / "restarted", workspace / "unharmed")


@pytest.mark.slow
def test_the_line_is_the_watchdogs(workspace, tmp_path):  # noqa: F811
    """Without the watchdog's own explanation the very same end has no line of ours."""
    wrong = "import sys, train\ntrain.Watchdog._explain = lambda *_: None\nsys.exit(train.main_guard(train.main))\n"
    (tmp_path / "wrong.py").write_text(wrong)
    assert kill_a_rank(workspace, "killed-rank-unsaid", tmp_path / "wrong.py")[1] == []


START = """
    import os, signal, sys, time
    from psysafe.program import main_guard
    from psysafe.runtime import start
    from psysafe.training.watchdog import Watchdog

    def main(argv):
        runtime = start("cpu", timeout_s=60)
        if runtime.rank == 1:
            EARLY
        with Watchdog(runtime, timeout=4) as watch:
            if runtime.rank == 1:
                BEFORE
            watch.progress(0)
            runtime.agree(lr=0.1)
            LOAD
            watch.progress(0)
            runtime.largest(0)
        print("done")

    sys.exit(main_guard(main, []))
"""


def starting(early="pass", before="pass", load="pass") -> list[subprocess.Popen]:
    return two_ranks(START.replace("EARLY", early).replace("BEFORE", before).replace("LOAD", load))


STOP, SLEEP = "os.kill(os.getpid(), signal.SIGSTOP)", "time.sleep(60)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ({"early": STOP}, "error (rank 0): rank 1 is dead or frozen before the first step: silent for 4 s; all ranks"),
        ({"before": STOP}, " before the first step: "),  # silent, and without progress, for 4 s: either is said
        ({"before": SLEEP}, "rank 1 hangs before the first step: no progress for 4 s (--timeout); all ranks end here"),
        ({"load": f"runtime.rank and {SLEEP}"}, "rank 1 hangs before the first step: no progress for 4 s (--timeout)"),
    ],
)
def test_a_rank_that_is_stuck_in_start_up_ends_by_the_watchdog(trouble, message):
    """Not by a traceback of torch, a minute later. A frozen process also counts as one that never came."""
    began = time.monotonic()
    assert_one_line(starting(**trouble), message, frozen=STOP in trouble.values())
    assert time.monotonic() - began < 40


@pytest.mark.slow
def test_all_may_load_for_longer_than_the_timeout():
    ranks = starting(load="time.sleep(7)")
    assert [rank.communicate(timeout=END_S) for rank in ranks] == [("done\n", "")] * 2


@pytest.mark.slow
def test_torchrun_killed_is_said_once_and_rank_0_is_not_blamed(workspace):  # noqa: F811
    flags = command(workspace, "no-torchrun", "--max-steps", "100000")[2:]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*launch, str(ROOT / "train.py"), *flags], env=ENVIRONMENT, **pipes) as process:
        next(line for line in process.stdout if " 5/100000 " in line)
        process.kill()
        process.stdout.read()
        errors = [line for line in process.stderr.read().splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "torchrun, through which the ranks met, is gone in step" in errors[0], errors
