"""What has to hold for a Triton kernel, as tasks that `kernels.check` runs one after the other.

A check knows an operation by its record alone (kernels/proof/contract.py).
"""

import contextlib
import dataclasses
import functools
import io
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.proof.closeness import (
    assert_close_bf16,
    assert_close_fp32,
    draw_cotangents,
    outputs_and_gradients,
    poisoned_empty,
)
from kernels.proof.contract import Op

FP32_FLOPS = 2e10
# What the interpreter can do in seconds: it needs about 3.6 ms a program.
INTERPRETER_BYTES, INTERPRETER_FLOPS = 8e6, 1e9


@dataclass(frozen=True)
class Row:
    """One line of the table. error: worst relative RMS error against fp64; result: "ok" or what went wrong."""

    op: str
    case: str
    dtype: str
    error: float | None
    result: str
    seconds: float

    @property
    def ok(self) -> bool:
        return self.result.startswith("ok")


def _same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"two runs differ in {', '.join(different)}"


def _quietly(check: Callable, *args) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        check(*args)


def _stack(runs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([results[name] for results in runs]) for name in runs[0]}


def _worst_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    worst = 0.0
    for name, x in expected.items():
        x = x.double()
        size = x.square().mean().sqrt().item()
        worst = max(worst, (actual[name].double() - x).square().mean().sqrt().item() / size) if size else worst
    return worst


def _launches(device: str, backwards: bool = False) -> contextlib.AbstractContextManager:
    """How kernels run on this device: as they are on a GPU, on a CPU in Triton's interpreter made strict."""
    if device != "cpu":
        return contextlib.nullcontext()
    # Not at the top of the file: where Triton is not installed, the other checks still import.
    from kernels.proof.interpreter import strict_interpreter

    return strict_interpreter(backwards)


def closeness_of(
    op: Op, size: dict, dtype: torch.dtype, seeds: int, device: str, plain: Callable | None = None
) -> float:
    """Raises AssertionError unless the case holds; returns the worst error. All seeds are judged together, because
    the error of a single number (a loss, a document of one token) is luck. `plain`: what the result must not be worse
    than, in fp32 as well.
    """
    actual, again, rounded, expected = [], [], [], []
    for seed in range(seeds):
        case = op.make_case(**size, device=device, dtype=dtype, seed=seed)
        expected.append(outputs_and_gradients(case, op.reference, torch.float64))
        with poisoned_empty(), _launches(device):
            actual.append(outputs_and_gradients(case, op.triton))
        # A second run has to give the same bits: a race or an atomic addition would show here.
        with poisoned_empty(), _launches(device, backwards=True):
            again.append(outputs_and_gradients(case, op.triton))
        if dtype != torch.float32 or plain:
            rounded.append(outputs_and_gradients(case, plain or op.plain or op.reference))
    actual, expected = _stack(actual), _stack(expected)
    # bf16 against plain PyTorch's own rounding error; fp32 has none worth that name, so a fixed bound unless asked.
    if rounded:
        _quietly(assert_close_bf16, actual, _stack(rounded), expected)
    else:
        _quietly(assert_close_fp32, actual, expected)
    _same_bits(actual, _stack(again))
    return _worst_error(actual, expected)


def mutant_rejected(op: Op, mutant: str, sizes: list[dict], device: str) -> str:
    """Which case rejects the mutant; AssertionError if none does."""
    crashes = []
    for size in sizes:
        case = op.make_case(**size, device=device, dtype=torch.float32, seed=0)
        expected = outputs_and_gradients(case, op.reference, torch.float64)
        try:
            actual = outputs_and_gradients(case, op.mutants[mutant])
        except Exception as error:  # a mutant may not fit every case; a crash proves nothing about the comparison
            crashes.append(str(error))
            continue
        try:
            _quietly(assert_close_fp32, actual, expected)
        except AssertionError:
            return shown(size)
    raise AssertionError(f"mutant accepted by all {len(sizes)} cases ({len(crashes)} crashed)")


def permuted_documents(op: Op, size: dict, dtype: torch.dtype, device: str) -> None:
    """The documents in another order: the same bits for each of them, outputs and gradients."""
    lengths = size[op.lengths]
    # The odd ones, then the even ones, backwards: no document keeps its place.
    order = [*range(1, len(lengths), 2), *range(0, len(lengths), 2)][::-1]
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    tokens = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in order]).to(device)
    documents = torch.tensor(order, device=device)

    def permute(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs, outputs or gradients ("d" + name), each by its own kind of row."""
        by_document = {*op.by_document, *("d" + name for name in op.by_document)}
        return {
            name: x if name in op.weights else x.index_select(0, documents if name in by_document else tokens)
            for name, x in tensors.items()
        }

    case = op.make_case(**size, device=device, dtype=dtype)
    permuted = size | {op.lengths: type(lengths)(lengths[i] for i in order)}
    other = dataclasses.replace(op.make_case(**permuted, device=device, dtype=dtype), inputs=permute(case.inputs))
    # The same random weights for both orders, permuted like the outputs they multiply.
    with torch.no_grad():
        weights = draw_cotangents({n: y for n, y in case.call(op.triton, case.inputs).items() if y is not None})
    with poisoned_empty(), _launches(device):
        first = outputs_and_gradients(case, op.triton, cotangents=weights)
        second = outputs_and_gradients(other, op.triton, cotangents=permute(weights))
    _same_bits(permute(first), second)


# Everything that has to be shown, as (row without its result, what to run)


def is_small(op: Op, size: dict) -> bool:
    work = op.work(**size)
    return work.forward_bytes <= INTERPRETER_BYTES and work.forward_flops <= INTERPRETER_FLOPS


def tasks(op: Op, seeds: int, device: str) -> Iterator[tuple[str, str, Callable]]:
    """(case, dtype, what to run) of one op. `what to run` returns an error, a remark or None, or raises."""
    small = sorted((size for size in op.cases if is_small(op, size)), key=lambda size: op.work(**size))
    sizes = small if device == "cpu" else op.cases
    for dtype in op.dtypes:
        # The bound of fp32 is fixed, so that more seeds show little: not worth the interpreter's time.
        n = 1 if device == "cpu" and dtype == torch.float32 else seeds
        for size in sizes:
            if dtype == torch.float32 and op.work(**size).forward_flops > FP32_FLOPS:
                continue
            yield shown(size), _name(dtype), functools.partial(closeness_of, op, size, dtype, n, device)
    # Small cases first: most mutants fail there, in a fraction of a second.
    every = small + [size for size in op.cases if size not in small and device != "cpu"]
    for mutant in op.mutants:
        rejecting = functools.partial(mutant_rejected, op, mutant, every, device)
        yield f"mutant: {mutant}", "float32", rejecting
    for baseline in op.baselines if device != "cpu" else ():
        against = functools.partial(closeness_of, op, baseline.size, torch.bfloat16, seeds, device, baseline.op)
        yield f"against {baseline.title}: {shown(baseline.size)}", "bfloat16", against
    for size in op.permuted:
        if device != "cpu" or is_small(op, size):
            dtype = torch.float32 if device == "cpu" else torch.bfloat16
            permuted = functools.partial(permuted_documents, op, size, dtype, device)
            yield f"documents permuted: {shown(size)}", _name(dtype), permuted


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shown(size: dict) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in size.items())


def _short(value: object) -> str:
    return f"{len(value)} of {sum(value):,}" if isinstance(value, list | tuple) and len(value) > 9 else str(value)


def check_op(op: Op, seeds: int, device: str) -> Iterator[Row]:
    """The rows of one op, as they come."""
    for case, dtype, task in tasks(op, seeds, device):
        began, error = time.perf_counter(), None
        try:
            outcome = task()
            error = outcome if isinstance(outcome, float) else None
            result = f"ok, by {outcome}" if isinstance(outcome, str) else "ok"
        except Exception as problem:  # a kernel that does not compile or run is this row's result; the others go on
            first = (str(problem).strip() or "no message").splitlines()[0]
            result = first if isinstance(problem, AssertionError) else f"{type(problem).__name__}: {first}"
        if device != "cpu":
            # The largest cases leave gigabytes in the allocator's cache, in blocks that fit no other case.
            torch.cuda.empty_cache()
        # One row at a time, so that a run cut off by its time limit has printed all it did.
        yield Row(op.name, case, dtype, error, result, time.perf_counter() - began)


def table(rows: Iterable[Row]) -> str:
    """One line an op: how many checks held; below it every one that did not."""
    rows = list(rows)
    lines = [f"{'op':<22} {'checks':>6} {'failed':>6} {'worst fp32':>11} {'worst bf16':>11} {'seconds':>8}"]
    for op in dict.fromkeys(row.op for row in rows):
        of_op = [row for row in rows if row.op == op]
        worst = [
            max((row.error for row in of_op if row.dtype == dtype and row.error is not None), default=None)
            for dtype in ("float32", "bfloat16")
        ]
        shown = ["-" if error is None else f"{error:.1e}" for error in worst]
        failed, seconds = sum(not row.ok for row in of_op), sum(row.seconds for row in of_op)
        lines.append(f"{op:<22} {len(of_op):>6} {failed:>6} {shown[0]:>11} {shown[1]:>11} {seconds:>8.1f}")
    lines += [f"FAILED {row.op}, {row.case}, {row.dtype}: {row.result}" for row in rows if not row.ok]
    return "\n".join(lines)
