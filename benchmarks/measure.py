"""Measures one contender in a process of its own: loss and gradients, or time, memory and where the time goes.

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
from benchmarks.baselines import CONTENDERS, MAX_GPU_BYTES, Contender, architecture
from psysafe.model.config import ModelConfig
from psysafe.runtime import PEAKS, DeviceTime, let_segments_grow, memory_peak
from psysafe.training.roofline import SPEEDS, context, elementwise_bytes, flops_per_token, step_seconds

TURN_OVER = "turn over"


@dataclass(frozen=True)
class Task:
    contender: str
    checkpointing: bool
    device: str
    layers: int
    lengths: list[int]
    trained: int  # how many tokens of each document are trained, its last ones
    warmups: int
    steps: int
    result: str  # file for the results, as JSON
    gradients: str = ""  # file for the gradients: loss and gradients are computed once, and nothing is timed
    profile: str = ""  # file for a Chrome trace
    turns: bool = False  # wait for a line on stdin before every step


def main(task: Task) -> None:
    device = torch.device(task.device)
    if device.type == "cuda":
        let_segments_grow()  # as in training, whose plan fills the GPU; the same for all
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, MAX_GPU_BYTES / total))
    text_config = architecture(device, task.layers)
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(0, text_config["vocab_size"], (n,), generator=generator) for n in task.lengths]
    contender = CONTENDERS[task.contender](text_config, documents, task.trained, device, task.checkpointing)
    for module in contender.modules:
        importlib.import_module(module)
    # A process starts with Python and its libraries in memory; the allocator of a GPU starts at zero.
    memory_before = 0 if device.type == "cuda" else resident()
    with turn(task):
        contender.load()
    if task.gradients:
        result = {"loss": contender.backward().item()}
        save_file({name: g.float().cpu().contiguous() for name, g in contender.gradients().items()}, task.gradients)
    else:
        if device.type == "cuda":
            # The weights' random numbers were drawn in fp32; that memory does not belong to the step.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        result = timed(contender, task, device) | {"peak": memory_peak(device) - memory_before}
        result["tokens_per_s"] = sum(task.lengths) / result["seconds"]
        if device.type == "cuda":
            result["reserved"] = torch.cuda.max_memory_reserved(device)
            result |= mfu(text_config, task, result["tokens_per_s"]) | {"launches": launches(contender)}
        if task.profile:
            result["profile"] = profile(contender, task, text_config)
    Path(task.result).write_text(json.dumps(result))


def resident() -> int:
    """Bytes of resident memory now."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


@contextlib.contextmanager
def turn(task: Task) -> Iterator[None]:
    """Waits until it is this contender's turn, and reports its end. Does nothing where contenders take no turns."""
    if task.turns:
        sys.stdin.readline()
    yield
    if task.turns:
        print(TURN_OVER, flush=True)


def timed(contender: Contender, task: Task, device: torch.device) -> dict[str, float]:
    """Seconds of a step after the warm-ups, by CUDA events (on a CPU by the clock), and of the process's CPU time: the
    median, and as spread the distance between the quartiles."""
    for _ in range(task.warmups):
        with turn(task):
            contender.step()
    wall_seconds, cpu_seconds = [], []
    for _ in range(task.steps):
        with turn(task):
            start, cpu_start = DeviceTime(device), time.process_time()
            contender.step()
            wall_seconds.append(DeviceTime(device).since(start))
            cpu_seconds.append(time.process_time() - cpu_start)
    result = {}
    for name, seconds in (("seconds", wall_seconds), ("cpu_seconds", cpu_seconds)):
        low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else 3 * seconds
        result |= {name: statistics.median(seconds), f"{name}_spread": high - low}
    return result


def mfu(text_config: dict, task: Task, tokens_per_s: float) -> dict[str, float]:
    """Useful FLOPs (no recomputation) over the data sheet's peak; empty for a GPU whose peak is not known."""
    peak = PEAKS.get(torch.cuda.get_device_name())
    share = task.trained / task.lengths[0]
    useful_flops = flops_per_token(ModelConfig.from_dict(text_config), context(task.lengths), share)
    return {"mfu": tokens_per_s * useful_flops / peak.flops} if peak else {}


def launches(contender: Contender) -> int:
    """How many kernels one step launches, by any of CUDA's entry points."""
    with torch.profiler.profile() as trace:
        contender.step()
        torch.cuda.synchronize()
    return sum("LaunchKernel" in event.name for event in trace.events())


def profile(contender: Contender, task: Task, text_config: dict) -> dict[str, dict[str, float]]:
    """Kind of work -> its seconds in one step and the roofline's; writes a Chrome trace of that step."""
    cuda = task.device == "cuda"
    with named_ops(), torch.profiler.profile() as trace:
        start = time.perf_counter()
        contender.step()
        if cuda:
            torch.cuda.synchronize()
        wall_seconds = time.perf_counter() - start
    trace.export_chrome_trace(task.profile)
    events = list(trace.events())
    seconds = by_kind(events, cuda)
    busy_seconds = sum(seconds.values())
    if cuda:
        # The profiler slows the host down, so the host's clock is wrong here: count from the first kernel to the last.
        kernel_events = [event for event in events if on_device(event)]
        first = min(event.time_range.start for event in kernel_events)
        wall_seconds = (max(event.time_range.end for event in kernel_events) - first) / 1e6
        attributed = busy_seconds
        busy_seconds = sum(event.time_range.elapsed_us() for event in kernel_events) / 1e6
        seconds["not attributed"] = max(0.0, busy_seconds - attributed)
    seconds["idle"] = max(0.0, wall_seconds - busy_seconds)
    min_seconds = roofline(contender, task, ModelConfig.from_dict(text_config))
    kinds = {**seconds, **min_seconds}
    return {kind: {"seconds": seconds.get(kind), "roofline": min_seconds.get(kind)} for kind in kinds}


@contextlib.contextmanager
def named_ops() -> Iterator[None]:
    """Inside it, the trace names every operation of kernels/, also one that runs as plain PyTorch."""
    ops = {name: getattr(kernels, name) for name in kernels.OPS}
    try:
        for name, op in ops.items():
            setattr(kernels, name, record_function(f"op:{name}")(op))
        yield
    finally:
        for name, op in ops.items():
            setattr(kernels, name, op)


def on_device(event: FunctionEvent) -> bool:
    """Whether the event is a kernel or a copy. The trace also repeats the host's names on the device: those are not."""
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation


# Kind of work -> parts of the names of its operations, in psysafe and in the baselines. The first match counts, so
# "op:" (every other operation of kernels/) stands last.
NAMES = {
    "attention": ("op:causal_attention", "scaled_dot_product", "ScaledDotProduct", "FlashAttn"),
    "delta rule": ("op:gated_delta_rule", "GatedDeltaRule"),
    "loss": ("op:linear_cross_entropy", "CrossEntropy", "cross_entropy", "nll_loss", "NllLoss", "LogSoftmax"),
    "optimiser": ("op:adamw", "optimiser", "Optimizer"),
    "elementwise": ("op:",),
}
GEMMS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")


def by_kind(events: list[FunctionEvent], cuda: bool) -> dict[str, float]:
    """Kind of work -> seconds, of the kernels on a GPU, of the operations themselves on a CPU.

    The kind of an event follows from its own name, or else from the nearest enclosing event whose name is known. In
    backward it is the kind of the forward operation with the same sequence number. GEMMs inside attention and the delta
    rule belong to these; all others are of the kind GEMM.
    """
    forward_kind: dict[int, str] = {}  # by sequence number

    def kind(event: FunctionEvent | None) -> str:
        while event is not None:
            for named_kind, names in NAMES.items():
                if any(name in event.name for name in names):
                    return named_kind
            if "Backward" in event.name and event.sequence_nr in forward_kind:
                return forward_kind[event.sequence_nr]
            event = event.cpu_parent
        return "elementwise"

    on_host = sorted((e for e in events if e.device_type == DeviceType.CPU), key=lambda e: e.time_range.start)
    for event in on_host:
        # Several events can carry one number. The last of them created autograd's node, so it overwrites the others.
        if event.sequence_nr >= 0 and "Backward" not in event.name:
            forward_kind[event.sequence_nr] = kind(event)
    seconds: Counter[str] = Counter()
    for event in on_host:
        event_kind = kind(event)
        if event.name in GEMMS and event_kind in ("elementwise", "loss"):
            event_kind = "GEMM"
        microseconds = sum(k.duration for k in event.kernels) if cuda else event.self_cpu_time_total
        seconds[event_kind] += microseconds / 1e6
    return dict(seconds)


def roofline(contender: Contender, task: Task, config: ModelConfig) -> dict[str, float]:
    """Kind of work -> the least seconds of a step, with what the plan recomputes; empty for a GPU of unknown speed."""
    name = torch.cuda.get_device_name() if task.device == "cuda" else ""
    speed = next((speed for gpu, speed in SPEEDS.items() if gpu in name), None)
    if speed is None:
        return {}
    tokens, share = sum(task.lengths), task.trained / task.lengths[0]
    recompute = contender.recompute_seconds() / tokens
    min_seconds = step_seconds(config, tokens, context(task.lengths), share, speed, recompute)
    # step_seconds counts the loss as elementwise work; here it is a kind of its own.
    min_seconds["loss"] = tokens * sum(elementwise_bytes(config, share)["loss"]) / speed.bandwidth
    min_seconds["elementwise"] -= min_seconds["loss"]
    return min_seconds


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
