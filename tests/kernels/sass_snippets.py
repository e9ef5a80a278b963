"""Snippets of SASS in the notation of kernels/proof/sass/__init__.py, and their cycles counted by hand."""

import re

from kernels.proof.sass.listing import Listing

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
