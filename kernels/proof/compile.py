"""Compiles kernels without a GPU and says what each needs of one: the machinery of `kernels.compile_check`.

A kernel is compiled to a cubin in a worker process, because Triton's interpreter (TRITON_INTERPRET) is chosen for good
when a process imports Triton.
"""

import contextlib
import dataclasses
import importlib
import io
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from kernels.ops._triton import HAS_TRITON
from kernels.proof.contract import CompileSpec

# Shared memory that one block may ask for, bytes (CUDA programming guide, "opt-in" maximum per block).
SHARED_LIMIT = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448}
REGISTER_LIMIT = 255  # per thread
REGISTER_FILE = 65_536  # per block: all its threads' registers together
SPILL_BUDGET_LIMIT = 64  # a larger budget would hide a kernel that does not fit
WORKERS = os.cpu_count() or 1


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs. spills: bytes stored plus bytes loaded, as ptxas counts them in the code."""

    registers: int = 0
    shared: int = 0
    spills: int = 0
    stack: int = 0
    serialised: bool = False  # ptxas put a wait after every wgmma: correct, and slow
    error: str = ""


def complaints(spec: CompileSpec, used: Resources, target: str) -> list[str]:
    """Why this kernel does not pass; empty when it does."""
    if used.error:
        return [used.error]
    wrong = []
    if spec.spill_budget > SPILL_BUDGET_LIMIT or (spec.spill_budget and not spec.why):
        wrong.append(f"spill budget {spec.spill_budget} B: at most {SPILL_BUDGET_LIMIT} B, with the reason in `why`")
    if used.spills > spec.spill_budget:
        wrong.append(f"spills {used.spills} B, budget {spec.spill_budget} B")
    if used.serialised:
        wrong.append("ptxas serialised its wgmma: it waits after every single one")
    if used.shared > SHARED_LIMIT[target]:
        wrong.append(f"shared memory {used.shared:,} B, {target} offers {SHARED_LIMIT[target]:,} B")
    if used.registers > REGISTER_LIMIT:
        wrong.append(f"{used.registers} registers a thread, limit {REGISTER_LIMIT}")
    if used.registers * spec.num_warps * 32 > REGISTER_FILE:
        wrong.append(f"{used.registers} registers in {spec.num_warps * 32} threads, a block has {REGISTER_FILE:,}")
    return wrong


# Compiling. Everything below `_compile` runs in a worker; a spec travels with its kernel's name instead of the kernel.


def _compile(spec: CompileSpec, target: str):
    import triton
    from triton.backends.compiler import GPUTarget

    fn, arguments = spec.fn, set(spec.signature) | set(spec.constexprs)
    if arguments != set(fn.arg_names):
        odd = sorted(arguments ^ set(fn.arg_names))
        raise ValueError(f"{spec.name}: the spec and the kernel's arguments differ in {', '.join(odd)}")
    # Triton reads the signature in the kernel's own order of arguments.
    signature = {name: spec.signature.get(name, "constexpr") for name in fn.arg_names}
    pointers = {name for name, kind in signature.items() if kind.startswith("*")} - set(spec.unaligned)
    aligned = [name for name, kind in signature.items() if name in pointers or kind.endswith(":16")]
    signature = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    attributes = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = triton.compiler.ASTSource(fn, signature, dict(spec.constexprs), attributes)
    options = {name: getattr(spec, name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    return triton.compile(source, target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32), options=options)


def _ptxas_log(spec: CompileSpec, target: str, compiled) -> str:
    """What ptxas said when it made this very cubin; kept beside it in Triton's cache."""
    from triton import knobs
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(compiled.hash)
    path = cache.get_file("ptxas.log")
    if path is None:
        # Triton drops the log of a success unless it is told to print it.
        log = io.StringIO()
        with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
            knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
            _compile(spec, target)
        path = cache.put(log.getvalue(), "ptxas.log", binary=False)
    return Path(path).read_text()


def _resources(spec: CompileSpec, target: str) -> Resources:
    from triton import knobs

    compiled = _compile(spec, target)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    log = _ptxas_log(spec, target, compiled)
    count = lambda pattern, text: sum(map(int, re.findall(pattern, text)))  # noqa: E731
    return Resources(
        registers=count(r"REG:(\d+)", usage),
        shared=compiled.metadata.shared,
        spills=count(r"(\d+) bytes spill", log),
        stack=count(r"STACK:(\d+)", usage),
        serialised="serialized" in log,
    )


def _one_line(error: BaseException) -> str:
    """The innermost error: a compilation error of a called function hides behind that of its caller."""
    while error.__cause__ is not None:
        error = error.__cause__
    # Triton's messages open with "at line:column:" in the kernel, print its source and end with what is wrong.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    where = f" {lines[0]}" if lines[0].startswith("at ") else ""
    return f"{type(error).__name__}{where} {lines[-1]}"


def _in_worker(work: str, spec: CompileSpec, home: tuple[str, str], target: str):
    try:
        spec = dataclasses.replace(spec, fn=getattr(importlib.import_module(home[0]), home[1]))
        return _resources(spec, target) if work == "resources" else _compile(spec, target).asm[work]
    except Exception as error:  # whatever the compiler throws is this kernel's result, and the others go on
        return Resources(error=_one_line(error))


@contextlib.contextmanager
def _workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes (spawn, not fork) that do not inherit the interpreter's switch."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
            yield pool
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def _run(work: str, specs: list[CompileSpec], target: str) -> list:
    if not HAS_TRITON:
        raise ValueError("Triton is not installed; compiling kernels needs Linux and `pip install triton`")
    # The kernel object itself belongs to this process's Triton (perhaps the interpreter): send where it lives.
    tasks = [
        (work, dataclasses.replace(spec, fn=None), (spec.fn.fn.__module__, spec.fn.fn.__name__), target)
        for spec in specs
    ]
    results: dict[int, object] = {}
    with _workers(min(WORKERS, len(tasks))) as pool:
        futures = [pool.submit(_in_worker, *task) for task in tasks]
        for i, future in enumerate(futures):
            with contextlib.suppress(BrokenProcessPool):
                results[i] = future.result()
    for i in set(range(len(tasks))) - results.keys():
        # A crash of the compiler takes the whole pool with it; alone, each kernel answers for itself.
        with _workers(1) as pool:
            try:
                results[i] = pool.submit(_in_worker, *tasks[i]).result()
            except BrokenProcessPool:
                results[i] = Resources(error="the compiler crashed")
    return [results[i] for i in range(len(tasks))]


def compile_all(specs: list[CompileSpec], target: str = "sm_90") -> list[Resources]:
    """Compiles the specs for the target; an error is part of the kernel's result."""
    return _run("resources", specs, target) if specs else []


def machine_code(specs: list[CompileSpec], target: str = "sm_90") -> list[bytes | Resources]:
    """The specs' cubins; for one that does not compile the error, as in `compile_all`."""
    return _run("cubin", specs, target) if specs else []


def ttgir_of(spec: CompileSpec, target: str = "sm_90") -> str:
    """The kernel's TTGIR, Triton's last form in which dots and layouts still show (tests/kernels/ttgir.py)."""
    (text,) = _run("ttgir", [spec], target)
    if isinstance(text, Resources):
        raise ValueError(f"{spec.name} does not compile: {text.error}")
    return text


# Reporting


def markdown(rows: list[tuple], text_columns: tuple[int, ...]) -> str:
    """A Markdown table, its first row the heads; columns of numbers are flushed right, and all are readable as text."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    fit = [str.ljust if i in text_columns else str.rjust for i in range(len(widths))]
    lines = ["| " + " | ".join(f(str(x), w) for f, x, w in zip(fit, row, widths, strict=True)) + " |" for row in rows]
    rule = ["-" * w if i in text_columns else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])


def table(specs: list[CompileSpec], results: list[Resources], target: str) -> str:
    """A Markdown table, one line a kernel."""
    rows = [("kernel", "warps", "stages", "registers", "shared B", "spill B", "stack B", "remark")]
    for spec, used in zip(specs, results, strict=True):
        wrong = complaints(spec, used, target)
        remarks = [f"FAILS: {'; '.join(wrong)}"] if wrong else []
        remarks += [f"budget {spec.spill_budget} B: {spec.why}"] if spec.spill_budget else []
        numbers = ("-",) * 4 if used.error else (used.registers, f"{used.shared:,}", used.spills, used.stack)
        rows.append((spec.name, spec.num_warps, spec.num_stages, *numbers, "; ".join(remarks)))
    return markdown(rows, text_columns=(0, 7))
