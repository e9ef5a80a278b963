"""SASS as nvdisasm prints it -> instructions with their control codes, loops, branches over rare code."""

import re
import subprocess
import tempfile
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

# An instruction takes two lines, each with 64 of its 128 bits in hexadecimal; the first also has the text.
FIRST_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T0-9]+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;\s*/\* 0x[0-9a-f]+ \*/"
)
SECOND_LINE = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
LABEL = re.compile(r"^(\.L_x_\d+):")
NO_SCOREBOARD = 7
SPIN = 8  # a jump back over at most so many instructions is a loop that polls an mbarrier, off the main path
RARE = 20  # a branch inside a loop over at least so many instructions is an `if` of the kernel


@dataclass(frozen=True)
class Instruction:
    """One instruction. write, read: the scoreboard that it occupies, or NO_SCOREBOARD; wait: those it waits for."""

    address: int
    predicate: str  # "P0", "!P0", "UP1"; "" if it always executes
    name: str  # with its modifiers: "LDS.128"
    operands: str
    stall: int
    write: int
    read: int
    wait: tuple[int, ...]

    @property
    def opcode(self) -> str:
        return self.name.partition(".")[0]

    @property
    def control(self) -> str:
        """The control code in the notation of this package's docstring."""
        waits = "".join(str(i) if i in self.wait else "-" for i in range(6))
        write, read = (f"{k}{n}" if n != NO_SCOREBOARD else "--" for k, n in (("W", self.write), ("R", self.read)))
        return f"[{waits}  {write}   {read}   S{self.stall:02}]"

    def __str__(self) -> str:
        predicate = f"@{self.predicate}" if self.predicate else ""
        return f"{self.address:05x} {self.control} {predicate:>5} {self.name} {self.operands}".rstrip()


def decode(high: int) -> dict[str, object]:
    """The control code of an instruction from the upper 64 of its bits (Volta to Hopper)."""
    return {
        "stall": high >> 41 & 15,  # bit 45, the yield hint, is not modelled
        "write": high >> 46 & 7,
        "read": high >> 49 & 7,
        "wait": tuple(i for i in range(6) if high >> 52 + i & 1),
    }


@dataclass(frozen=True)
class Listing:
    """A kernel's code. labels: name -> index of the instruction behind it."""

    code: tuple[Instruction, ...]
    labels: dict[str, int]

    @classmethod
    def parse(cls, text: str) -> "Listing":
        """From the output of `nvdisasm -hex -c`. ValueError if it holds no instruction."""
        code, labels, waiting, first = [], {}, [], None
        for line in text.splitlines():
            if match := LABEL.match(line):
                waiting.append(match[1])
            elif match := FIRST_LINE.match(line):
                first = match
            elif first and (match := SECOND_LINE.match(line)):
                labels |= dict.fromkeys(waiting, len(code))
                address, predicate, name, operands = first.groups()
                code.append(Instruction(int(address, 16), predicate or "", name, operands, **decode(int(match[1], 16))))
                waiting, first = [], None
        if not code:
            raise ValueError(f"no SASS in this text: {text[:80]!r}; expected the output of nvdisasm -hex -c")
        return cls(tuple(code), labels)

    @classmethod
    def disassemble(cls, cubin: bytes) -> "Listing":
        """With the nvdisasm that Triton's wheel brings."""
        from triton import knobs

        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [knobs.nvidia.nvdisasm.path, "-hex", "-c", file.name]
            return cls.parse(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def target(self, i: int) -> int | None:
        """The index to which the branch at index i jumps; None for what is no branch."""
        instruction = self.code[i]
        label = re.search(r"\.L_x_\d+", instruction.operands) if instruction.opcode == "BRA" else None
        return self.labels[label[0]] if label else None

    @cached_property
    def loops(self) -> tuple[tuple[int, int], ...]:
        """(first, last) index of every loop, in the order of their first instructions; the outer of two comes first."""
        loops = []
        for i, instruction in enumerate(self.code):
            target = self.target(i)
            if instruction.predicate and target is not None and i - target > SPIN:
                loops.append((target, i))
        return tuple(sorted(loops, key=lambda loop: (loop[0], -loop[1])))

    @cached_property
    def ifs(self) -> tuple[int, ...]:
        """Indices of the branches inside a loop that jump over at least RARE instructions of the same loop."""
        return tuple(
            i
            for i, instruction in enumerate(self.code)
            if instruction.predicate and (target := self.target(i)) is not None and target - i > RARE
            if any(first <= i and target <= last for first, last in self.loops)
        )

    @staticmethod
    def offset(instruction: Instruction) -> int:
        """The constant part of an address such as [UR60+0x30100]; 0 if it has none."""
        match = re.search(r"\[[^\]]*?\+?(0x[0-9a-f]+)\]", instruction.operands)
        return int(match[1], 16) if match else 0

    @cached_property
    def _arrays(self) -> tuple[list[int], set[int]]:
        """(the first offsets of all arrays of mbarriers, those at which no wait has a constant address)."""
        initialised = {self.offset(i) for i in self.code if "SYNCS.EXCH" in i.name}
        waited = {self.offset(i) for i in self.code if "PHASECHK" in i.name} & initialised
        inside = {i for first, last in self.loops for i in range(first, last)}
        armed = {self.offset(self.code[i]) for i in inside if "ARRIVE.TRANS64" in self.code[i].name}
        return sorted(waited | armed), armed - waited

    def mbarriers(self, instruction: Instruction) -> int:
        """Which array of mbarriers (one for each buffer of a pipelined load) a SYNCS uses: the first one's offset.

        Code before a loop uses the second one of an array by its own offset, code in the loop by the first one's and a
        register. So an offset belongs to the nearest one below that a loop uses. ptxas may add all of the address to
        the register: then the array is the one that is armed in a loop and waited for nowhere else.
        """
        (arrays, unnamed), offset = self._arrays, self.offset(instruction)
        if arrays and offset >= arrays[0]:
            return arrays[bisect_right(arrays, offset) - 1]
        if len(unnamed) != 1:
            raise ValueError(f"{instruction}: which load it waits for does not show in its address")
        return min(unnamed)

    def expected_bytes(self, i: int) -> int:
        """How many bytes the mbarrier that is armed at index i shall receive: the constant in its last operand."""
        register = self.code[i].operands.split(",")[-1].strip()
        for j in range(i - 1, -1, -1):
            destination, *sources = (s.strip() for s in self.code[j].operands.split(","))
            if destination == register:
                if self.code[j].name in ("MOV", "IMAD.MOV.U32") and sources[-1].startswith("0x"):
                    return int(sources[-1], 16)
                break
        raise ValueError(f"{self.code[i]}: no constant in {register}, the bytes that this mbarrier shall receive")
