"""One arm of the step race, in a process of its own: its loss and gradients, its time and memory, where the time goes.

benchmarks/step.py starts it as `python -m benchmarks.measure TASK` with a Task as JSON.
"""

import contextlib
import importlib
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import record_function

import kernels
from benchmarks.arms import ARMS, CAP, Arm, architecture
from psysafe.model.config import ModelConfig
from psysafe.runtime import PEAKS, DeviceTime, memory_peak
from psysafe.training.roofline import SPEEDS, context, elementwise_bytes, flops_per_token, step_seconds

TURN_OVER = "turn over"


@dataclass(frozen=True)
class Task:
    arm: str
    checkpointing: bool
    device: str
    layers: int
    lengths: list[int]
    trained: int  # tokens of every document, its last ones
    warmups: int
    steps: int
    result: str  # file for what is found
    gradients: str = ""  # a file: compute loss and gradients, write these there, and time nothing
    profile: str = ""  # a file for a Chrome trace
    turns: bool = False  # wait for a line on stdin before every step


def main(task: Task) -> None:
    device = torch.device(task.device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / total))
    text = architecture(device, task.layers)
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, text["vocab_size"], (n,), generator=generator) for n in task.lengths]
    arm = ARMS[task.arm](text, tokens, task.trained, device, task.checkpointing)
    for module in arm.modules:
        importlib.import_module(module)
    before = 0 if device.type == "cuda" else resident()
    with turn(task):
        arm.load()
    if task.gradients:
        result = {"loss": arm.backward().item()}
        save_file({name: g.float().cpu().contiguous() for name, g in arm.gradients().items()}, task.gradients)
    else:
        if device.type == "cuda":  # random numbers are drawn in fp32: that is not the step's memory
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        result = timed(arm, task, device) | {"peak": memory_peak(device) - before}
        result["tokens_per_s"] = sum(task.lengths) / result["seconds"]
        if device.type == "cuda":
            result["reserved"] = torch.cuda.max_memory_reserved(device)
            result |= mfu(text, task, result["tokens_per_s"]) | {"launches": launches(arm)}
        if task.profile:
            result["profile"] = profile(arm, task, text)
    Path(task.result).write_text(json.dumps(result))


def resident() -> int:
    """Bytes of resident memory now."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


@contextlib.contextmanager
def turn(task: Task) -> Iterator[None]:
    """Waits until it is this arm's turn, and tells when that is over."""
    if task.turns:
        sys.stdin.readline()
    yield
    if task.turns:
        print(TURN_OVER, flush=True)


def timed(arm: Arm, task: Task, device: torch.device) -> dict[str, float]:
    """Medians over the steps after the warm-ups, by CUDA events or the clock, and of the process's CPU time; spreads
    are the distance between the quartiles."""
    for _ in range(task.warmups):
        with turn(task):
            arm.step()
    wall, cpu = [], []
    for _ in range(task.steps):
        with turn(task):
            start, busy = DeviceTime(device), time.process_time()
            arm.step()
            wall.append(DeviceTime(device).since(start))
            cpu.append(time.process_time() - busy)
    result = {}
    for name, x in (("seconds", wall), ("cpu_seconds", cpu)):
        low, _, high = statistics.quantiles(x, n=4) if len(x) > 1 else 3 * x
        result |= {name: statistics.median(x), f"{name}_spread": high - low}
    return result


def mfu(text: dict, task: Task, tokens_per_s: float) -> dict[str, float]:
    """Useful work alone against the data sheet's peak; nothing for a GPU without one."""
    peak = PEAKS.get(torch.cuda.get_device_name())
    share = task.trained / task.lengths[0]
    useful = flops_per_token(ModelConfig.from_dict(text), context(task.lengths), share)
    return {"mfu": tokens_per_s * useful / peak.flops} if peak else {}


def launches(arm: Arm) -> int:
    """Kernels that one step launches, by any of CUDA's entry points."""
    with torch.profiler.profile() as trace:
        arm.step()
        torch.cuda.synchronize()
    return sum("LaunchKernel" in event.name for event in trace.events())


def profile(arm: Arm, task: Task, text: dict) -> dict[str, dict[str, float]]:
    """One step as a Chrome trace, and its time by kind of work beside the least it could take."""
    cuda = task.device == "cuda"
    with named_ops(), torch.profiler.profile() as trace:
        start = time.perf_counter()
        arm.step()
        if cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - start
    trace.export_chrome_trace(task.profile)
    events = list(trace.events())
    spent = by_kind(events, cuda)
    busy = sum(spent.values())
    if cuda:  # the host is slower under the profiler; the device's own span is what counts
        work = [event for event in events if on_device(event)]
        wall = (max(e.time_range.end for e in work) - min(e.time_range.start for e in work)) / 1e6
        total = sum(event.time_range.elapsed_us() for event in work) / 1e6
        spent["not attributed"], busy = max(0.0, total - busy), total
    spent["idle"] = max(0.0, wall - busy)
    least = roofline(arm, task, ModelConfig.from_dict(text))
    return {kind: {"seconds": spent.get(kind), "roofline": least.get(kind)} for kind in {**spent, **least}}


@contextlib.contextmanager
def named_ops() -> Iterator[None]:
    """Gives a name to what happens inside an op, also where it is plain PyTorch."""
    ops = {name: getattr(kernels, name) for name in kernels.OPS}
    try:
        for name, op in ops.items():
            setattr(kernels, name, record_function(f"op:{name}")(op))
        yield
    finally:
        for name, op in ops.items():
            setattr(kernels, name, op)


def on_device(event: FunctionEvent) -> bool:
    """Whether the event is a kernel or a copy, not the shadow of a name that the host gave."""
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation


# What the names of operations, ours and the peers', say about their kind of work.
NAMES = {
    "attention": ("op:causal_attention", "scaled_dot_product", "ScaledDotProduct", "FlashAttn"),
    "delta rule": ("op:gated_delta_rule", "GatedDeltaRule"),
    "loss": ("op:linear_cross_entropy", "CrossEntropy", "cross_entropy", "nll_loss", "NllLoss", "LogSoftmax"),
    "optimiser": ("op:adamw", "optimiser", "Optimizer"),
    "elementwise": ("op:",),
}
GEMMS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")


def by_kind(events: list[FunctionEvent], cuda: bool) -> dict[str, float]:
    """Seconds by kind of work: of the kernels, or on a CPU of the operations themselves.

    An event is of the kind that its own name or the nearest enclosing name tells, in backward that of the forward
    operation with the same sequence number; GEMMs within attention and delta rule are theirs, all others GEMM.
    """
    forward: dict[int, str] = {}

    def kind(event: FunctionEvent | None) -> str:
        while event is not None:
            for found, names in NAMES.items():
                if any(name in event.name for name in names):
                    return found
            if "Backward" in event.name and event.sequence_nr in forward:
                return forward[event.sequence_nr]
            event = event.cpu_parent
        return "elementwise"

    on_host = sorted((e for e in events if e.device_type == DeviceType.CPU), key=lambda e: e.time_range.start)
    for event in on_host:
        # Of several events with a number the last one made the node; those before it made none.
        if event.sequence_nr >= 0 and "Backward" not in event.name:
            forward[event.sequence_nr] = kind(event)
    spent: Counter[str] = Counter()
    for event in on_host:
        found = kind(event)
        if event.name in GEMMS and found in ("elementwise", "loss"):
            found = "GEMM"
        spent[found] += (sum(k.duration for k in event.kernels) if cuda else event.self_cpu_time_total) / 1e6
    return dict(spent)


def roofline(arm: Arm, task: Task, config: ModelConfig) -> dict[str, float]:
    """The least seconds of a step by kind, for GPUs whose speed is known; with what our plan makes again."""
    name = torch.cuda.get_device_name() if task.device == "cuda" else ""
    speed = next((speed for gpu, speed in SPEEDS.items() if gpu in name), None)
    if speed is None:
        return {}
    tokens, share = sum(task.lengths), task.trained / task.lengths[0]
    least = step_seconds(config, tokens, context(task.lengths), share, speed, arm.again_seconds() / tokens)
    least["loss"] = tokens * sum(elementwise_bytes(config, share)["loss"]) / speed.bandwidth
    least["elementwise"] -= least["loss"]
    return least


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
