"""What a trace says, as text: work by kind, by layer, the heaviest lines, the memory's peak, the host's time."""

from collections.abc import Iterable

from psysafe.training.paper.rates import KINDS, PaperGPU, Total, kind
from psysafe.training.paper.trace import Trace

HOST_US = 20.0  # microseconds of Python for one launch of Triton or of torch
PHASES = ("forward", "recompute", "backward", "optimizer")
_NUMBERS = f"{'ops':>7}{'Triton':>8}{'TFLOP':>9}{'GB':>9}{'ms':>9}{'share':>7}"


def report(
    title: str, trace: Trace, gpu: PaperGPU, top: int = 12, host_us: float = HOST_US, python: float | None = None
) -> list[str]:
    """The lines to print. Every time in them is on paper but python, the host's own (run.host_seconds)."""
    whole = gpu.total(trace.ops)[""]
    seconds = f"{1e3 * whole.seconds:,.1f} ms on paper, on one {gpu.name}"
    lines = [f"{title}: {whole.ops:,} kernels and copies, {whole.launches:,} of them Triton's; {seconds}", ""]
    lines += table("kind of work", sorted_by(gpu.total(trace.ops, kind), KINDS), whole)
    lines += ["", *table("phase", sorted_by(gpu.total(trace.ops, lambda op: op.phase), PHASES), whole)]
    lines += ["", *table("layers", by_layer(trace, gpu), whole)]
    heaviest = gpu.total(trace.ops, lambda op: f"{op.name}  {op.where}")
    heaviest = dict(sorted(heaviest.items(), key=lambda item: -item[1].seconds)[:top])
    return [*lines, "", *table("heaviest lines", heaviest, whole), "", memory(trace), *host(whole, host_us, python)]


def sorted_by(totals: dict, order: Iterable) -> dict:
    return {key: totals[key] for key in order if key in totals}


def by_layer(trace: Trace, gpu: PaperGPU) -> dict[str, Total]:
    """Layers that do the same work in one line, and what lies outside all layers."""
    layers = gpu.total(trace.ops, lambda op: op.layer)
    outside = layers.pop(None, Total())
    groups: dict[Total, list[int]] = {}
    for layer, work in sorted(layers.items()):
        groups.setdefault(work, []).append(layer)
    totals = {}
    for work, numbers in groups.items():
        several = f"{len(numbers)} layers {numbers[0]} to {numbers[-1]}, each"
        totals[several if len(numbers) > 1 else f"layer {numbers[0]}"] = work
    return totals | {"outside": outside}


def table(heading: str, totals: dict[str, Total], whole: Total) -> list[str]:
    width = max(len(heading), *(len(str(key)) for key in totals))
    lines = [f"{heading:<{width}}{_NUMBERS}"]
    for key, x in totals.items():
        work = f"{x.ops:>7,}{x.launches:>8,}{x.flops / 1e12:>9.2f}{x.bytes / 1e9:>9.2f}"
        lines.append(f"{key:<{width}}{work}{1e3 * x.seconds:>9.2f}{x.seconds / whole.seconds:>7.1%}")
    return lines


def memory(trace: Trace) -> str:
    """Where the most memory is live."""
    op = trace.ops[min(trace.peak_op, len(trace.ops) - 1)]
    layer = "outside the layers" if op.layer is None else f"in layer {op.layer}"
    return (
        f"memory: simulated peak {trace.peak / 1e9:.2f} GB, {trace.fixed / 1e9:.2f} of them there all the time; "
        f"at {trace.peak_name}, {layer}, {trace.peak_where}"
    )


def host(whole: Total, host_us: float, python: float | None) -> list[str]:
    """Whether the GPU would wait for Python."""
    needed = whole.ops * host_us * 1e-6
    lines = [
        f"host: {whole.ops:,} launches at {host_us:g} us (assumed) are {1e3 * needed:,.0f} ms, "
        f"{needed / whole.seconds:.2f} of the GPU's time on paper; above 1 the GPU waits"
    ]
    if python is not None:
        lines.append(
            f"host: Python took {1e3 * python:,.0f} ms on this CPU, {python / whole.seconds:.2f} of the GPU's time on "
            "paper: no launch was sent, and the meta device's own Python is part of it"
        )
    return lines


def assumptions(gpu: PaperGPU) -> list[str]:
    """The table of rates."""
    rows = [("assumed", "rate", "source"), *gpu.assumptions()]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return [f"{what:<{widths[0]}}  {rate:>{widths[1]}}  {source}" for what, rate, source in rows]


