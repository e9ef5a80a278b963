"""What the launchers of the row-wise Triton kernels share: argument checks, grid sizes, layouts."""

import functools

import torch
from torch import Tensor

# An adapter's rows stay in registers beside the running sums of their gradients: q, k and v fit at D = 5120
# without spills, a fourth row does not.
MAX_FUSED_ROWS = 3


def check_inputs(op: str, activations: dict[str, Tensor | None], frozen: dict[str, Tensor]) -> None:
    """Raises ValueError where the Triton path would be wrong in silence: a dtype, a layout, a gradient it lacks."""
    for name, x in activations.items():
        if x is None:
            continue
        if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"{op}: {name} is {x.dtype}; the Triton kernel takes bf16, fp16 or fp32")
        if x.stride(-1) != 1 and x.shape[-1] != 1:
            raise ValueError(f"{op}: {name} has strides {x.stride()}; expected rows with adjacent elements")
    for name, w in frozen.items():
        if w.requires_grad:
            raise ValueError(f"{op}: {name} requires grad, but the Triton kernel treats it as frozen; freeze it")


def fuses_A(lora_A: Tensor | None) -> bool:
    """Whether a kernel computes u = x A^T itself. Other adapters take the plain projection after it (not free)."""
    return lora_A is not None and lora_A.dtype == torch.float32 and len(lora_A) <= MAX_FUSED_ROWS


def fuses_B(lora) -> bool:
    """Whether a kernel adds s u B^T itself (rank 1 in fp32). Others are added before it (not free)."""
    return lora is not None and lora.B.dtype == lora.u.dtype == torch.float32 and lora.B.shape[1] == 1


def adjacent(grad: Tensor) -> Tensor:
    """A gradient whose rows are adjacent elements: itself, except for the layouts that autograd makes of broadcasts."""
    return grad if grad.stride(-1) == 1 or grad.shape[-1] == 1 else grad.contiguous()


def persistent_programs(x: Tensor, items: int, per_sm: float) -> int:
    """Programs that walk over `items`, `per_sm` on every multiprocessor: the same on every run on the same GPU."""
    return max(1, min(items, int(_multiprocessors(x.device) * per_sm)))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # In the interpreter three programs: enough for partial sums to be partial, few enough to be quick.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
