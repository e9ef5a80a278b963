"""The model of a quarter of a multiprocessor: cycles of snippets, counted by hand, and mutants of its rules."""

import re
import subprocess
import sys

import pytest

from kernels.ops._triton import HAS_TRITON
from kernels.proof.sass import hopper, partition
from kernels.proof.sass.__main__ import main
from kernels.proof.sass.estimate import Kernel, Launch, Timing, calibrate, load, tutorial_spec
from kernels.proof.sass.listing import Instruction, Listing
from kernels.proof.sass.partition import Partition

LINE = re.compile(r"\[([-\d]{6})\s+(?:W(\d)|--)\s+(?:R(\d)|--)\s+S(\d+)\]\s+(?:@(\S+)\s+)?(\S+)\s*(.*)")


def nvdisasm(snippet: str) -> str:
    """The snippet, in the notation of kernels/proof/sass/__init__.py, as nvdisasm would print it."""
    lines, address = [], 0
    for line in filter(None, map(str.strip, snippet.splitlines())):
        if line.endswith(":"):
            lines.append(line)
            continue
        waits, write, read, stall, predicate, name, operands = LINE.fullmatch(line).groups()
        high = int(stall) << 41 | int(write or 7) << 46 | int(read or 7) << 49
        high |= sum(1 << 52 + int(i) for i in waits.replace("-", ""))
        text = f"{f'@{predicate}' if predicate else '':>20} {name} {operands} ;"
        lines.append(f"        /*{address:04x}*/ {text}  /* 0x{0:016x} */")
        lines.append(f"                            /* 0x{high:016x} */")
        address += 16
    return "\n".join(lines)


def listing(snippet: str) -> Listing:
    return Listing.parse(nvdisasm(snippet))


def cycles(snippet: str, trips=(), warps: int = 1, blocks: int = 1, **more) -> float:
    return Partition(listing(snippet), trips, warps, blocks, **more).run().cycles


EXIT = "[------ -- -- S05] EXIT"
# Every case: (snippet, arguments of the model, cycles by hand). The last EXIT is counted with one cycle.
STALLS = f"""
    [------ -- -- S05] FADD R2, R2, R3
    [------ -- -- S04] FADD R2, R2, R3
    {EXIT}"""
WRITE = f"""
    [------ W0 -- S02] LDS R4, [R8]
    [0----- -- -- S04] FMUL R4, R4, R2
    {EXIT}"""
READ = f"""
    [------ -- R3 S01] STS [R8], R4
    [---3-- -- -- S04] MOV R4, R2
    {EXIT}"""
COUNTED = f"""
    [------ W1 -- S01] LDS.128 R4, [R8]
    [------ W1 -- S01] LDS R2, [R8]
    [-1---- -- -- S01] FADD R2, R2, R4
    {EXIT}"""
ALU = f"""
    [------ -- -- S01] IADD3 R2, R2, R3, RZ
    [------ -- -- S01] IADD3 R4, R4, R5, RZ
    {EXIT}"""
FMA = ALU.replace("IADD3", "FADD")
IN_FLIGHT = f"""
    [------ -- -- S01] HGMMA.64x256x16.F32.BF16 R24, R168, gdesc[UR8], R24
    [------ -- -- S01] HGMMA.64x256x16.F32.BF16 R24, R168, gdesc[UR8], R24
    [------ -- -- S01] HGMMA.64x256x16.F32.BF16 R24, R168, gdesc[UR8], R24, gsb0
    {EXIT}"""
OPERANDS = f"""
    [------ -- -- S01] HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24
    [------ -- -- S01] HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
    [------ -- -- S01] WARPGROUP.DEPBAR.LE gsb0, 0x0
    {EXIT}"""
GROUPS = f"""
    [------ -- -- S01] HGMMA.64x256x16.F32.BF16 R24, R168, gdesc[UR8], R24, gsb0
    [------ -- -- S01] HGMMA.64x256x16.F32.BF16 R24, R168, gdesc[UR8], R24, gsb0
    [------ -- -- S01] WARPGROUP.DEPBAR.LE gsb0, 0x1
    {EXIT}"""
COPIES = f"""
    [------ -- -- S01] LDGSTS.E.BYPASS.128 [R2], [R4.64]
    [------ -- -- S01] LDGDEPBAR
    [------ -- -- S01] LDGSTS.E.BYPASS.128 [R2], [R4.64]
    [------ -- -- S01] LDGDEPBAR
    [------ -- -- S01] DEPBAR.LE SB0, 0x1
    {EXIT}"""
BARRIER = f"""
    [------ -- -- S01] BAR.SYNC.DEFER_BLOCKING 0x0
    {EXIT}"""
TMA = f"""
    [------ -- -- S01] MOV R3, 0x8000
    [------ -- -- S01] @UP0 SYNCS.EXCH.64 URZ, [UR60+0x100], UR4
    [------ -- -- S01] @UP0 SYNCS.EXCH.64 URZ, [UR60+0x108], UR4
    [------ -- -- S01] @P2 SYNCS.ARRIVE.TRANS64 RZ, [UR60+0x100], R3
    [------ -- -- S01] @UP0 UTMALDG.2D [UR12], [UR8]
    [------ -- -- S01] @P2 SYNCS.ARRIVE.TRANS64 RZ, [UR60+0x108], R3
    [------ -- -- S01] @UP0 UTMALDG.2D [UR12], [UR8]
    [------ -- -- S01] SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R7+URZ+0x100], R9
    {EXIT}"""
TMA_SECOND = TMA.replace(EXIT, f"""
    [------ -- -- S01] SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R7+URZ+0x100], R9
    {EXIT}""")  # fmt: skip
ONE_MBARRIER = TMA.replace("@P2 SYNCS.ARRIVE.TRANS64 RZ, [UR60+0x108], R3", "NOP")
ARM = """
    [------ -- -- S01] @P2 SYNCS.ARRIVE.TRANS64 RZ, [UR60+0x100], R3
    [------ -- -- S01] @UP0 UTMALDG.2D [UR12], [UR8]"""
INITIALISE = """
    [------ -- -- S01] @UP0 SYNCS.EXCH.64 URZ, [UR60+0x100], UR4"""
WAIT = """
    [------ -- -- S01] SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR60+0x100], R9"""
# A loop in which two loads alternate; the address of the second wait is in a register alone.
TWO_LOADS = f"""
    [------ -- -- S01] MOV R3, 0x8000
    [------ -- -- S01] @UP0 SYNCS.EXCH.64 URZ, [UR60+0x100], UR4
    [------ -- -- S01] @UP0 SYNCS.EXCH.64 URZ, [UR60+0x110], UR4
    [------ -- -- S01] @P2 SYNCS.ARRIVE.TRANS64 RZ, [UR60+0x100], R3
    [------ -- -- S01] @UP0 UTMALDG.2D [UR12], [UR8]
    [------ -- -- S01] @P2 SYNCS.ARRIVE.TRANS64 RZ, [UR60+0x110], R3
    [------ -- -- S01] @UP0 UTMALDG.2D [UR12], [UR8]
.L_x_0:
    [------ -- -- S01] SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R7+URZ+0x100], R9
    [------ -- -- S01] @P2 SYNCS.ARRIVE.TRANS64 RZ, [R7+URZ+0x100], R3
    [------ -- -- S01] @UP0 UTMALDG.2D [UR12], [UR8]
    [------ -- -- S01] SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R12+URZ], R9
    [------ -- -- S01] @P2 SYNCS.ARRIVE.TRANS64 RZ, [R7+URZ+0x110], R3
    [------ -- -- S01] @UP0 UTMALDG.2D [UR12], [UR8]
    [------ -- -- S01] NOP
    [------ -- -- S01] NOP
    [------ -- -- S01] NOP
    [------ -- -- S05] @P0 BRA `(.L_x_0)
    {EXIT}"""
BYTES = "    [------ -- -- S01] MOV R3, 0x8000"
LEFT_OVER = BYTES + INITIALISE + 2 * ARM + WAIT + INITIALISE + ARM + WAIT + "\n" + EXIT
BODY = "\n".join(f"    [------ -- -- S02] FADD R{i}, R2, R3" for i in range(10, 20))
LOOP = f"""
    [------ -- -- S01] MOV R3, RZ
.L_x_0:
{BODY}
    [------ -- -- S05] @P0 BRA `(.L_x_0)
    {EXIT}"""
IF = f"""
.L_x_0:
    [------ -- -- S02] @P1 BRA `(.L_x_1)
{BODY}
{BODY}
{BODY}
.L_x_1:
    [------ -- -- S05] @P0 BRA `(.L_x_0)
    {EXIT}"""
CASES = {
    # Issue at 0, 5, 9.
    "stall counts": (STALLS, {}, 10),
    # Through the port in 4 cycles, 28 until the value is there; then 4 to EXIT.
    "write scoreboard": (WRITE, {}, 4 + 28 + 4 + 1),
    # The store has read R4 after 12.
    "read scoreboard": (READ, {}, 12 + 4 + 1),
    # Both loads hold scoreboard 1: the second has its turn after the first one's 16 cycles of the port.
    "a scoreboard counts": (COUNTED, {}, 16 + 4 + 28 + 1 + 1),
    # Warp 0 at 0, 2, 3; warp 1 at 4, 6, 7: the unit takes one of them every 2 cycles.
    "two warps share the ALU": (ALU, {"warps": 2}, 8),
    # Warp 0 at 0, 1, 2; warp 1 at 3, 4, 5: one instruction a cycle.
    "two warps share the scheduler": (FMA, {"warps": 2}, 6),
    # 256 / 2 cycles each; the third is issued when the first has ended.
    "the third wgmma waits for the first": (IN_FLIGHT, {}, 128 + 1 + 1),
    # 16 cycles of products, but (32 + 64) x 16 x 2 / 128 = 24 of operands.
    "wgmma waits for its operands": (OPERANDS, {}, 48 + 24 + 1 + 1),
    # One group may be unfinished: only the first is awaited.
    "a group of wgmma may run on": (GROUPS, {}, 128 + 24 + 1 + 1),
    "cp.async": (COPIES.replace("0x1", "0x0"), {}, 2 * 16 + 700 + 1 + 1),
    "a group of cp.async may be under way": (COPIES, {}, 16 + 700 + 1 + 1),
    "cp.async at another latency": (COPIES, {"latency": 500}, 16 + 500 + 1 + 1),
    # Warp 0 arrives at 0, warp 1 at 1; both go on at 17, one of them at 18.
    "barrier": (BARRIER, {"warps": 2}, 1 + 16 + 2),
    # A block's barrier is no other block's: each warp goes on 16 cycles after it came.
    "barriers of two blocks": (BARRIER, {"blocks": 2}, 1 + 16 + 1),
    # Issued at 4; 50 to start, 0x8000 / 40 bytes a cycle, 650 on the way; rounded up to whole cycles, then EXIT.
    "TMA": (TMA, {}, 4 + 50 + 819.2 + 650 + 1 + 1),
    # The second load is the second buffer of the same array, and its bytes come after the first's.
    "TMA, the second buffer": (TMA_SECOND, {}, 4 + 50 + 2 * 819.2 + 650 + 1 + 1),
    "TMA at another latency": (TMA, {"latency": 500}, 4 + 500 + 819.2 + 1 + 1),
    "TMA, bytes of another instruction": (TMA.replace("MOV R3,", "IMAD.MOV.U32 R3, RZ, RZ,"), {}, 1525.2),
    # Two loads bring the bytes of one mbarrier together.
    "TMA, two loads for one mbarrier": (ONE_MBARRIER, {}, 4 + 50 + 819.2 + 650 + 1 + 1),
    # The second warp comes to the initialisation when the first has already armed: it waits for the same load.
    "TMA, two warps": (TMA, {"warps": 2}, 4 + 50 + 819.2 + 650 + 4),
    # First load: issued at 3, there at 1522.2. The second is still under way when the mbarrier is initialised anew and
    # a third is issued, which follows it: 3 + 50 + 3 x 819.2 + 650.
    "TMA, what an earlier loop left over": (LEFT_OVER, {}, 3 + 50 + 3 * 819.2 + 650 + 1 + 1),
    # Two loads an iteration through TMA, whose time is that of their bytes. The last wait is for the sixth load.
    "TMA, an address in a register": (TWO_LOADS, {"trips": [3]}, 4 + 50 + 6 * 819.2 + 650 + 6 + 5 + 1),
    # 1 + 3 x (10 x 2 + 5) + EXIT.
    "a loop": (LOOP, {"trips": [3]}, 77),
    "an if that is entered": (IF, {"trips": [2]}, 2 * (2 + 60 + 5) + 1),
    "an if that is left out": (IF, {"trips": [2], "rare": True}, 2 * (2 + 5) + 1),
}


@pytest.mark.parametrize("name", CASES)
def test_cycles_are_those_counted_by_hand(name):
    snippet, arguments, expected = CASES[name]
    assert cycles(snippet, **arguments) == pytest.approx(expected, abs=1e-6)


def _replaced(method):
    """A change of Instruction's fields, made while the code is parsed."""

    def patch(monkeypatch):
        original = Instruction.__init__
        monkeypatch.setattr(Instruction, "__init__", lambda self, *args, **more: original(self, *args, **more | method))

    return patch


def _constant(name, value):
    return lambda monkeypatch: monkeypatch.setattr(hopper, name, value)


def _unit(opcode, unit):
    return lambda monkeypatch: monkeypatch.setitem(hopper.UNITS, opcode, unit)


def _operands_for_nothing(monkeypatch):
    original = hopper.wgmma
    monkeypatch.setattr(hopper, "wgmma", lambda i: hopper.Wgmma(original(i).tensor, 0) if original(i) else None)


def _every_group_is_awaited(monkeypatch):
    monkeypatch.setattr(partition, "_allowed", lambda groups, instruction: groups[-1] if groups else 0.0)


def _one_barrier_for_all(monkeypatch):
    original = Partition.__init__

    def init(self, *args, **more):
        original(self, *args, **more)
        for warp in self.warps:
            warp.block = 0

    monkeypatch.setattr(Partition, "__init__", init)


def _own_array_for_each_buffer(monkeypatch):
    monkeypatch.setattr(Listing, "mbarriers", lambda self, instruction: self.offset(instruction))


def _never_initialised_anew(monkeypatch):
    monkeypatch.setattr(Partition, "_mbarriers", lambda self, warp, i: (self.listing.mbarriers(i), 0))


# name -> (what to break, the cases that must notice).
MUTANTS = {
    "no stall counts": (_replaced({"stall": 0}), ["stall counts", "a loop"]),
    "no waiting for scoreboards": (_replaced({"wait": ()}), ["write scoreboard", "a scoreboard counts"]),
    "no write scoreboards": (_replaced({"write": 7}), ["write scoreboard"]),
    "no read scoreboards": (_replaced({"read": 7}), ["read scoreboard"]),
    "the ALU as wide as FMA": (_unit("IADD3", ("fma", 1)), ["two warps share the ALU"]),
    "FMA as narrow as the ALU": (_unit("FADD", ("alu", 2)), ["two warps share the scheduler"]),
    "a free port": (_unit("LDS", ("shared", 0)), ["write scoreboard", "a scoreboard counts"]),
    "any number of wgmma in flight": (_constant("WGMMA_IN_FLIGHT", 99), ["the third wgmma waits for the first"]),
    "one wgmma in flight": (_constant("WGMMA_IN_FLIGHT", 1), ["the third wgmma waits for the first"]),
    "operands for nothing": (_operands_for_nothing, ["wgmma waits for its operands"]),
    "every group of wgmma is awaited": (_every_group_is_awaited, ["a group of wgmma may run on"]),
    "every group of cp.async is awaited": (_every_group_is_awaited, ["a group of cp.async may be under way"]),
    "no latency of a barrier": (_constant("BARRIER_LATENCY", 0), ["barrier"]),
    "one barrier for all blocks": (_one_barrier_for_all, ["barriers of two blocks"]),
    "bytes for nothing": (_constant("TMA_BYTES", 1e12), ["TMA", "TMA, the second buffer"]),
    "mbarriers keep what they had": (_never_initialised_anew, ["TMA, what an earlier loop left over"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_noticed(name, monkeypatch):
    patch, noticed_by = MUTANTS[name]
    patch(monkeypatch)
    for case in noticed_by:
        snippet, arguments, expected = CASES[case]
        assert cycles(snippet, **arguments) != pytest.approx(expected, abs=1e-6), case


def test_buffers_of_one_load_are_one_array(monkeypatch):
    """A mutant that takes every offset for a load of its own waits for ever at the second."""
    _own_array_for_each_buffer(monkeypatch)
    with pytest.raises(ValueError, match="every warp waits"):
        cycles(TMA_SECOND)


def test_control_code_of_a_real_instruction():
    """From nvdisasm 13.1 on a kernel of this project."""
    text = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017b82 */
                                                                             /* 0x000e700000000800 */
        /*0050*/              @!P2 IABS R5, R10 ;                            /* 0x0000000a00057213 */
                                                                             /* 0x004fc80000000000 */
    """
    load, absolute = Listing.parse(text).code
    assert (load.stall, load.write, load.read, load.wait) == (8, 1, 7, ())
    assert (absolute.stall, absolute.write, absolute.read, absolute.wait) == (4, 7, 7, (2,))
    assert absolute.predicate == "!P2" and absolute.opcode == "IABS" and absolute.address == 0x50
    assert str(absolute) == "00050 [--2---  --   --   S04]  @!P2 IABS R5, R10"


def test_a_notation_and_its_listing_are_the_same():
    snippet = "[0-2--5 W3 R1 S15] @!P1 LDS.128 R4, [R8+0x10]"
    (instruction,) = listing(snippet).code
    assert instruction.wait == (0, 2, 5) and instruction.control.split() == ["[0-2--5", "W3", "R1", "S15]"]


def test_loops_outer_first_and_no_polling_loop():
    text = f"""
    .L_x_0:
    {BODY}
    .L_x_1:
    {BODY}
    [------ -- -- S05] @P0 BRA `(.L_x_1)
    [------ -- -- S05] @P1 BRA `(.L_x_0)
    {EXIT}
    .L_x_2:
    [------ -- -- S05] SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], RZ
    [------ -- -- S05] @!P0 BRA `(.L_x_2)
    [------ -- -- S05] BRA `(.L_x_0)
    """
    code = listing(text)
    assert code.loops == ((0, 21), (10, 20))
    run = Partition(code, [3, 2], warps=1).run()
    assert run.periods[0] == 20 + 2 * 25 + 5 and run.cycles == 3 * 75 + 1
    assert Kernel("", code, 4, 1).loop_of_loops(0) and Kernel("", code, 4, 1).inner_loop(1)


@pytest.mark.parametrize(
    ("snippet", "trips", "message"),
    [
        (LOOP, [], "0 trip counts, but the code has 1 loops: 0x10 to 0xb0"),
        (STALLS, [3], "1 trip counts, but the code has 0 loops"),
        (STALLS.replace("FADD", "FNEW"), [], "unknown opcode; add FNEW"),
        (TMA.replace("UTMALDG.2D [UR12], [UR8]", "NOP"), [], "every warp waits for a load or a barrier"),
        (TMA.replace("R7+URZ+0x100", "R7+URZ"), [], "which load it waits for"),
        (TMA.replace("MOV R3, 0x8000", "MOV R3, R4"), [], "no constant in R3"),
        (STALLS.replace("FADD R2, R2, R3", "CALL.REL.NOINC 0x10"), [], "calls are not modelled"),
        (LOOP.replace("@P0 BRA", "BRA"), [], "a loop without a condition"),
    ],
)
def test_code_that_the_model_cannot_run_is_an_error(snippet, trips, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cycles(snippet, trips)


def test_a_text_without_code_is_an_error():
    with pytest.raises(ValueError, match="nvdisasm -hex"):
        Listing.parse("nvdisasm fatal : no such file")


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
        (["--kernel", "attention dz"], "--kernel attention dz: no kernel of that name; expected one of"),
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
    command = [sys.executable, "-m", "kernels.proof.sass", "--kernel", "delta rule prepare", "--listing"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "HGMMA" in text and "loops: none" in text and "cycles, 4 blocks on a multiprocessor" in text
