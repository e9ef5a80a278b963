"""The pieces that both mixers and the MLP are made of: a fused frozen linear layer, and frozen weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import LoRATerm


class FusedLinear(nn.Module):
    """One frozen GEMM for all projections that read the same x: x (T, in) -> x W^T (T, sum of the parts' features).

    `parts` names the projections as the published checkpoint does, with their output features, in the order of their
    rows in W. `adapter` is attached from outside (lora.py). The GEMM itself knows nothing of it: the operations around
    it are given `lora_A` and `lora_term`.
    """

    def __init__(self, in_features: int, parts: dict[str, int]):
        super().__init__()
        self.parts = parts
        self.weight = frozen(sum(parts.values()), in_features)
        self.adapter: nn.Module | None = None

    @property
    def lora_A(self) -> Tensor | None:
        """(J, in), r rows for each part, for the operation before this GEMM: it returns u = x A^T (T, J)."""
        return None if self.adapter is None else self.adapter.A

    def lora_term(self, u: Tensor | None, weights: Tensor | None = None) -> LoRATerm | None:
        """s u B^T, u (T, J), for the operation after this GEMM: it adds the term to the output.

        weights (T, r): factors of each token's r columns of u, the same for every part (mixed_adapters.py).
        """
        if self.adapter is None:
            return None
        if weights is not None:
            u = (u.unflatten(1, (len(self.parts), -1)) * weights[:, None]).flatten(1)
        elif self.adapter.is_mixed:  # all of them at once would be a model that nobody trained
            raise ValueError("several adapters are attached: give adapter_weights, from MixedAdapters.weights")
        return LoRATerm(u, self.adapter.B, self.adapter.scale, self.adapter.is_mixed)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def frozen(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A weight of the base: loaded, never trained."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
