"""The pieces that both mixers and the MLP are made of: the fused frozen linear layer, and what a batch shares."""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import Documents, LoRATerm
from psysafe.model.recompute import Remake

if TYPE_CHECKING:
    from psysafe.model.cache import CacheView


class Batch(NamedTuple):
    """What all layers of a forward pass share. cos and sin (T, R), fp32 or wider; `remake` is each block's own."""

    documents: Documents
    cos: Tensor
    sin: Tensor
    cache: "CacheView | None" = None
    remake: Remake = Remake()


class FusedLinear(nn.Module):
    """One frozen GEMM for all projections that read the same x; weight (sum of the parts' features, in_features).

    `parts` names the projections as the published checkpoint does, with their output features, in row order.
    `adapter` is attached from outside (lora.py).
    """

    def __init__(self, in_features: int, parts: dict[str, int]):
        super().__init__()
        self.parts = parts
        self.weight = frozen(sum(parts.values()), in_features)
        self.adapter: nn.Module | None = None

    @property
    def lora_A(self) -> Tensor | None:
        return None if self.adapter is None else self.adapter.A

    def lora_term(self, u: Tensor | None) -> LoRATerm | None:
        """The adapter term that the op behind this GEMM has to add."""
        return None if self.adapter is None else LoRATerm(u, self.adapter.B, self.adapter.scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def frozen(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A weight of the base: loaded, never trained."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
