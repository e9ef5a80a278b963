"""Where each document of a packed batch begins and ends."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


class Documents:
    """The boundaries of N documents in one row of T tokens: `cu_seqlens (N+1,) int32`, 0 = first < ... < last = T.

    Document i is tokens cu_seqlens[i] to cu_seqlens[i+1] - 1. Raises ValueError for boundaries that do not rise from 0.
    The boundaries are also stored as a list on the host, so that no operation has to wait for the device to read them.
    Pass a CPU tensor, which is copied to `device` without waiting. A tensor on the device is read once, here, which
    waits for the device.
    """

    def __init__(self, cu_seqlens: Tensor, device: torch.device | str | None = None):
        device = cu_seqlens.device if device is None else torch.device(device)
        bounds = cu_seqlens.tolist()
        if cu_seqlens.dim() != 1 or len(bounds) < 2 or bounds[0] != 0 or any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(f"cu_seqlens must rise from 0, one more entry than documents; got {bounds[:8]}")
        self.bounds: list[int] = bounds
        self.lengths: list[int] = [b - a for a, b in pairwise(bounds)]
        self.total: int = bounds[-1]  # T
        self.device = device
        self.cu_seqlens = self.to_device(cu_seqlens.to(torch.int32))
        self._tables: dict[object, object] = {}

    def __len__(self) -> int:
        """N, the number of documents."""
        return len(self.lengths)

    def table(self, key: object, build: Callable[["Documents"], object]) -> object:
        """build(self), stored under `key`: what depends on the boundaries alone is built once for all layers."""
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
        """Copies a tensor to the device of the documents, without waiting for the device."""
        # Through pinned memory: a copy from pageable memory may make the host wait.
        if self.device.type == "cuda" and table.device.type == "cpu":
            table = table.pin_memory()
        return table.to(self.device, non_blocking=self.device.type == "cuda")
