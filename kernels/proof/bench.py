"""Times one case of an operation in every version, on a GPU: the machinery of `kernels.bench`.

Times are CUDA events around one call each. Two sets of random inputs take turns, and 1 GiB is overwritten before every
call: nothing is found in the L2, and the host is ahead of the device.
"""

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kernels.proof.check import closeness_of, shown
from kernels.proof.closeness import Case
from kernels.proof.command import versions
from kernels.proof.contract import Op, Work

DEVICE = "cuda"
REPEATS, WARMUP = 50, 5
# Below it a call is over before the timer's resolution and the launch count; such CASES are there for correctness.
MIN_BYTES = 1e7
# A peer that is used wrongly would be timed doing something else. bf16 kernels differ from fp64 by 0.2 to 0.6 %.
PEER_ERROR = 0.02


@dataclass(frozen=True)
class Ceilings:
    """Measured in this run: bytes read plus written a second by a copy, FLOPs a second by a bf16 matrix product."""

    copy: float
    gemm: float

    def seconds(self, n_bytes: int, flops: int) -> float:
        """The time below which no version gets."""
        return max(n_bytes / self.copy, flops / self.gemm)


@dataclass(frozen=True)
class Timing:
    """One line of the results. ms None: not measured, for the reason in `remark`."""

    op: str
    case: str
    direction: str
    version: str
    ms: float | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    roofline: float | None = None
    remark: str = ""


def median_ms(calls: list[Callable[[], object]], repeats: int = REPEATS) -> float:
    """The median time of one call, taking turns."""
    flush = torch.empty(2**30, dtype=torch.int8, device=DEVICE)
    for i in range(max(WARMUP, len(calls))):
        calls[i % len(calls)]()
    events = []
    for i in range(repeats):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        calls[i % len(calls)]()
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def measure_ceilings() -> Ceilings:
    source = torch.randint(-128, 127, (2**31,), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / (median_ms([lambda: target.copy_(source)], 20) / 1000)
    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    gemm = 2 * n**3 / (median_ms([lambda: a @ b], 20) / 1000)
    return Ceilings(copy, gemm)


def tensors_in(tree: object) -> Iterator[Tensor]:
    """Every tensor in nested tuples and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list | dict):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_in(part)


def calls_of(cases: list[Case], op: Callable) -> tuple[list[Callable], list[Callable]]:
    """(forward calls, backward calls): one of each for every set of inputs.

    The op is called with the very arguments that the case would give it: what a case does before the op, such as
    copying a state or cutting a strided view, is not timed.
    """
    forward, backward = [], []
    for case in cases:
        caught = []

        def catch(*args, caught=caught, **kwargs):
            caught.append((args, kwargs))
            raise _Caught

        # The case calls `catch` in place of the op, with everything prepared; the exception stops it there.
        inputs = {n: x.detach().requires_grad_(n in case.grads) for n, x in case.inputs.items()}
        with contextlib.suppress(_Caught):
            case.call(catch, inputs)
        ((args, kwargs),) = caught
        forward.append(functools.partial(op, *args, **kwargs))
        if case.grads:
            outputs = [y for y in tensors_in(forward[-1]()) if y.requires_grad]
            weights = [torch.randn(y.shape, device=y.device).to(y) for y in outputs]
            wanted = [x for x in tensors_in((args, kwargs)) if x.requires_grad]
            gradients = functools.partial(torch.autograd.grad, retain_graph=True, allow_unused=True)
            backward.append(functools.partial(gradients, outputs, wanted, weights))
    return forward, backward


class _Caught(Exception):
    """Ends a case's call once its arguments are known."""


def without_adapter(op: Op, size: dict) -> dict | None:
    """The same case without LoRA; None where it has none."""
    off = size | op.without_lora
    return None if off == size else off


def right_result(case: Case, op: Op, call: Callable) -> None:
    """AssertionError unless the peer's first output is one of the op's, to bf16's precision."""
    with torch.no_grad():
        ours, theirs = case.call(op.reference, case.inputs), next(tensors_in(call(case.inputs)))
    alike = [y.double() for y in ours.values() if y is not None and y.shape == theirs.shape]
    error = min(((theirs.double() - y).norm() / y.norm()).item() for y in alike) if alike else float("inf")
    assert error <= PEER_ERROR, f"its result is not the op's: relative error {error:.1e}"


def versions_of(op: Op, size: dict, dtype: torch.dtype) -> Iterator[tuple[str, dict, Callable]]:
    """(name, size, () -> (forward calls, backward calls)) of everything to time for one case."""

    def cases(size: dict) -> list[Case]:
        return [op.make_case(**size, device=DEVICE, dtype=dtype, seed=seed) for seed in range(2)]

    plain = without_adapter(op, size)
    yield "Triton", size, lambda: calls_of(cases(size), op.triton)
    if plain is not None:
        yield "Triton, LoRA off", plain, lambda: calls_of(cases(plain), op.triton)
    yield "torch", size, lambda: calls_of(cases(size), op.reference)
    yield "torch.compile", size, lambda: calls_of(cases(size), torch.compile(op.reference, dynamic=False))
    bare = plain or size
    for peer in op.peers:

        def prepared(peer=peer) -> tuple[list[Callable], list[Callable]]:
            if not peer.installed:
                raise AssertionError("not installed")
            call, bare_cases = peer.prepare(bare, DEVICE), cases(bare)
            right_result(bare_cases[0], op, call)
            # A peer takes the inputs as one dict.
            return calls_of([replace(case, call=lambda peer, x: peer(x)) for case in bare_cases], call)

        yield peer.name, bare, prepared


def timing(op: Op, case: str, direction: str, version: str, ms: float, work: Work, ceilings: Ceilings) -> Timing:
    forward = direction == "forward"
    n_bytes = work.forward_bytes if forward else work.backward_bytes
    flops = work.forward_flops if forward else work.backward_flops
    seconds = ms / 1000
    share = ceilings.seconds(n_bytes, flops) / seconds
    return Timing(op.name, case, direction, version, ms, n_bytes / seconds / 1e9, flops / seconds / 1e12, share)


def bench_case(op: Op, size: dict, ceilings: Ceilings) -> Iterator[Timing]:
    """All versions of one case, forward and backward."""
    dtype, case_name = op.dtypes[0], shown(size)
    try:
        closeness_of(op, size, dtype, 1, DEVICE)
    except Exception as error:  # a kernel that is wrong or does not run is refused, whatever the reason
        yield Timing(op.name, case_name, "", "Triton", remark=f"REFUSED, its check fails: {_first_line(error)}")
        return
    for version, of, prepare in versions_of(op, size, dtype):
        torch.cuda.empty_cache()
        try:
            timed = dict(zip(("forward", "backward"), prepare(), strict=True))
            results = {direction: median_ms(calls) for direction, calls in timed.items() if calls}
        except Exception as error:  # not installed, not for this GPU, too little memory: this version's result
            yield Timing(op.name, case_name, "", version, remark=f"not measured: {_first_line(error)}")
            continue
        for direction, ms in results.items():
            # Filed under the case it is compared in, also without its adapter.
            yield timing(op, case_name, direction, version, ms, op.work(**of), ceilings)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:160]}"


def worth_timing(op: Op) -> list[dict]:
    """The cases that move enough bytes."""
    return [size for size in op.cases if op.work(**size).forward_bytes >= MIN_BYTES]


# Reporting


def table(rows: list[Timing]) -> str:
    lines = [f"{'version':<24} {'':<9} {'ms':>9} {'GB/s':>8} {'TFLOP/s':>8} {'roofline':>9} {'Triton is':>10}"]
    for op, case in dict.fromkeys((row.op, row.case) for row in rows):
        of_case = [row for row in rows if (row.op, row.case) == (op, case)]
        triton_ms = {row.direction: row.ms for row in of_case if row.version == "Triton"}
        lines.append(f"{op}: {case}")
        for row in of_case:
            if row.ms is None:
                lines.append(f"  {row.version:<22} {row.remark}")
                continue
            ratio = f"{row.ms / triton_ms[row.direction]:.2f} x" if triton_ms.get(row.direction) else ""
            numbers = f"{row.ms:>9.3f} {row.gb_s:>8.0f} {row.tflop_s:>8.1f} {row.roofline:>9.1%}"
            lines.append(f"  {row.version:<22} {row.direction:<9} {numbers} {ratio:>10}")
    return "\n".join(lines)


def plot(rows: list[Timing], folder: Path, title: str) -> list[Path]:
    """One PNG an op: a bar for every version and direction of every case, in ms."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for op in dict.fromkeys(row.op for row in rows if row.ms is not None):
        bars = [row for row in rows if row.op == op and row.ms is not None]
        figure, axes = pyplot.subplots(figsize=(9, 1 + 0.32 * len(bars)))
        colours = ["#1d4ed8" if row.version.startswith("Triton") else "#94a3b8" for row in bars]
        axes.barh(range(len(bars)), [row.ms for row in bars], color=colours)
        axes.set_yticks(range(len(bars)), [f"{row.version}, {row.direction}\n{row.case}" for row in bars], fontsize=6)
        numbers = [f"{row.ms:.3f} ms, {row.roofline:.0%}" for row in bars]
        axes.bar_label(axes.containers[0], numbers, fontsize=6, padding=2)
        axes.invert_yaxis()
        axes.set(xlabel="ms (median); share of the roofline", title=f"{op} on {title}")
        figure.tight_layout()
        written.append(folder / f"{op}.png")
        figure.savefig(written[-1], dpi=150)
        pyplot.close(figure)
    return written


def document(rows: list[Timing], ceilings: Ceilings | None) -> dict:
    """What the last line of stdout and --json hold."""
    measured = {"copy_gb_s": ceilings.copy / 1e9, "gemm_tflop_s": ceilings.gemm / 1e12} if ceilings else {}
    return {**versions(), **measured, "rows": [asdict(row) for row in rows]}
