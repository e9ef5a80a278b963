"""The tasks of each stage of benchmarks/prove.py, most important first. Without a GPU the same tasks run on paper.

kernels and Triton are imported inside the functions, because a process chooses Triton's
interpreter, for good, when it imports Triton.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.prove import ROOT
from benchmarks.prove_child import NotMeasured, Task, on_paper, one_line

# By the work in a step, and by how much their kernels can go wrong.
MOST_IMPORTANT = ("causal_attention", "gated_delta_rule", "residual_rms_norm", "qk_norm_rope", "linear_cross_entropy")
PACKAGES = ("triton", "numpy", "transformers", "peft", "flash-linear-attention", "liger-kernel", "bitsandbytes")
SEEDS = 3  # random inputs of a small case; of a 27B case one shows as much
BASELINE_REPEATS = 10


def _operations() -> list:
    from kernels.proof.registry import OPERATIONS

    order = {name: i for i, name in enumerate(MOST_IMPORTANT)}
    return sorted(OPERATIONS, key=lambda op: order.get(op.name, len(order)))


# The stages


def environment() -> list[Task]:
    return [Task("versions", _versions), Task("ceilings", _ceilings)]


def _versions() -> dict:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if not on_paper():
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        versions["gpu"] = torch.cuda.get_device_name()
        # Some containers have the GPU without this program; nothing else depends on it.
        with contextlib.suppress(OSError):
            versions["nvidia-smi"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    listed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return {"versions": versions, "reason": listed}


@functools.cache
def _measured_ceilings():
    from kernels.proof.bench import measure_ceilings

    return measure_ceilings()


def _ceilings() -> dict:
    if on_paper():
        raise NotMeasured("no GPU")
    ceilings = _measured_ceilings()
    return {"numbers": {"copy GB/s": ceilings.copy / 1e9, "bf16 matrix product TFLOP/s": ceilings.gemm / 1e12}}


def compile_launches() -> list[Task]:
    """Everything that real steps launch, into Triton's cache: later stages find it there."""
    main_kernels, others = _operations()[:2], _operations()[2:]
    return [
        Task("kernels of attention and delta rule", functools.partial(_compile, main_kernels)),
        Task("all other kernels", functools.partial(_compile, others)),
    ]


def _compile(ops: list) -> dict:
    from kernels.proof.compile import SHARED_LIMIT, machine_code

    target = "sm_90"
    if not on_paper():
        here = "sm_{}{}".format(*torch.cuda.get_device_capability())
        target = here if here in SHARED_LIMIT else target
    specs = [spec for op in ops for spec in op.compile_specs()]
    codes = machine_code(specs, target)
    wrong = [f"{s.name}: {code.error}" for s, code in zip(specs, codes, strict=True) if not isinstance(code, bytes)]
    assert not wrong, "; ".join(wrong)
    return {"reason": f"{len(specs)} kernels for {target}"}


def check() -> list[Task]:
    """Every operation once, in the dtype of training: its 27B case, on paper its smallest case."""
    if on_paper():
        os.environ["TRITON_INTERPRET"] = "1"
    return [Task(op.name, functools.partial(_check, op)) for op in _operations()]


def _check(op) -> dict:
    from kernels.proof.check import closeness_of, is_small, shown

    size, seeds, device = op.cases[0], 1, "cuda"
    if on_paper():
        size = min(filter(functools.partial(is_small, op), op.cases), key=lambda size: op.work(**size))
        seeds, device = SEEDS, "cpu"
    error = closeness_of(op, size, op.dtypes[0], seeds, device)
    return {"reason": shown(size), "numbers": {"relative error": error}}


def bench() -> list[Task]:
    """Every kernel on paper against measured; then one baseline of each operation."""
    tasks = [Task(op.name, functools.partial(_bench, op)) for op in _operations()]
    return tasks + ([] if on_paper() else [Task(*_baseline(op)) for op in _operations()])


def _bench(op) -> dict:
    from kernels.proof import bench
    from kernels.proof.check import shown

    size = op.cases[0]
    if on_paper():
        return {"reason": shown(size), "kernels": predicted(op, size)}
    row, calls = _timed(op, "Triton", bench.REPEATS)
    try:
        row["kernels"] = predicted(op, size)
    except Exception as error:  # what was measured counts without a prediction
        return row | {"reason": f"{shown(size)}; no prediction: {one_line(error)}"}
    for direction, of_direction in calls.items():
        set_measured(row["kernels"], direction, _profiled(of_direction[0]))
    return row | {"reason": shown(size)}


def _baseline(op) -> tuple[str, Callable[[], dict]]:
    """An installed peer's kernel, or plain PyTorch; never torch.compile, which takes minutes for some references."""
    version = next((peer.name for peer in op.peers if peer.installed), "torch")
    return f"{op.name}, {version}", lambda: _timed(op, version, BASELINE_REPEATS)[0]


def _timed(op, version: str, repeats: int) -> tuple[dict, dict[str, list[Callable]]]:
    """(what was measured of one version, its calls by direction)."""
    from kernels.proof import bench
    from kernels.proof.check import shown

    versions = {name: (size, prepare) for name, size, prepare in bench.versions_of(op, op.cases[0], op.dtypes[0])}
    size, prepare = versions[version]
    calls = {name: c for name, c in zip(("forward", "backward"), prepare(), strict=True) if c}
    work, ceilings, case = op.work(**size), _measured_ceilings(), shown(size)
    times = [
        bench.timing(op, case, direction, version, bench.median_ms(of_direction, repeats), work, ceilings)
        for direction, of_direction in calls.items()
    ]
    numbers = {f"{time.direction} ms": time.ms for time in times}
    numbers |= {f"{time.direction} share of roofline": time.roofline for time in times}
    return {"numbers": numbers, "times": [dataclasses.asdict(time) for time in times]}, calls


def predicted(op, size: dict) -> list[dict]:
    """Every kernel of one call, forward and backward: direction, name, function, paper_us (psysafe/training/paper/)."""
    from kernels.proof.bench import calls_of
    from psysafe.training.paper.rates import PaperGPU
    from psysafe.training.paper.trace import record
    from psysafe.training.roofline import context

    name = "H200" if not on_paper() and "H200" in torch.cuda.get_device_name() else "H100"
    gpu = PaperGPU(name, context(size.get(op.lengths, [1])))
    case = op.make_case(**size, device="meta", dtype=op.dtypes[0], seed=0)
    with record() as trace:
        forward, backward = calls_of([case], op.triton)
        before = len(trace.ops)  # a backward pass needs a forward one first
        forward[0]()
        between = len(trace.ops)
        for call in backward:
            call()
    kernels: dict[tuple[str, str], dict] = {}
    for i, kernel in enumerate(trace.ops[before:], before):
        direction = "forward" if i < between else "backward"
        function = kernel.launch.variant.kernel.partition(":")[2] if kernel.launch else ""
        entry = {"direction": direction, "name": kernel.name, "function": function, "paper_us": 0.0}
        kernels.setdefault((direction, kernel.name), entry)["paper_us"] += 1e6 * gpu.seconds(kernel)
    return list(kernels.values())


def _profiled(call: Callable) -> dict[str, float]:
    """Microseconds on the GPU of every kernel of one call, by the kernel's name."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total for event in profiler.key_averages()}


def set_measured(kernels: list[dict], direction: str, times: dict[str, float]) -> None:
    """Adds measured_us to Triton's kernels; torch's own have other names there than on paper."""
    for kernel in kernels:
        if kernel["direction"] == direction and kernel["function"] in times:
            kernel["measured_us"] = times[kernel["function"]]


def step() -> list[Task]:
    """A training step of ours and of every peer that is installed; on paper of the small model on the CPU."""
    from benchmarks.baselines import CONTENDERS

    return [Task(name, functools.partial(_step, name, contender)) for name, contender in CONTENDERS.items()]


def _step(name: str, contender) -> dict:
    from benchmarks import step

    if reason := contender.missing("cpu" if on_paper() else "cuda"):
        raise NotMeasured(reason)
    sizes = ["--layers", "8", "--warmups", "2", "--steps", "3"]
    if on_paper():
        sizes = ["--device", "cpu", "--layers", "4", "--tokens", "1x32", "--warmups", "0", "--steps", "1"]
    (task,) = step.entries(step.parse(["--arm", name, "--checkpointing", "off", *sizes]))
    with tempfile.TemporaryDirectory() as folder:
        result = step.run(task, Path(folder))
    assert "failed" not in result, result.get("failed")
    numbers = {key: result[key] for key in ("seconds", "tokens_per_s", "mfu", "peak", "launches") if key in result}
    return {"reason": f"{task.layers} layers, {task.lengths} tokens", "numbers": numbers, "step": result}


def generate() -> list[Task]:
    """Prefill and decoding; random weights on a GPU, where nothing has to be downloaded."""
    if on_paper():
        return [Task("bundled model", functools.partial(_generate, "assets:tiny", []))]
    model = "random:{}/configs/qwen3.5-{}-architecture.json"
    return [
        Task("0.8B", functools.partial(_generate, model.format(ROOT, "0.8b"), ["transformers"])),
        Task("27B", functools.partial(_generate, model.format(ROOT, "27b"), [])),
    ]


def _generate(model: str, peers: list[str]) -> dict:
    from benchmarks import generate

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "generate.json"
        options = ["--batch", "8", "--work", "batch", "--new-tokens", "16", "--repeats", "1", "--peers", *peers]
        generate.main(["--model", model, "--out", str(out), *options])
        results = json.loads(out.read_text())["results"]
    numbers = {f"{row['by']} {key} tokens/s": row[key] for row in results for key in ("prefill", "decode")}
    return {"numbers": numbers, "generation": results}


def rest() -> list[Task]:
    """All that kernels.check shows beyond the stage `check`; on paper one case in fp32 and one mutant an operation."""
    if on_paper():
        os.environ["TRITON_INTERPRET"] = "1"
    from kernels.proof.check import tasks

    device = "cpu" if on_paper() else "cuda"
    queues = []
    for op in _operations():
        queue = [Task(f"{op.name}, {dtype}, {case}", _checked(run)) for case, dtype, run in tasks(op, SEEDS, device)]
        if on_paper():
            ways = (f"{op.name}, float32, ", f"{op.name}, float32, mutant")
            queue = [next(task for task in queue if task.name.startswith(way)) for way in ways]
        queues.append(queue)
    # In turn: if the time does not suffice for all, every operation has had some.
    return [task for round in itertools.zip_longest(*queues) for task in round if task]


def _checked(run: Callable[[], float | str | None]) -> Callable[[], dict]:
    def checked() -> dict:
        outcome = run()
        return {"numbers": {"relative error": outcome}} if isinstance(outcome, float) else {"reason": outcome or ""}

    return checked
