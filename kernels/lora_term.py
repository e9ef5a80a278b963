"""The adapter's term on its way from the operation that makes u to the one that adds s u B^T."""

from collections.abc import Sequence
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
