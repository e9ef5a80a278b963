"""A model of one partition of a multiprocessor: its warps run a kernel's code, cycle by cycle, with its control codes.

Each cycle the partition issues at most one instruction: of the warp that issued last, as long as that can, else of the
one that has waited longest. Which is ready first, and what it waits for, is `_ready`; what an instruction occupies, and
when its result is there, is `_issue`.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from kernels.proof.sass import hopper
from kernels.proof.sass.listing import NO_SCOREBOARD, Instruction, Listing


@dataclass
class Warp:
    """pc: index of its next instruction; next: the cycle from which its last stall count lets it issue."""

    number: int  # within its block; number 0 holds the thread that issues TMA loads
    block: int
    pc: int = 0
    next: float = 0
    since: float = 0  # when it issued last
    done: bool = False
    scoreboards: list[tuple[float, str]] = field(default_factory=lambda: [(0, "")] * 6)  # (empty at, opcode)
    products: list[float] = field(default_factory=list)  # when each wgmma ends
    groups: list[float] = field(default_factory=list)  # when each group of wgmma ends
    copies: list[float] = field(default_factory=list)  # when the cp.async of the open group arrive
    copy_groups: list[float] = field(default_factory=list)
    initialised: Counter = field(default_factory=Counter)  # array of mbarriers -> how often
    awaited: Counter = field(default_factory=Counter)  # (array, how often initialised) -> loads waited for
    trips: Counter = field(default_factory=Counter)  # a loop's last instruction -> how often it jumped back
    counts: Counter = field(default_factory=Counter)  # opcode with its first modifier -> instructions issued


@dataclass
class Load:
    """Bytes on their way to an mbarrier."""

    bytes: int
    done: float = math.inf


@dataclass(frozen=True)
class Run:
    """cycles: of the whole program. periods: of each loop that lies in no other one, cycles an iteration in the second
    half of its trips; NaN for a loop that the program does not reach.

    busy: unit -> cycles, all warps together. idle: reason -> cycles that warps waited for it. counts: opcode -> how
    often the first warp issued it.
    """

    cycles: float
    periods: tuple[float, ...]
    busy: Counter
    idle: Counter
    counts: Counter

    @property
    def tensor(self) -> float:
        """The share of all cycles in which the tensor core works."""
        return self.busy["tensor"] / self.cycles


class Partition:
    """blocks: resident at the same time; warps: of one block in this partition (a quarter of its warps).

    trips: how often each loop of the listing runs, the outer of two loops first. rare: whether code behind an `if`
    inside a loop is left out; without it every `if` is entered. ValueError if trips and loops are not as many.
    """

    def __init__(self, listing: Listing, trips: Sequence[int], warps: int = 2, blocks: int = 1, rare: bool = False,
                 latency: int = hopper.GLOBAL_LATENCY):  # fmt: skip
        if len(trips) != len(listing.loops):
            ends = [f"{listing.code[a].address:#x} to {listing.code[b].address:#x}" for a, b in listing.loops]
            raise ValueError(f"{len(trips)} trip counts, but the code has {len(ends)} loops: {', '.join(ends) or '-'}")
        self.listing, self.code, self.rare, self.latency = listing, listing.code, rare, latency
        self.trips = {last: n for (_, last), n in zip(listing.loops, trips, strict=True)}
        self.units = [hopper.unit(i) for i in self.code]
        self.warps = [Warp(number, block) for block in range(blocks) for number in range(warps)]
        self.cycle = 0.0
        self.free: Counter = Counter()  # unit -> the cycle from which it takes the next instruction
        self.busy, self.idle = Counter(), Counter()
        self.barrier: dict[int, list[tuple[float, Warp]]] = defaultdict(list)  # block -> warps that have arrived
        self.loads: dict[tuple, list[Load]] = defaultdict(list)  # (block, array of mbarriers, how often initialised)
        self.armed: dict[int, Load] = {}  # block -> the load whose mbarrier was armed last
        self.ends: dict[int, list[float]] = defaultdict(list)  # a loop's last instruction -> when warp 0 issues it

    def run(self) -> Run:
        """ValueError where every warp waits for something that no warp will do."""
        last = None
        while live := [warp for warp in self.warps if not warp.done]:
            ready = [(*self._ready(warp), warp) for warp in live]
            cycle = max(self.cycle, min(time for time, _, _ in ready))
            if cycle == math.inf:
                places = "; ".join({str(self.code[warp.pc]) for warp in live})
                raise ValueError(f"every warp waits for a load or a barrier that none of them issues, at {places}")
            able = [r for r in ready if r[0] <= cycle]
            time, reason, warp = min(able, key=lambda r: (r[2] is not last, r[2].since, r[2].block, r[2].number))
            self.cycle = cycle
            if cycle > warp.next:
                self.idle[reason if time == cycle else "another warp issues"] += cycle - warp.next
            self._issue(warp, self.code[warp.pc])
            self.cycle, last = cycle + 1, warp
        return Run(self.cycle, tuple(self._period(b) for _, b in self.listing.loops), self.busy, self.idle,
                   self.warps[0].counts)  # fmt: skip

    def _period(self, last: int) -> float:
        ends = self.ends[last]
        middle = (len(ends) - 1) // 2
        return (ends[-1] - ends[middle]) / (len(ends) - 1 - middle) if len(ends) > 1 else math.nan

    def _ready(self, warp: Warp) -> tuple[float, str]:
        """From which cycle the warp's next instruction can issue, and what it waits for until then."""
        instruction, (unit, _) = self.code[warp.pc], self.units[warp.pc]
        reasons = [(warp.next, "stall count"), *(warp.scoreboards[i] for i in instruction.wait)]
        if unit == "tensor" and len(warp.products) >= hopper.WGMMA_IN_FLIGHT:
            reasons.append((warp.products[-hopper.WGMMA_IN_FLIGHT], "tensor core"))
        elif unit == "shared":
            reasons.append((self.free["queue"], "shared memory's queue"))
        elif unit not in ("tensor", "issue"):
            reasons.append((self.free[unit], unit))
        elif instruction.name.startswith("WARPGROUP.DEPBAR"):
            reasons.append((_allowed(warp.groups, instruction) + hopper.WGMMA_TO_REGISTERS, "wgmma"))
        elif instruction.opcode == "DEPBAR":
            reasons.append((_allowed(warp.copy_groups, instruction), "cp.async"))
        elif "PHASECHK" in instruction.name:
            key = self._mbarriers(warp, instruction)
            loads, i = self.loads[warp.block, *key], warp.awaited[key]
            reasons.append((loads[i].done if i < len(loads) else math.inf, "TMA"))
        return max(reasons)

    def _issue(self, warp: Warp, instruction: Instruction) -> None:
        now, (unit, cycles) = self.cycle, self.units[warp.pc]
        self.busy["issue"] += 1
        warp.counts[".".join(instruction.name.split(".")[:2])] += 1
        warp.since, warp.next = now, now + max(1, instruction.stall)
        result = now + hopper.LATENCY.get(instruction.opcode, hopper.OTHER_LATENCY)
        operands = now + hopper.OPERANDS_READ
        if unit == "tensor":
            operands = self._multiply(warp, instruction)
            result = operands
        elif unit == "shared":
            result = self._access(warp, instruction, cycles)
        elif unit != "issue":
            self.free[unit] = now + cycles
            self.busy[unit] += cycles
        else:
            self._synchronise(warp, instruction)
        for scoreboard, until in ((instruction.write, result), (instruction.read, operands)):
            if scoreboard != NO_SCOREBOARD:
                # It counts: it is empty when the last of those that occupy it is done.
                warp.scoreboards[scoreboard] = max(warp.scoreboards[scoreboard], (until, instruction.opcode))
        self._step(warp, instruction)

    def _multiply(self, warp: Warp, instruction: Instruction) -> float:
        """A wgmma -> when it ends. The tensor core computes in order, as fast as operands come from shared memory."""
        tensor, shared = hopper.wgmma(instruction)
        duration = max(tensor, shared)
        # The port may still be busy with earlier accesses as long as it catches up while the product runs.
        start = max(self.cycle, self.free["tensor"], self.free["port"] - duration)
        self.free["tensor"] = end = start + duration
        self.free["port"] = max(self.free["port"], start) + shared
        self.busy["tensor"] += tensor
        self.busy["shared"] += shared
        warp.products.append(end)
        if "gsb0" in instruction.operands:
            warp.groups.append(end)
        return end

    def _access(self, warp: Warp, instruction: Instruction, cycles: int) -> float:
        """An access to memory -> when its result is there: the latency counts from its turn at the port."""
        self.free["queue"] = self.cycle + 2
        self.free["port"] = turn = max(self.free["port"], self.cycle) + cycles
        self.busy["shared"] += cycles
        if instruction.opcode == "LDGSTS":
            # Its scoreboard only says that the addresses were read; the data come with its group.
            warp.copies.append(turn + self.latency)
        return turn + (self.latency if instruction.opcode == "LDG" else hopper.LATENCY[instruction.opcode])

    def _synchronise(self, warp: Warp, instruction: Instruction) -> None:
        """What an instruction does to loads on their way and to other warps."""
        if instruction.name.startswith("BAR.SYNC"):
            arrived = self.barrier[warp.block]
            arrived.append((warp.next, warp))
            warp.next = math.inf
            if len(arrived) == sum(other.block == warp.block for other in self.warps):
                for since, other in arrived:
                    other.next = max(since, self.cycle + hopper.BARRIER_LATENCY)
                    self.idle["barrier"] += other.next - since
                arrived.clear()
        elif instruction.opcode == "LDGDEPBAR":
            warp.copy_groups.append(max(warp.copies, default=self.cycle))
            warp.copies.clear()
        elif instruction.opcode == "SYNCS":
            key = self._mbarriers(warp, instruction)
            if "PHASECHK" in instruction.name:
                warp.awaited[key] += 1
            elif "EXCH" in instruction.name:
                # For another loop: what the last one still had under way is forgotten. Every warp counts by itself,
                # because only one thread initialises and arms, and the others may come by later.
                warp.initialised[key[0]] += 1
            elif "ARRIVE.TRANS64" in instruction.name and warp.number == 0:
                self.armed[warp.block] = Load(self.listing.expected_bytes(warp.pc))
                self.loads[warp.block, *key].append(self.armed[warp.block])
        elif instruction.opcode == "UTMALDG" and warp.number == 0:
            load = self.armed[warp.block]
            sent = max(self.free["TMA"], self.cycle + hopper.TMA_ISSUE) + load.bytes / hopper.TMA_BYTES
            # Two loads for one mbarrier: its bytes are counted with the first.
            self.free["TMA"], load.bytes, load.done = sent, 0, sent + self.latency - hopper.TMA_ISSUE

    def _mbarriers(self, warp: Warp, instruction: Instruction) -> tuple[int, int]:
        """The array of mbarriers that a SYNCS uses, and how often it has been initialised."""
        array = self.listing.mbarriers(instruction)
        return array, warp.initialised[array]

    def _step(self, warp: Warp, instruction: Instruction) -> None:
        """Moves the warp on: to the next instruction, or where a branch leads."""
        i = warp.pc
        warp.pc += 1
        target = self.listing.target(i)
        if instruction.opcode == "EXIT" and not instruction.predicate:
            warp.done = True
        elif instruction.opcode in ("CALL", "RET") and not instruction.predicate:
            raise ValueError(f"{instruction}: calls are not modelled")
        elif i in self.trips:
            warp.trips[i] += 1
            if warp is self.warps[0]:
                self.ends[i].append(self.cycle)
            if warp.trips[i] < self.trips[i]:
                warp.pc = target
            else:
                warp.trips[i] = 0  # an outer loop may come back
        elif target is not None and not instruction.predicate:
            if target <= i:
                raise ValueError(f"{instruction}: a loop without a condition at its end is not modelled")
            warp.pc = target
        elif self.rare and i in self.listing.ifs:
            warp.pc = target


def _allowed(groups: list[float], instruction: Instruction) -> float:
    """When at most so many of the groups are left as the instruction's last operand says."""
    keep = int(instruction.operands.split(",")[-1].strip(), 16)
    return groups[-1 - keep] if len(groups) > keep else 0.0


