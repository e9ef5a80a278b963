"""Where a run runs: device, ranks, seed, and what the hardware can do."""

import datetime
import functools
import importlib.metadata
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

import kernels
from psysafe.program import UserError

_TORCHRUN = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}


class Peak(NamedTuple):
    flops: float  # dense bf16 FLOP/s
    bandwidth: float  # bytes/s of device memory


# Nominal figures of the vendor's data sheets, by the exact name that the driver reports: a GPU that is not listed, or a
# slice of one (MIG), has no peak, and then no MFU is printed.
PEAKS = {
    "NVIDIA B200": Peak(2250e12, 8.0e12),
    "NVIDIA H200": Peak(989e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": Peak(989e12, 3.35e12),
    "NVIDIA H100 PCIe": Peak(756e12, 2.0e12),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 2.039e12),
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 1.555e12),
    "NVIDIA A100 80GB PCIe": Peak(312e12, 1.935e12),
    "NVIDIA L40S": Peak(362e12, 0.864e12),
    "NVIDIA L4": Peak(121e12, 0.3e12),
    "NVIDIA GeForce RTX 4090": Peak(165e12, 1.008e12),
}


@dataclass(frozen=True)
class Runtime:
    """One rank's place in the run."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    store: dist.Store | None = None  # in which several ranks met

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"

    @property
    def peak(self) -> Peak | None:
        return PEAKS.get(self.device_name)

    def largest(self, value: int) -> int:
        """The largest of all ranks' values, known to all: how they agree to stop after the same step.

        Goes through gloo on the CPU, so that a GPU is not waited for.
        """
        if self.world_size == 1:
            return value
        box = torch.tensor(value)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)

    def agree(self, **facts: object) -> None:
        """Raises UserError on every rank when one of them was given something else than rank 0."""
        if self.world_size == 1:
            return
        found: list[dict] = [{}] * self.world_size
        dist.all_gather_object(found, facts)
        for rank, others in enumerate(found):
            for name in facts:
                first, other = found[0][name], others[name]
                if other != first:
                    remedy = "start every rank with the same command, files and run directory (a shared file system)"
                    raise UserError(f"{name}: {other!r} on rank {rank}, {first!r} on rank 0; {remedy}")


def start(device: str = "auto", dtype: str = "auto", seed: int = 0, timeout_s: float = 600) -> Runtime:
    """Find this rank's device, join the other ranks, seed, and ask for deterministic arithmetic.

    Ranks come from torchrun's RANK, LOCAL_RANK and WORLD_SIZE. A collective that takes a minute longer than timeout_s
    raises: until then the watchdog can tell it better. Raises UserError when the device asked for is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rank, local_rank, world_size = (int(os.environ.get(k, d)) for k, d in _TORCHRUN.items())
    where = torch.device("cpu")
    if device == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if local_rank >= count:
            remedy = "start at most that many ranks a machine, or take --device cpu"
            raise UserError(f"--device cuda: rank {rank} needs GPU {local_rank}, torch finds {count} here; {remedy}")
        where = torch.device("cuda", local_rank)
        torch.cuda.set_device(where)
    try:  # kernels know nothing of psysafe: what a user can have set wrong there is looked at here, before the weights
        kernels.runs_triton(torch.empty(0, device=where))
    except ValueError as error:
        raise UserError(str(error)) from None
    _be_deterministic(seed)
    store = _meet("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout_s + 60) if world_size > 1 else None
    kind = {"cuda": torch.bfloat16, "cpu": torch.float32}[device] if dtype == "auto" else getattr(torch, dtype)
    return Runtime(where, kind, rank, local_rank, world_size, store)


@functools.cache
def _meet(backend: str, timeout_s: float) -> dist.Store:
    """Join the other ranks, once a process. Returns the store in which they meet."""
    timeout = datetime.timedelta(seconds=timeout_s)
    store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    # torchrun keeps its store over a restart, and in it the addresses of the dead. The count is one machine's own: on
    # several they can differ, and then the ranks would wait for each other in vain.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    return store


def _be_deterministic(seed: int) -> None:
    """A resumed run must repeat its bits. An op that cannot warns by name; it does not end an overnight run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms would import torch's compiler, a second
    torch.utils.deterministic.fill_uninitialized_memory = False  # else every torch.empty is written once for nothing
    torch.manual_seed(seed)


def versions() -> dict[str, str]:
    """What a saved state or a benchmark must name about the software it ran on. "" for what is not installed."""
    from psysafe import __version__  # which imports this file

    found = {"psysafe": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "safetensors", "tokenizers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def memory_total(device: torch.device) -> int:
    """Bytes of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_peak(device: torch.device) -> int:
    """Most bytes this process has held so far: torch's allocations on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # not getrusage: Linux lets a child start with the peak of the process that spawned it
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Moment:
    """A point in the device's work: a CUDA event, or simply the time."""

    def __init__(self, device: torch.device):
        self.device, self.time, self.event = device, time.perf_counter(), None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()

    def since(self, earlier: "Moment") -> float:
        """Seconds; waits until the device has come that far."""
        if self.event is None:
            return self.time - earlier.time
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000
