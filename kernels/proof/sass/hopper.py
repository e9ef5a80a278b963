"""What an instruction costs on Hopper: which unit it occupies, for how many cycles, and when its result is there.

All numbers are of one partition, the quarter of a multiprocessor that runs every fourth warp: 32 lanes of FMA, 16 of
ALU, 4 of special functions, one tensor core. The port of shared memory (128 B a cycle) belongs to all four, which are
assumed to do the same: one warp's access here stands for four. Sources: CUDA programming guide (throughput of
arithmetic instructions, compute capability 9.0); H100's data sheet (989 TFLOP/s in bf16 at 1.83 GHz are 2,048
multiply-adds a cycle and multiprocessor); latencies as microbenchmarks find them (arXiv 2501.12084), rounded.
"""

import re
from typing import NamedTuple

from kernels.proof.sass.listing import Instruction

MULTIPROCESSORS = 132
PARTITIONS = 4
CLOCK = 1.7e9  # Hz under the load of matrix products; the data sheet's maximum is 1.98
BANDWIDTH = 3.0e12  # bytes/s that streaming kernels reach of the data sheet's 3.35e12
SHARED_MEMORY = 233_472  # bytes a multiprocessor; each block takes 1,024 more than it asks for
REGISTERS = 65_536
WARPS = 64

WGMMA_IN_FLIGHT = 2  # a warp's third wgmma is issued when its first has ended
WGMMA_TO_REGISTERS = 24  # cycles from a group's end until WARPGROUP.DEPBAR lets go
BARRIER_LATENCY = 16
GLOBAL_LATENCY = 700  # cycles of a load from L2 or memory under load, by LDG, cp.async or TMA
TMA_ISSUE, TMA_BYTES = 50, 40.0  # cycles of it before bytes flow; bytes a cycle and multiprocessor
OPERANDS_READ = 12  # cycles until an instruction has read its registers

_ALU = """IADD3 LOP3 SHF LEA ISETP FSETP FMNMX SEL FSEL MOV PRMT VIADD PLOP3 IABS IMNMX VIMNMX VOTE P2R R2P SGXT BMSK
    FCHK VIADDMNMX CS2R FLO F2FP LOP I2FP"""
_FMA = "FFMA FMUL FADD FSWZADD HFMA2 HADD2 HMUL2 HMNMX2"
_INTEGER = "IMAD IDP"
_SPECIAL = "MUFU I2F F2I POPC F2F FRND"
_SHARED = "LDS STS LDSM STSM SHFL LDG STG LDGSTS ATOMS ATOMG ATOM RED LDL STL"
_UNIFORM = """UIADD3 UMOV ULOP3 ULEA USHF UISETP USEL USGXT UPLOP3 UIMAD ULDC VOTEU UPRMT UP2UR UR2UP UFLO UPOPC UBMSK
    UCGABAR_ARV UCGABAR_WAIT"""
_ISSUE = """BAR SYNCS WARPGROUP WARPSYNC DEPBAR LDGDEPBAR FENCE MEMBAR ELECT R2UR S2R S2UR LDC NOP BRA EXIT BSSY BSYNC
    BREAK UTMALDG UTMASTG UTMACMDFLUSH UTMACCTL CCTL ERRBAR NANOSLEEP USETMAXREG REDUX MATCH YIELD CALL RET"""
# opcode -> (unit, cycles). "issue": nothing but the slot of the scheduler.
UNITS = {
    opcode: unit
    for names, unit in (
        (_ALU, ("alu", 2)), (_FMA, ("fma", 1)), (_INTEGER, ("integer", 2)), (_SPECIAL, ("special", 8)),
        (_SHARED, ("shared", 4)), (_UNIFORM, ("uniform", 2)), (_ISSUE, ("issue", 1)),
    )
    for opcode in names.split()
}  # fmt: skip
# Cycles from issue, or for accesses to memory from their turn at the port, until the scoreboard is released.
LATENCY = {
    "LDS": 28, "LDSM": 32, "SHFL": 24, "STS": 20, "STSM": 24, "STG": 20, "LDGSTS": 20, "ATOMS": 60,
    "LDL": 40, "STL": 20, "S2R": 30, "S2UR": 30, "LDC": 40, "REDUX": 14, "MATCH": 20,
} | dict.fromkeys(_SPECIAL.split(), 22)  # fmt: skip
OTHER_LATENCY = 12


class Wgmma(NamedTuple):
    """One wgmma of a warpgroup: cycles of the tensor core, and of the port that brings its operands."""

    tensor: int
    shared: int


def wgmma(instruction: Instruction) -> Wgmma | None:
    """Of HGMMA.64xNxK: A is 64 x K, in registers or shared memory; B is K x N, always in shared memory."""
    match = re.match(r"HGMMA\.64x(\d+)x(\d+)", instruction.name)
    if match is None:
        return None
    N, K = map(int, match.groups())
    size = 4 if "TF32" in instruction.name else 2
    a_in_registers = not instruction.operands.split(",")[1].strip().startswith("gdesc")
    # 512 bf16 products a cycle and tensor core: the quarter of 64 x N x 16 takes N / 2. TF32 has half the speed and K.
    return Wgmma(N // 2, (N + 64 * (not a_in_registers)) * K * size // 128)


def unit(instruction: Instruction) -> tuple[str, int]:
    """(unit, cycles that a warp occupies it). ValueError for an opcode that the model does not know."""
    if (product := wgmma(instruction)) is not None:
        return "tensor", product.tensor
    if instruction.opcode not in UNITS:
        raise ValueError(f"{instruction}: unknown opcode; add {instruction.opcode} to kernels/proof/sass/hopper.py")
    name, cycles = UNITS[instruction.opcode]
    if name == "shared" and instruction.opcode != "SHFL":
        cycles *= _width(instruction.name)
    return name, cycles


def _width(name: str) -> int:
    """Passes through the port: one for each 4 bytes of a thread. LDSM and STSM move 1, 2 or 4 matrices of 128 B."""
    if ".128" in name or name.endswith(".4"):
        return 4
    return 2 if ".64" in name or name.endswith(".2") else 1


def blocks_per_multiprocessor(registers: int, shared: int, warps: int) -> int:
    """How many blocks fit side by side. Registers are given out in pieces of 256 to a warp."""
    per_block = -(-registers * 32 // 256) * 256 * warps
    return min(REGISTERS // per_block, SHARED_MEMORY // (shared + 1024), WARPS // warps)
