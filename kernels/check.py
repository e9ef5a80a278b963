"""Proves every Triton kernel on the GPU at hand: one command, a table, an exit code.

    python -m kernels.check [--op NAME ...] [--seeds N] [--json FILE]

Every op shows what its file offers (kernels/proof/protocol.py): all CASES, the 27B sizes among them, in bf16 and in
fp32, with several seeds; every output and gradient against the reference in fp64, over memory that was filled with NaN;
twice, the same bits; every mutant rejected by at least one case. Then what the two hard kernels owe beyond that:
attention at awkward lengths no worse than torch's flash kernel, and documents that change places keep their bits.

fp32 stands for the logic, bf16 for what training runs. Where a case is more than FP32_FLOPS of arithmetic it runs in
bf16 alone: its fp32 kernels are not meant for that size, and 1e-5 would measure the length of the sums. The fp64
references run at full size on the same GPU; the largest, the 27B head with 2,048 rows, needs about 40 GB (arithmetic).
Without a GPU the small cases run in Triton's interpreter, in fp32. Exit code 0: everything held.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.compile_check import write_json as write_json
from kernels.ops._triton import HAS_TRITON, triton
from kernels.proof.closeness import Case, assert_close_bf16, assert_close_fp32, poisoned_empty
from kernels.proof.registry import Offer, offers, plain_peer, torch_flash_attention

FP32_FLOPS = 2e10
# What the interpreter can do in seconds: it needs about 3.6 ms a program.
INTERPRETER_BYTES, INTERPRETER_FLOPS = 8e6, 1e9
ATTENTION_LENGTHS = (1, 63, 64, 65, 127, 128, 129, 650, 4096)


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


def run(
    case: Case, op: Callable, dtype: torch.dtype | None = None, cotangents: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """As closeness.outputs_and_gradients, but nothing large is drawn on the host: at 27B sizes that is most of the
    time. cotangents: the outputs' weights by name, else drawn on the device, the same for every dtype.
    """
    inputs = {name: x.to(dtype) if dtype and x.is_floating_point() else x.clone() for name, x in case.inputs.items()}
    for name in case.grads:
        inputs[name].requires_grad_()
    outputs = {name: y for name, y in case.call(op, inputs).items() if y is not None}
    results = {name: y.detach() for name, y in outputs.items()}
    if case.grads:
        weights = cotangents or draw_cotangents(results)
        wanted = [inputs[name] for name in case.grads]
        grads = torch.autograd.grad(
            list(outputs.values()), wanted, [weights[n].to(y) for n, y in outputs.items()], allow_unused=True
        )
        for name, x, g in zip(case.grads, wanted, grads, strict=True):
            results["d" + name] = torch.zeros_like(x) if g is None else g
    return results


def draw_cotangents(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Normal weights that bf16 holds exactly, so that every precision is weighed with the same numbers."""
    generator = torch.Generator(next(iter(outputs.values())).device).manual_seed(0)
    return {
        name: torch.randn(y.shape, generator=generator, device=y.device, dtype=torch.float32).bfloat16()
        for name, y in outputs.items()
    }


def _same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"two runs differ in {', '.join(different)}"


def _quietly(check: Callable, *args) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        check(*args)


def _stack(runs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}


def _worst_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    worst = 0.0
    for name, x in expected.items():
        x = x.double()
        size = x.square().mean().sqrt().item()
        worst = max(worst, (actual[name].double() - x).square().mean().sqrt().item() / size) if size else worst
    return worst


def closeness_of(
    found: Offer, size: dict, dtype: torch.dtype, seeds: int, device: str, plain: Callable | None = None
) -> float:
    """Raises AssertionError unless the case holds; returns the worst error. All seeds are judged together, because
    the error of a single number (a loss, a document of one token) is luck.
    """
    actual, again, rounded, expected = [], [], [], []
    for seed in range(seeds):
        case = found.make_case(**size, device=device, dtype=dtype, seed=seed)
        expected.append(run(case, found.reference, torch.float64))
        with poisoned_empty():
            actual.append(run(case, found.triton))
            again.append(run(case, found.triton))
        if dtype != torch.float32:
            rounded.append(run(case, plain or plain_peer(found)))
    actual, expected = _stack(actual), _stack(expected)
    if rounded:
        _quietly(assert_close_bf16, actual, _stack(rounded), expected)
    else:
        _quietly(assert_close_fp32, actual, expected)
    _same_bits(actual, _stack(again))
    return _worst_error(actual, expected)


def mutant_rejected(found: Offer, mutant: str, sizes: list[dict], device: str) -> str:
    """Which case rejects the mutant; AssertionError if none does."""
    crashes = []
    for size in sizes:
        case = found.make_case(**size, device=device, dtype=torch.float32, seed=0)
        expected = run(case, found.reference, torch.float64)
        try:
            actual = run(case, found.mutants[mutant])
        except Exception as error:  # a mutant may not fit every case; a crash proves nothing about the comparison
            crashes.append(str(error))
            continue
        try:
            _quietly(assert_close_fp32, actual, expected)
        except AssertionError:
            return case.name
    raise AssertionError(f"mutant accepted by all {len(sizes)} cases ({len(crashes)} crashed)")


def permuted_documents(found: Offer, size: dict, dtype: torch.dtype, device: str) -> None:
    """The documents in another order: the same bits for each of them, outputs and gradients."""
    lengths = size["lengths"]
    order = [*range(1, len(lengths), 2), *range(0, len(lengths), 2)][::-1]
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    rows = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in order]).to(device)
    by_size = {sum(lengths): rows, len(lengths): torch.tensor(order, device=device)}

    def permute(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: x if n in WEIGHTS else x.index_select(0, by_size[len(x)]) for n, x in tensors.items()}

    case = found.make_case(**size, device=device, dtype=dtype)
    other = found.make_case(**size | {"lengths": type(lengths)(lengths[i] for i in order)}, device=device, dtype=dtype)
    other = dataclasses.replace(other, inputs=permute(case.inputs))
    with torch.no_grad():
        weights = draw_cotangents({n: y for n, y in case.call(found.triton, case.inputs).items() if y is not None})
    with poisoned_empty():
        first = run(case, found.triton, cotangents=weights)
        second = run(other, found.triton, cotangents=permute(weights))
    _same_bits(permute(first), second)


# Inputs that do not belong to tokens or documents.
WEIGHTS = ("weight", "A_log", "dt_bias")


# Everything that has to be shown, as (row without its result, what to run)


def is_small(found: Offer, size: dict) -> bool:
    work = found.work(**size)
    return work.forward_bytes <= INTERPRETER_BYTES and work.forward_flops <= INTERPRETER_FLOPS


def tasks(found: Offer, seeds: int, device: str) -> Iterator[tuple[str, str, Callable]]:
    """(case, dtype, what to run) of one op. `what to run` returns an error, a remark or None, or raises."""
    small = sorted((size for size in found.cases if is_small(found, size)), key=lambda size: found.work(**size))
    sizes = small if device == "cpu" else found.cases
    for dtype in (torch.float32,) if device == "cpu" else found.dtypes:
        for size in sizes:
            if dtype == torch.float32 and found.work(**size).forward_flops > FP32_FLOPS:
                continue
            yield shown(size), _name(dtype), functools.partial(closeness_of, found, size, dtype, seeds, device)
    every = small + [size for size in found.cases if size not in small and device != "cpu"]
    for mutant in found.mutants:
        rejecting = functools.partial(mutant_rejected, found, mutant, every, device)
        yield f"mutant: {mutant}", "float32", rejecting
    yield from _gates(found, seeds, device)


def _gates(found: Offer, seeds: int, device: str) -> Iterator[tuple[str, str, Callable]]:
    """What single ops owe beyond their CASES."""
    if found.op == "causal_attention" and device != "cpu":
        for length in ATTENTION_LENGTHS:
            for logits in (1.0, 8.0):
                size = {"lengths": [length], "heads": 24, "kv_heads": 4, "head_dim": 256, "logits": logits}
                arguments = (found, size, torch.bfloat16, seeds, device, torch_flash_attention)
                against = functools.partial(closeness_of, *arguments)
                yield f"against torch's flash: {length} tokens, logits x {logits:g}", "bfloat16", against
    for size in PERMUTED.get((found.op, device == "cpu"), ()):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        permuted = functools.partial(permuted_documents, found, size, dtype, device)
        yield f"documents permuted: {shown(size)}", _name(dtype), permuted


_ATTENTION_27B = {"heads": 24, "kv_heads": 4, "head_dim": 256}
_DELTA_27B = {"key_heads": 16, "value_heads": 48, "dk": 128, "dv": 128}
# (op, in the interpreter) -> documents whose order must not matter.
PERMUTED = {
    ("causal_attention", False): ({"lengths": [1, 63, 64, 65, 127, 128, 129, 650, 2048], **_ATTENTION_27B},),
    ("gated_delta_rule", False): ({"lengths": (1, 63, 64, 65, 127, 128, 129, 650, 2048), **_DELTA_27B},),
    ("causal_conv1d_silu", False): ({"lengths": (1, 2, 3, 63, 650, 1024), "splits": (2048, 2048, 6144)},),
    ("causal_attention", True): ({"lengths": [1, 3, 66], "heads": 2, "kv_heads": 1, "head_dim": 64},),
    ("gated_delta_rule", True): ({"lengths": (1, 3, 66), "key_heads": 1, "value_heads": 2},),
    ("causal_conv1d_silu", True): ({"lengths": (1, 3, 66), "splits": (32, 32, 100)},),
}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shown(size: dict) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in size.items())


def _short(value: object) -> str:
    return f"{len(value)} of {sum(value):,}" if isinstance(value, list | tuple) and len(value) > 9 else str(value)


def check_op(found: Offer, seeds: int, device: str) -> Iterator[Row]:
    """The rows of one op, as they come."""
    for case, dtype, task in tasks(found, seeds, device):
        began, error = time.perf_counter(), None
        try:
            outcome = task()
            error = outcome if isinstance(outcome, float) else None
            result = f"ok, by {outcome}" if isinstance(outcome, str) else "ok"
        except Exception as problem:  # a kernel that does not compile or run is this row's result; the others go on
            first = (str(problem).strip() or "no message").splitlines()[0]
            result = first if isinstance(problem, AssertionError) else f"{type(problem).__name__}: {first}"
        if device != "cpu":
            torch.cuda.empty_cache()
        yield Row(found.op, case, dtype, error, result, time.perf_counter() - began)


# The command


def table(rows: Iterable[Row]) -> str:
    """One line an op: how many checks held; below it every one that did not."""
    rows = list(rows)
    lines = [f"{'op':<22} {'checks':>6} {'failed':>6} {'worst fp32':>11} {'worst bf16':>11} {'seconds':>8}"]
    for op in dict.fromkeys(row.op for row in rows):
        mine = [row for row in rows if row.op == op]
        worst = [
            max((row.error for row in mine if row.dtype == dtype and row.error is not None), default=None)
            for dtype in ("float32", "bfloat16")
        ]
        shown = ["-" if error is None else f"{error:.1e}" for error in worst]
        failed, seconds = sum(not row.ok for row in mine), sum(row.seconds for row in mine)
        lines.append(f"{op:<22} {len(mine):>6} {failed:>6} {shown[0]:>11} {shown[1]:>11} {seconds:>8.1f}")
    lines += [f"FAILED {row.op}, {row.case}, {row.dtype}: {row.result}" for row in rows if not row.ok]
    return "\n".join(lines)


def in_interpreter(module: str, arguments: list[str]) -> int:
    """Runs this command again in a process that has chosen Triton's interpreter before it imports Triton."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.call([sys.executable, "-m", module, *arguments], env=environment)


def versions() -> dict[str, str | None]:
    """What a result depends on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}


def main() -> int:
    parser = argparse.ArgumentParser(prog="kernels.check", description="Prove every Triton kernel on this GPU.")
    parser.add_argument("--op", nargs="+", metavar="NAME", help="operations; all when absent")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="random inputs a case (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all rows there")
    args = parser.parse_args()
    try:
        if not HAS_TRITON:
            raise ValueError("Triton is not installed; it needs Linux and `pip install triton`")
        if args.seeds < 1:
            raise ValueError(f"--seeds {args.seeds}: expected 1 or more")
        if args.json and not args.json.parent.is_dir():
            raise ValueError(f"--json {args.json}: the folder {args.json.parent} does not exist; create it first")
        chosen = offers(args.op)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return in_interpreter("kernels.check", sys.argv[1:])
    if device == "cpu":
        print("no GPU: the small cases run in Triton's interpreter, fp32, one seed; bf16 and the 27B sizes are not run")
    rows = []
    for found in chosen:
        for row in check_op(found, args.seeds if device == "cuda" else 1, device):
            rows.append(row)
            error = "" if row.error is None else f"{row.error:.1e}"
            print(f"{row.op:<22} {row.dtype:<9} {row.seconds:6.1f} s {error:>8}  {row.case}: {row.result}", flush=True)
    failed = sum(not row.ok for row in rows)
    print(f"\n{table(rows)}\n{len(rows)} checks on {versions()['gpu'] or 'the interpreter'}, {failed} failed")
    if args.json:
        results = [dataclasses.asdict(row) for row in rows]
        write_json(args.json, {**versions(), "seeds": args.seeds, "failed": failed, "rows": results})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
