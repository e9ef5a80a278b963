"""The values that travel between the fused operations: packed documents and adapter terms.

Letters used in every kernel file: T tokens of a packed row, D hidden size, N output features of a linear layer,
r LoRA rank, H query heads, G key/value heads, K head size.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class LoRATerm(NamedTuple):
    """What an adapter still owes to a linear layer's output: `scale * u @ B.T`, in fp32.

    u (T, P*r): x @ A.T of the P projections fused in the layer. B (N, r): their B matrices, one above the other.
    Which rows of B belong to which columns of u follows from the layer's layout, which the consuming op knows.
    """

    u: Tensor
    B: Tensor
    scale: float


class Pending(NamedTuple):
    """What a GEMM wrote, y (T, D), and the adapter term that the next residual add will add to it."""

    y: Tensor
    lora: LoRATerm | None


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp32 for 16- and 32-bit tensors, fp64 for fp64: a hard `.float()` would fake an fp64 oracle."""
    return torch.promote_types(x.dtype, torch.float32)


def project(x: Tensor, lora_A: Tensor | None) -> Tensor | None:
    """u = x @ A.T in fp32 from the x that the GEMM sees (already rounded). x (T, D), A (r, D) -> (T, r)."""
    return None if lora_A is None else x.to(lora_A.dtype) @ lora_A.T


def add_lora(y: Tensor, lora: LoRATerm | None, sizes: tuple[int, ...]) -> Tensor:
    """y + scale * u @ B.T in the compute dtype; `sizes` are the output features of the fused projections.

    y (T, sum(sizes)), u (T, len(sizes) * r), B (sum(sizes), r).
    """
    if lora is None:
        return y.to(compute_dtype(y))
    parts = add_lora_apart(y, lora, sizes)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def add_lora_apart(y: Tensor, lora: LoRATerm | None, sizes: tuple[int, ...]) -> Sequence[Tensor]:
    """add_lora, projection by projection: for callers that would take the result apart again."""
    parts = y.to(compute_dtype(y)).split_with_sizes(sizes, dim=1)
    if lora is None:
        return parts
    us, Bs = lora.u.to(parts[0].dtype).chunk(len(sizes), dim=1), lora.B.to(parts[0].dtype).split(sizes)
    return tuple(part + lora.scale * u @ B.T for part, u, B in zip(parts, us, Bs, strict=True))


class Documents:
    """Where the documents of a packed row begin and end: `cu_seqlens (n+1,) int32`, 0 = first < ... < last = T.

    The lengths are also kept on the host, so that no op has to wait for the device to learn them; pass a CPU tensor
    (one copy to `device`, asynchronous) or a device tensor (one synchronisation, here and nowhere else).
    """

    def __init__(self, cu_seqlens: Tensor, device: torch.device | str | None = None):
        device = cu_seqlens.device if device is None else torch.device(device)
        bounds = cu_seqlens.tolist()
        if cu_seqlens.dim() != 1 or len(bounds) < 2 or bounds[0] != 0 or any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(f"cu_seqlens must rise from 0, one more entry than documents; got {bounds[:8]}")
        self.bounds: list[int] = bounds
        self.lengths: list[int] = [b - a for a, b in pairwise(bounds)]
        self.total: int = bounds[-1]
        self.device = device
        self.cu_seqlens = self.to_device(cu_seqlens.to(torch.int32))
        self._tables: dict[object, object] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def table(self, key: object, build: Callable[["Documents"], object]) -> object:
        """A value that depends on the boundaries alone (a kernel's schedule), built once and shared by all layers."""
        if key not in self._tables:
            self._tables[key] = build(self)
        return self._tables[key]

    @property
    def positions(self) -> Tensor:
        """(T,) int64: the position of every token in its own document."""
        return self.table("positions", lambda d: d.to_device(torch.cat([torch.arange(n) for n in d.lengths])))

    @property
    def index(self) -> Tensor:
        """(T,) int64: the document of every token."""
        return self.table(
            "index", lambda d: d.to_device(torch.repeat_interleave(torch.arange(len(d)), torch.tensor(d.lengths)))
        )

    def to_device(self, table: Tensor) -> Tensor:
        """Copies a tensor to where the documents are; from the host to a GPU through pinned memory, because a copy from
        pageable memory may make the host wait."""
        if self.device.type == "cuda" and table.device.type == "cpu":
            table = table.pin_memory()
        return table.to(self.device, non_blocking=self.device.type == "cuda")
