"""LoRA's term s u B^T between two operations: one computes u = x A^T, a later one adds the term.

T tokens, D hidden size, F output features of the layer, r rank, J columns of u (r for each projection). All letters:
kernels/ops/__init__.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LoRATerm(NamedTuple):
    """The term scale * u @ B.T of a linear layer, not yet added to the layer's output. All in fp32 (fp64 for fp64).

    u (T, J) is x @ A.T, and B is (F, r). One layer may fuse several projections: then u holds r columns for each of
    them (J = r * projections), and B their B matrices one above the other. The operation that adds the term knows the
    output features of each projection.

    is_mixed: u holds the columns of several adapters, each token's multiplied by its own weights, and by 0 for a token
    of the base.
    """

    u: Tensor
    B: Tensor
    scale: float
    is_mixed: bool = False


class Pending(NamedTuple):
    """The output y (T, D) of a GEMM, and its adapter's term, if any. The next residual addition adds both."""

    y: Tensor
    lora: LoRATerm | None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: fp32 for 16- and 32-bit tensors, fp64 for fp64."""
    # Not `.float()`: it would round an fp64 model to fp32, and the fp64 oracle of the tests would be one in name only.
    return torch.promote_types(x.dtype, torch.float32)


def lora_u(x: Tensor, lora_A: Tensor | None) -> Tensor | None:
    """u = x @ A.T in A's dtype (fp32). x (T, D), lora_A (J, D) -> (T, J); None where there is no adapter.

    x is the rounded tensor that the GEMM reads, so that both see the same input.
    """
    return None if lora_A is None else x.to(lora_A.dtype) @ lora_A.T


def add_lora(y: Tensor, lora: LoRATerm | None, sizes: tuple[int, ...]) -> Tensor:
    """y + scale * u @ B.T, in the compute dtype. `sizes`: the output features of each fused projection.

    y (T, sum(sizes)), u (T, len(sizes) * r), B (sum(sizes), r) -> (T, sum(sizes)).
    """
    if lora is None:
        return y.to(compute_dtype(y))
    parts = add_lora_by_projection(y, lora, sizes)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def add_lora_by_projection(y: Tensor, lora: LoRATerm | None, sizes: tuple[int, ...]) -> Sequence[Tensor]:
    """As add_lora, but returns one tensor (T, size) for each projection."""
    parts = y.to(compute_dtype(y)).split_with_sizes(sizes, dim=1)
    if lora is None:
        return parts
    us, Bs = lora.u.to(parts[0].dtype).chunk(len(sizes), dim=1), lora.B.to(parts[0].dtype).split(sizes)
    sums = tuple(part + lora.scale * u @ B.T for part, u, B in zip(parts, us, Bs, strict=True))
    # Tokens of the base have to keep its bits. On a CPU exp rounds column slices, which the base has, and whole tensors
    # differently.
    return torch.cat(sums, dim=1).split_with_sizes(sizes, dim=1) if lora.is_mixed else sums
