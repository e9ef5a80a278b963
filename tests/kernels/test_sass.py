"""The model of a quarter of a multiprocessor: cycles of snippets, counted by hand, and mutants of its rules."""

import re

import pytest

from kernels.proof.sass import hopper, partition
from kernels.proof.sass.estimate import Kernel
from kernels.proof.sass.listing import Instruction, Listing
from kernels.proof.sass.partition import Partition
from tests.kernels.sass_snippets import BODY, CASES, EXIT, LOOP, STALLS, TMA, TMA_SECOND, listing


def cycles(snippet: str, trips=(), warps: int = 1, blocks: int = 1, **more) -> float:
    return Partition(listing(snippet), trips, warps, blocks, **more).run().cycles


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
