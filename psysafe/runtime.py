"""Device and ranks: what this process runs on, how ranks meet and agree, versions, memory, and time on the device."""

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

import kernels
from psysafe.program import UserError
from psysafe.version import __version__

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
    store: dist.Store | None = None  # through which several ranks met

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
        """The largest of all ranks' values, on every rank: how they agree to stop after the same step."""
        if self.world_size == 1:
            return value
        on_cpu = torch.tensor(value)  # goes through gloo; through NCCL the host would have to wait for the GPU
        dist.all_reduce(on_cpu, dist.ReduceOp.MAX)
        return int(on_cpu)

    def sum(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its sum over all ranks."""
        if self.world_size > 1:
            for x in tensors:
                dist.all_reduce(x)

    def agree(self, **settings: object) -> None:
        """Raises UserError on every rank when one of them was given something else than rank 0."""
        if self.world_size == 1:
            return
        by_rank: list[dict] = [{}] * self.world_size
        dist.all_gather_object(by_rank, settings)
        for rank, others in enumerate(by_rank):
            for name in settings:
                first, other = by_rank[0][name], others[name]
                if other != first:
                    remedy = "start every rank with the same command, files and run directory (a shared file system)"
                    raise UserError(f"{name}: {other!r} on rank {rank}, {first!r} on rank 0; {remedy}")


def start(device: str = "auto", dtype: str = "auto", seed: int = 0, timeout_s: float = 600) -> Runtime:
    """Find this rank's device, join the other ranks, seed, and ask for deterministic arithmetic.

    Ranks come from torchrun's RANK, LOCAL_RANK and WORLD_SIZE. Raises UserError when the device asked for is not
    there, or PSYSAFE_KERNELS asks for kernels that cannot run on it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rank, local_rank, world_size = (int(os.environ.get(k, d)) for k, d in _TORCHRUN.items())
    this_device = torch.device("cpu")
    if device == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if local_rank >= count:
            remedy = "start at most that many ranks a machine, or take --device cpu"
            raise UserError(f"--device cuda: rank {rank} needs GPU {local_rank}, torch finds {count} here; {remedy}")
        let_segments_grow()
        this_device = torch.device("cuda", local_rank)
        torch.cuda.set_device(this_device)
    try:  # kernels/ may not import psysafe, so it raises ValueError; asked here once, before the weights are read
        kernels.runs_triton(torch.empty(0, device=this_device))
    except ValueError as error:
        raise UserError(str(error)) from None
    _be_deterministic(seed)
    # A collective fails a minute after the watchdog, which ends the run at timeout_s with a better message.
    store = _meet("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout_s + 60) if world_size > 1 else None
    if dtype == "auto":
        dtype = {"cuda": "bfloat16", "cpu": "float32"}[device]
    return Runtime(this_device, getattr(torch, dtype), rank, local_rank, world_size, store)


@functools.cache
def _meet(backend: str, timeout_s: float) -> dist.Store:
    """Join the other ranks, once a process. Returns the store through which they meet. UserError where they do not."""
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        return _join(backend, timeout)
    except dist.DistError as error:
        reason = str(error).strip().partition("\n")[0]
        if re.search("timed? ?out", reason, re.IGNORECASE):  # torch has one type of error for this and for a taken port
            reason = f"they did not within {timeout_s:.0f} s; did each of them start? ({reason})"
        raise UserError(f"the ranks could not meet: {reason}") from None


def _join(backend: str, timeout: datetime.timedelta) -> dist.Store:
    store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    # torchrun's store outlives a restart, and still holds the addresses of the ranks that died: hence a name for each
    # attempt. Every machine counts its own restarts. Where the counts differ, ranks wait for each other in vain
    # (docs/operations.md: --max-restarts 0 on several machines).
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    return store


def let_segments_grow() -> None:
    """Before CUDA starts, ask torch's allocator for segments that can grow: they leave fewer gaps, which no plan
    foresees. A setting of the user's own stays."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _be_deterministic(seed: int) -> None:
    """A resumed run must repeat its bits. An operation that cannot only warns: it must not end an overnight run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Sums that the switches of NVLink add up differ in their bits from call to call (nccl issue 1497). torch turns them
    # off within a machine where determinism is asked for; this also turns off those over several machines.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.backends.cudnn.benchmark = False
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms would import torch's compiler, a second
    torch.utils.deterministic.fill_uninitialized_memory = False  # else every torch.empty is written once for nothing
    torch.manual_seed(seed)


def versions() -> dict[str, str]:
    """Versions of the software, for saved states and benchmarks. "" for what is not installed."""
    numbers = {"psysafe": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "safetensors", "tokenizers"):
        try:
            numbers[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            numbers[name] = ""
    return numbers


def memory_total(device: torch.device) -> int:
    """Bytes of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_beside_torch(device: torch.device) -> int:
    """Bytes of a GPU that are in use, but not by torch's allocator: CUDA's context, NCCL's buffers, other processes."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def memory_peak(device: torch.device) -> int:
    """The largest number of bytes held by this process: torch's allocations on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # not getrusage: Linux lets a child start with the peak of the process that spawned it
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class DeviceTime:
    """A point in the device's work: on a GPU an event in its queue, on a CPU the clock."""

    def __init__(self, device: torch.device):
        self.device, self.time, self.event = device, time.perf_counter(), None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()

    def since(self, earlier: "DeviceTime") -> float:
        """Seconds from the earlier point to this one; waits until the device has come to this one."""
        if self.event is None:
            return self.time - earlier.time
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000
