"""A trace as a picture: kinds of work over time, live memory beneath; as SVG, as a page, as Chrome's trace.

All times are on paper (rates.py).
"""

import html
import json
from collections.abc import Iterator
from itertools import groupby

from psysafe.training.paper.rates import KINDS, PaperGPU, kind
from psysafe.training.paper.trace import Op, Trace

COLORS = {
    "GEMM": "#2563eb", "attention": "#db2777", "delta rule": "#ea580c", "elementwise": "#0d9488", "loss": "#7c3aed",
    "sums": "#a16207", "optimizer": "#dc2626", "other": "#64748b",
}  # fmt: skip
PHASE_COLORS = {"forward": "#e0f2fe", "backward": "#fef3c7", "optimizer": "#fee2e2"}
WIDTH, LEFT, RIGHT, TOP, LANE, MEMORY = 1200, 168, 20, 64, 24, 150


def events(trace: Trace, gpu: PaperGPU) -> Iterator[tuple[float, float, Op]]:
    """(start, seconds, operation), one after the other."""
    now = 0.0
    for op in trace.ops:
        seconds = gpu.seconds(op)
        yield now, seconds, op
        now += seconds


def svg(title: str, trace: Trace, gpu: PaperGPU, details: bool = False) -> str:
    """The picture. details: every operation is an element of its own, with a text that a browser shows on hover."""
    # Operations lie one after the other, as they are priced: the width of each is its time on paper.
    timeline = list(events(trace, gpu))
    total, totals = sum(seconds for _, seconds, _ in timeline), gpu.total(trace.ops, kind)
    scale = (WIDTH - LEFT - RIGHT) / total
    memory_top = TOP + LANE * len(KINDS) + 40
    height = memory_top + MEMORY + 40

    def x(seconds: float) -> float:
        return round(LEFT + seconds * scale, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" '
        'font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="16">{html.escape(title)}</text>',
    ]
    for phase, first, last in _phases(timeline):
        size = f'width="{round((last - first) * scale, 1)}" height="{memory_top + MEMORY - TOP + 24}"'
        parts.append(f'<rect x="{x(first)}" y="{TOP - 24}" {size} fill="{PHASE_COLORS[phase]}" opacity="0.6"/>')
        if (last - first) * scale > 60:
            parts.append(f'<text x="{x(first) + 4}" y="{TOP - 9}">{phase}</text>')
    for i, name in enumerate(KINDS):
        if name not in totals:
            continue
        y, work = TOP + i * LANE, totals[name]
        parts.append(f'<text x="8" y="{y + 16}">{name}</text>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 16}" text-anchor="end">{1e3 * work.seconds:,.1f} ms</text>')
        bars = [(start, seconds, op) for start, seconds, op in timeline if kind(op) == name]
        parts += _bars(bars, x, scale, y + 3, LANE - 6, COLORS[name], details)
    parts += _memory(trace, timeline, total, x, memory_top)
    end = f"{1e3 * total:,.0f} ms on paper, on one {gpu.name}: computed, not measured"
    parts.append(f'<text x="{LEFT}" y="{height - 8}">0</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{height - 8}" text-anchor="end">{end}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _phases(timeline: list) -> Iterator[tuple[str, float, float]]:
    """(phase, start, end) of stretches; recomputation happens inside the backward pass."""
    names = {"recompute": "backward"}
    for phase, group in groupby(timeline, lambda event: names.get(event[2].phase, event[2].phase)):
        stretch = list(group)
        yield phase, stretch[0][0], stretch[-1][0] + stretch[-1][1]


def _bars(bars: list, x, scale: float, y: int, height: int, color: str, details: bool) -> list[str]:
    if not details:  # one path for all: a tenth of the size
        widths = [round(max(seconds * scale, 0.1), 2) for _, seconds, _ in bars]
        path = [f"M{x(bar[0])} {y}h{width}v{height}h-{width}z" for bar, width in zip(bars, widths, strict=True)]
        return [f'<path d="{"".join(path)}" fill="{color}"/>']
    return [
        f'<rect x="{round(LEFT + start * scale, 3)}" y="{y}" width="{round(max(seconds * scale, 0.05), 3)}" '
        f'height="{height}" fill="{color}"><title>{html.escape(describe(op, seconds))}</title></rect>'
        for start, seconds, op in bars
    ]


def _memory(trace: Trace, timeline: list, total: float, x, top: int) -> list[str]:
    """The curve of live memory, above what is there all the time, and its peak."""
    scale = MEMORY / trace.peak

    def y(live: int) -> float:
        return round(top + MEMORY - live * scale, 1)

    points = [(start, op.live) for start, _, op in timeline]
    points = [(0.0, trace.fixed), *points, (total, trace.fixed)]
    curve = " ".join(f"{x(start)},{y(live)}" for start, live in points)
    peak = timeline[min(trace.peak_op, len(timeline) - 1)][0]
    fixed = f"there all the time: {trace.fixed / 1e9:.1f} GB"
    return [
        f'<text x="8" y="{top + 14}">live memory</text>',
        f'<rect x="{LEFT}" y="{y(trace.fixed)}" width="{WIDTH - LEFT - RIGHT}" height="{trace.fixed * scale:.1f}" '
        'fill="#cbd5e1"/>',
        f'<text x="{LEFT + 8}" y="{y(trace.fixed) + 18}">{fixed}</text>',
        f'<polyline points="{curve}" fill="none" stroke="#0f172a"/>',
        f'<circle cx="{x(peak)}" cy="{top}" r="4" fill="#dc2626"/>',
        f'<text x="{x(peak) + 8}" y="{top + 4}">{trace.peak / 1e9:.1f} GB, at {html.escape(trace.peak_name)}</text>',
    ]


def describe(op: Op, seconds: float) -> str:
    layer = "outside the layers" if op.layer is None else f"layer {op.layer}"
    shape = " x ".join(map(str, op.shape))
    work = f"{op.bytes / 1e6:,.1f} MB, {1e6 * seconds:,.0f} us on paper, {op.live / 1e9:.2f} GB live"
    return f"{op.name} ({op.phase}, {layer}): {shape}; {work}; {op.where}"


def page(title: str, trace: Trace, gpu: PaperGPU) -> str:
    """A page with the picture; hovering over an operation shows what it is, and the wheel makes it wider."""
    picture = svg(title, trace, gpu, details=True)
    script = (
        "let zoom = 1; const picture = document.querySelector('svg');"
        "picture.addEventListener('wheel', event => { if (!event.ctrlKey) return; event.preventDefault();"
        "zoom = Math.min(60, Math.max(1, zoom * (event.deltaY < 0 ? 1.25 : 0.8)));"
        "picture.style.width = 100 * zoom + '%'; }, {passive: false});"
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        "<style>body { margin: 0; overflow-x: auto } svg { width: 100%; min-height: 90vh }</style>\n"
        f"{picture}<p>Hover over an operation to see what it is; Ctrl and the wheel make the picture wider.</p>\n"
        f"<script>{script}</script>\n</html>\n"
    )


def chrome_trace(title: str, trace: Trace, gpu: PaperGPU) -> str:
    """For perfetto (ui.perfetto.dev) and chrome://tracing: a lane for each kind of work, and a counter of memory."""
    rows = [{"name": "process_name", "ph": "M", "pid": 0, "args": {"name": f"{title}, on paper"}}]
    rows += [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": i, "args": {"name": name}} for i, name in enumerate(KINDS)
    ]
    for start, seconds, op in events(trace, gpu):
        args = {"layer": op.layer, "phase": op.phase, "line": op.where, "shape": op.shape, "bytes": op.bytes}
        times = {"ts": 1e6 * start, "dur": 1e6 * seconds}
        args["flop"], lane = gpu.flops(op), KINDS.index(kind(op))
        rows.append({"name": op.name, "ph": "X", "pid": 0, "tid": lane, **times, "args": args})
        rows.append({"name": "live GB", "ph": "C", "pid": 0, "ts": 1e6 * start, "args": {"GB": op.live / 1e9}})
    return json.dumps({"traceEvents": rows})
