"""A kernel's code and its launches -> cycles, what its warps wait for, milliseconds a step. On paper, not measured."""

import dataclasses
import heapq
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

from kernels.ops import causal_attention
from kernels.proof.compile import compile_all, machine_code, markdown
from kernels.proof.contract import CompileSpec
from kernels.proof.registry import operations
from kernels.proof.sass import hopper
from kernels.proof.sass.listing import Listing
from kernels.proof.sass.partition import Partition, Run
from kernels.proof.sass.programs import Launch, launches

# Longer loops are simulated for so many trips and then continued at their period.
MAX_TRIPS = 16
LATENCIES = (500, 1000)  # cycles of a load from global memory: what the time is also computed for, beside 700
ERROR = """On paper, not measured. The model knows the code, its control codes and the units; it does not know
bank conflicts, instruction fetches, the queues of L2 and memory or a lower clock under load, and every branch and trip
is given. Expected error: 20 % for attention (calibrated), 30 % for the delta rule (no calibration). The range is for
loads that take 500 or 1,000 cycles instead of 700."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel: its listing, its warps in a block, and how many blocks fit a multiprocessor."""

    name: str
    listing: Listing
    warps: int
    blocks: int

    def simulate(
        self, trips: Sequence[int], blocks: int, rare: bool = False, latency: int = hopper.GLOBAL_LATENCY
    ) -> Run:
        """So many blocks side by side, each loop with its trips."""
        warps = -(-self.warps // hopper.PARTITIONS)
        return Partition(self.listing, trips, warps, blocks, rare, latency).run()

    def loop_of_loops(self, i: int) -> bool:
        """Whether loop i contains another one."""
        first, last = self.listing.loops[i]
        return any(first <= a and b <= last for j, (a, b) in enumerate(self.listing.loops) if j != i)

    def inner_loop(self, i: int) -> bool:
        """Whether loop i lies in another one."""
        first, last = self.listing.loops[i]
        return any(a <= first and last <= b for j, (a, b) in enumerate(self.listing.loops) if j != i)


def load(specs: Sequence[CompileSpec]) -> dict[str, Kernel]:
    """Compiles the specs for sm_90. ValueError for a kernel that does not compile."""
    kernels = {}
    for spec, used, code in zip(specs, compile_all(specs), machine_code(specs), strict=True):
        if used.error:
            raise ValueError(f"{spec.name} does not compile: {used.error}")
        blocks = hopper.blocks_per_multiprocessor(used.registers, used.shared, spec.num_warps)
        kernels[spec.name] = Kernel(spec.name, Listing.disassemble(code), spec.num_warps, blocks)
    return kernels


class Timing:
    """The time of one launch: programs simulated side by side, then spread over the multiprocessors."""

    def __init__(self, kernel: Kernel, launch: Launch, latency: int = hopper.GLOBAL_LATENCY):
        self.kernel, self.launch, self.latency = kernel, launch, latency
        self.longest = max(launch.programs)
        self.runs: dict[int, Run] = {}
        for i, trips in enumerate(self.longest):
            if trips > MAX_TRIPS and kernel.inner_loop(i):
                raise ValueError(f"{kernel.name}: loop {i} lies in another one; {trips} trips, at most {MAX_TRIPS}")

    def run(self, blocks: int) -> Run:
        """So many of the longest programs on each multiprocessor, their loops cut to MAX_TRIPS."""
        if blocks not in self.runs:
            trips = [min(n, MAX_TRIPS) for n in self.longest]
            self.runs[blocks] = self.kernel.simulate(trips, blocks, self.launch.rare, self.latency)
        return self.runs[blocks]

    def program(self, trips: tuple[int, ...], blocks: int) -> float:
        """Cycles of one of `blocks` programs with these trips that run side by side."""
        run = self.run(blocks)
        cycles = run.cycles
        for i, (simulated, wanted, period) in enumerate(zip(self.longest, trips, run.periods, strict=True)):
            if (extra := wanted - min(simulated, MAX_TRIPS)) != 0:
                if math.isnan(period):
                    raise ValueError(f"{self.kernel.name}: loop {i} has no period: one trip at most was simulated")
                cycles += extra * period
        return cycles

    @cached_property
    def resident(self) -> int:
        """Blocks that lie on a multiprocessor side by side: as many as fit and as there are."""
        return min(self.kernel.blocks, -(-len(self.launch.programs) // hopper.MULTIPROCESSORS))

    @cached_property
    def cycles(self) -> float:
        """Of the launch: computing, or if that takes longer, moving its bytes."""
        return max(self._computing(), self.launch.bytes / hopper.BANDWIDTH * hopper.CLOCK)

    def _computing(self) -> float:
        """Equal programs run in rounds, in the last of which fewer lie side by side; of unequal ones each goes where a
        place gets free first.
        """
        programs, blocks = self.launch.programs, self.resident
        places = hopper.MULTIPROCESSORS * blocks
        if len(set(programs)) == 1:
            rounds, rest = divmod(len(programs), places)
            last = self.program(self.longest, -(-rest // hopper.MULTIPROCESSORS)) if rest else 0
            return rounds * self.program(self.longest, blocks) + last
        free = [0.0] * places
        for trips in programs:
            heapq.heapreplace(free, free[0] + self.program(trips, blocks))
        return max(free)

    @property
    def main_loop(self) -> int | None:
        """The loop that takes most of the longest program's time; None if none takes half, or it contains others."""
        run, total = self.run(self.resident), self.program(self.longest, self.resident)
        shares = [
            0 if math.isnan(period) or self.kernel.inner_loop(i) else n * period / total
            for i, (n, period) in enumerate(zip(self.longest, run.periods, strict=True))
        ]
        best = max(range(len(shares)), key=shares.__getitem__, default=None)
        return None if best is None or shares[best] < 0.5 or self.kernel.loop_of_loops(best) else best


class Row(NamedTuple):
    """One kernel of the table. Numbers are of an iteration of its main loop, or of the program if it has none.

    tensor: share of the period in which the tensor core works. wgmma_waits, barriers: of one warp.
    waits: what warps wait for most, of the time in which they do not issue. seconds: of a step; low, high: the same for
    loads of LATENCIES.
    """

    kernel: str
    op: str
    backward: bool
    blocks: int
    trips: int | None
    instructions: int
    period: float
    tensor: float
    wgmma_waits: int
    barriers: int
    waits: str
    launch_seconds: float
    seconds: float
    low: float
    high: float


def row(kernel: Kernel, launch: Launch, factor: float = 1.0) -> Row:
    """factor: measured speed over the model's, by which the time is divided."""
    timing = Timing(kernel, launch)
    low, high = (Timing(kernel, launch, latency).cycles / hopper.CLOCK / factor for latency in LATENCIES)
    seconds = timing.cycles / hopper.CLOCK / factor
    run, loop, blocks = timing.run(timing.resident), timing.main_loop, timing.resident
    if loop is None:
        trips, period, counts, tensor = None, run.cycles, run.counts, run.tensor
    else:
        first, last = kernel.listing.loops[loop]
        body = kernel.listing.code[first : last + 1]
        trips, period = timing.longest[loop], run.periods[loop]
        counts = Counter(".".join(i.name.split(".")[:2]) for i in body)
        products = sum(product.tensor for i in body if (product := hopper.wgmma(i)))
        tensor = products * blocks * -(-kernel.warps // hopper.PARTITIONS) / period
    idle = run.idle.total()
    return Row(
        launch.kernel.partition(",")[0], launch.op, launch.backward, blocks, trips, counts.total(), period, tensor,
        counts["WARPGROUP.DEPBAR"], counts["BAR.SYNC"],
        ", ".join(f"{reason} {cycles / idle:.0%}" for reason, cycles in run.idle.most_common(3)),
        seconds, *(launch.launches * s for s in (seconds, low, high)),
    )  # fmt: skip


# Calibration: TFLOP/s of Triton's attention tutorial on an H100, by (documents of 16 heads, tokens): pytorch/benchmark,
# pull request 2391, column triton_tutorial_flash_v2 (forward, not causal, head size 128, bf16).
MEASURED = {(8, 2048): 433.7, (4, 4096): 458.4, (2, 8192): 470.7, (1, 16384): 476.8}
TUTORIAL_HEADS, TUTORIAL_WIDTH, TUTORIAL_TILE = 16, 128, 128


def tutorial_spec() -> CompileSpec:
    """Our forward kernel with the tutorial's tiles: 128 queries x 128 keys, 8 warps, 3 stages. The same algorithm."""
    sizes = {"H": TUTORIAL_HEADS, "GROUP": 1, "K": TUTORIAL_WIDTH, "BT": TUTORIAL_TILE, "BS": TUTORIAL_TILE}
    types = {"p_o": "*bf16", "p_lse": "*fp32", "p_items": "*i32", "T": "i32", "inner": "i32", "scale": "fp32"}
    box = f"tensordesc<bf16[{TUTORIAL_TILE},{TUTORIAL_WIDTH}]>"
    types |= {f"desc_{x}": box for x in "qkv"}
    kernel, constants = causal_attention._forward_kernel, sizes | {"PRECISION": "tf32"}
    return CompileSpec("attention tutorial", kernel, types, constants, num_warps=8, num_stages=3)


class Calibration(NamedTuple):
    """rows: (tokens, the model's TFLOP/s, the measured). factor: measured over the model's, geometric mean."""

    rows: list[tuple[int, float, float]]
    factor: float


def calibrate(kernel: Kernel) -> Calibration:
    """Every tile reads all keys without a mask: the first loop; the second, for the diagonal, does not run."""
    rows = []
    for (documents, tokens), measured in MEASURED.items():
        tiles = tokens // TUTORIAL_TILE
        heads = documents * TUTORIAL_HEADS
        timing = Timing(kernel, Launch(kernel.name, "", False, [(tiles, 2)] * (tiles * heads), 1))
        # The run has both loops; the diagonal's two trips are taken out again.
        rounds = -(-len(timing.launch.programs) // hopper.MULTIPROCESSORS)
        seconds = rounds * timing.program((tiles, 0), 1) / hopper.CLOCK
        rows.append((tokens, 4 * heads * tokens**2 * TUTORIAL_WIDTH / seconds / 1e12, measured))
    factor = math.exp(sum(math.log(measured / model) for _, model, measured in rows) / len(rows))
    return Calibration(rows, factor)


@dataclasses.dataclass(frozen=True)
class Report:
    calibration: Calibration
    rows: list[Row]

    def seconds(self, op: str, backward: bool) -> float:
        """Of one direction of an operation in a step."""
        return sum(r.seconds for r in self.rows if r.op == op and r.backward == backward)

    def table(self) -> str:
        """A Markdown table, one line a kernel, and the sums of each operation."""
        lines = [("kernel", "blocks", "trips", "instructions", "cycles", "tensor", "wgmma waits", "barriers",
                  "its warps wait for", "us a launch", "ms a step", "500 to 1,000")]  # fmt: skip
        for r in self.rows:
            lines.append((
                r.kernel, r.blocks, "-" if r.trips is None else r.trips, f"{r.instructions:,}", f"{r.period:,.0f}",
                f"{r.tensor:.0%}", r.wgmma_waits, r.barriers, r.waits, f"{1e6 * r.launch_seconds:,.0f}",
                f"{1e3 * r.seconds:.1f}", f"{1e3 * r.low:.1f} to {1e3 * r.high:.1f}",
            ))  # fmt: skip
        for op in dict.fromkeys(r.op for r in self.rows):
            for backward, direction in ((False, "forward"), (True, "backward")):
                rows = [r for r in self.rows if r.op == op and r.backward == backward]
                seconds, low, high = (1e3 * sum(getattr(r, name) for r in rows) for name in ("seconds", "low", "high"))
                lines.append((f"**{op} {direction}**", *[""] * 9, f"**{seconds:.1f}**", f"{low:.1f} to {high:.1f}"))
        return markdown(lines, text_columns=(0, 8))

    def calibration_text(self) -> str:
        """The model against measurements of the same shape, in one sentence."""
        pairs = ", ".join(f"{model:.0f} ({measured:.0f})" for _, model, measured in self.calibration.rows)
        tokens = ", ".join(f"{n:,}" for n, _, _ in self.calibration.rows)
        return (
            f"Calibration: Triton's attention tutorial (forward, heads of 128) at {tokens} tokens, TFLOP/s of\n"
            f"the model (measured on an H100, pytorch/benchmark#2391): {pairs}.\n"
            f"Attention's times are divided by the mean ratio, {self.calibration.factor:.3f}; the delta rule's are the "
            "model's own."
        )


def report(ops: Sequence[str], say: Callable[[str], None] = lambda line: None) -> Report:
    """Compiles and simulates the kernels of these operations; `say` gets a line for each as it is done."""
    todo = [launch for launch in launches() if launch.op in ops]
    specs = {s.name: s for op in operations(list(ops)) for s in op.compile_specs()}
    if unknown := {launch.kernel for launch in todo} - specs.keys():
        raise ValueError(f"no compile spec for {', '.join(sorted(unknown))}; expected one of {', '.join(specs)}")
    names = dict.fromkeys(launch.kernel for launch in todo)
    kernels = load([tutorial_spec(), *(specs[name] for name in names)])
    calibration = calibrate(kernels["attention tutorial"])
    rows = []
    for launch in todo:
        rows.append(row(kernels[launch.kernel], launch, calibration.factor if launch.op == "causal_attention" else 1.0))
        say(f"{launch.kernel}: {1e3 * rows[-1].seconds:.1f} ms a step on paper")
    return Report(calibration, rows)
