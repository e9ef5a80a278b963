"""What the launchers of the row-wise Triton kernels share: argument checks, grid sizes, layouts."""

import torch
from torch import Tensor

from kernels.ops._triton import TensorDescriptor
from kernels.paper import is_gpu, multiprocessors

# The rows of A and the running sums of dA stay in registers. At D = 5,120 three rows (q, k and v) fit; a fourth spills.
MAX_FUSED_ROWS = 3


def check_inputs(op: str, activations: dict[str, Tensor | None], frozen: dict[str, Tensor]) -> None:
    """ValueError for a dtype or layout that the kernel would misread, and for a gradient that it does not compute."""
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
    """Whether a kernel computes u = x A^T itself. For other adapters a plain matmul runs after it (not free)."""
    return lora_A is not None and lora_A.dtype == torch.float32 and len(lora_A) <= MAX_FUSED_ROWS


def fuses_B(lora) -> bool:
    """Whether a kernel adds s u B^T itself: rank 1 in fp32. Other terms are added before the kernel (not free)."""
    return lora is not None and lora.B.dtype == lora.u.dtype == torch.float32 and lora.B.shape[1] == 1


def adjacent(grad: Tensor) -> Tensor:
    """grad, copied if the elements of a row are not adjacent: so autograd passes the gradient of a broadcast."""
    return grad if grad.stride(-1) == 1 or grad.shape[-1] == 1 else grad.contiguous()


def persistent_programs(x: Tensor, items: int, per_sm: float) -> int:
    """The number of programs that share `items`: `per_sm` on each multiprocessor, so the same in every run on a GPU."""
    # In the interpreter as on a GPU of three: several programs, so that tests cover the partial sums, and few, so that
    # they are quick.
    count = multiprocessors(x.device) if is_gpu(x.device) else 3
    return max(1, min(items, int(count * per_sm)))


def tma_reads(x: Tensor) -> bool:
    """Whether TMA can read x (T, heads, K) as a matrix (T, heads * K): contiguous rows at multiples of 16 bytes."""
    T, heads, K = x.shape
    dense = x.stride(2) == 1 and (heads == 1 or x.stride(1) == K) and (T == 1 or x.stride(0) >= heads * K)
    return dense and x.data_ptr() % 16 == 0 and (T == 1 or x.stride(0) * x.element_size() % 16 == 0)


def tma(name: str, x: Tensor, rows: int, total: int | None = None, columns: int | None = None) -> "TensorDescriptor":
    """x (T, heads, K) as a matrix (T, heads * K), read by TMA in boxes of `rows` x K; zeros from row `total` on.

    columns: another width of the boxes, a part of a head. ValueError for a layout that TMA cannot read.
    """
    if not tma_reads(x):
        raise ValueError(
            f"{name}: strides {tuple(x.stride())} at address {x.data_ptr():#x}; expected (row, {x.shape[2]}, 1) with "
            f"rows at multiples of 16 bytes: pass {name}.contiguous()"
        )
    T, width = x.shape[0], x[0].numel()
    shape, strides = [T if total is None else total, width], [width if T == 1 else x.stride(0), 1]
    return TensorDescriptor(x, shape, strides, [rows, columns or x.shape[2]])
