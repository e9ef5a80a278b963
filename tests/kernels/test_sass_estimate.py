"""From simulated programs to the time of a launch, the calibration, and the command."""

import subprocess
import sys

import pytest

from kernels.ops._triton import HAS_TRITON
from kernels.proof.sass import hopper
from kernels.proof.sass.__main__ import main
from kernels.proof.sass.estimate import Kernel, Launch, Timing, calibrate, load, tutorial_spec
from tests.kernels.sass_snippets import LOOP, STALLS, listing


def test_blocks_that_fit_a_multiprocessor():
    assert hopper.blocks_per_multiprocessor(255, 0, 8) == 1, "255 x 256 threads fill the registers"
    assert hopper.blocks_per_multiprocessor(128, 49_152, 4) == 4
    assert hopper.blocks_per_multiprocessor(128, 114_688, 4) == 2, "shared memory: 2 x 113 KB"
    assert hopper.blocks_per_multiprocessor(16, 0, 4) == 16, "64 warps"


def timing(programs, blocks=1) -> Timing:
    """LOOP in a kernel of one warp a partition: 1 + 25 a trip + 1 cycles."""
    return Timing(Kernel("loop", listing(LOOP), 4, blocks), Launch("loop", "op", False, programs, 1))


def test_long_loops_go_on_at_their_period():
    assert timing([(1000,)]).cycles == 1 + 25 * 1000 + 1


def test_a_loop_without_a_period_is_not_continued():
    """From one trip nothing follows about more."""
    with pytest.raises(ValueError, match="loop 0 has no period"):
        timing([(1,)]).program((2,), 1)


def test_the_main_loop_takes_most_of_the_time():
    assert timing([(4,)]).main_loop == 0
    assert timing([(1,)]).main_loop is None, "one trip has no period"
    assert Timing(Kernel("straight", listing(STALLS), 4, 1), Launch("", "", False, [()], 1)).main_loop is None


def test_equal_programs_run_in_rounds():
    assert timing([(4,)] * 132).cycles == 102
    assert timing([(4,)] * 133).cycles == 204
    # Two side by side take longer than one, whose instructions leave every second cycle free; the rest has a round of
    # its own, where a program runs alone.
    two = timing([(4,)] * 264, blocks=2).cycles
    assert 102 < two < 2 * 102
    assert timing([(4,)] * 265, blocks=2).cycles == two + 102


def test_unequal_programs_go_where_a_place_is_free():
    """132 long ones fill the GPU; the two short ones follow one another only where that is shorter."""
    assert timing([(40,)] * 131 + [(10,)] * 2).cycles == 1002
    assert timing([(40,)] * 132 + [(10,)]).cycles == 1002 + 252


def test_a_kernel_that_streams_takes_as_long_as_its_bytes():
    launch = Launch("loop", "op", False, [(1,)], 1, bytes=3_000_000)
    assert Timing(Kernel("loop", listing(LOOP), 4, 1), launch).cycles == pytest.approx(1e-6 * hopper.CLOCK)


needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


@needs_triton
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "no_such"], "--kernel no_such: no kernel of that name; expected one of"),
        (["--op", "swiglu"], "--op swiglu: its launches are not listed; expected causal_attention, gated_delta_rule"),
        (["--trips", "3"], "name it with --kernel"),
    ],
)
def test_a_wrong_use_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sass", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@needs_triton
@pytest.mark.slow
def test_the_model_agrees_with_measurements_of_the_tutorial():
    """At four lengths within 10 %, and in their order: fixed costs weigh less the longer the document."""
    calibration = calibrate(load([tutorial_spec()])["attention tutorial"])
    for tokens, model, measured in calibration.rows:
        assert model == pytest.approx(measured, rel=0.1), tokens
    speeds = [model for _, model, _ in calibration.rows]
    assert speeds == sorted(speeds) and 0.9 < calibration.factor < 1.1


@needs_triton
@pytest.mark.slow
def test_one_kernel_on_the_command_line():
    command = [sys.executable, "-m", "kernels.proof.sass", "--kernel", "gated_delta_rule_forward prepare", "--listing"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "HGMMA" in text and "loops: none" in text and "cycles, 4 blocks on a multiprocessor" in text
