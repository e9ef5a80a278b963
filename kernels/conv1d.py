"""Depthwise causal convolution over time + SiLU, restarting at every document.

    c_t = silu( sum_m w[:, m] x_{t-M+1+m} )     M taps; rows before a document's start are zero (or its initial state)

fp32 accumulation, one rounding. The output is split by columns into q, k and v, so that no copy stands between the
convolution and the delta rule. Source: transformers `Qwen3_5GatedDeltaNet` (conv1d without bias, silu).
"""

import torch
from torch import Tensor

from kernels.seams import Documents, compute_dtype


def causal_conv1d_silu_reference(
    x: Tensor, weight: Tensor, documents: Documents, splits: tuple[int, ...], initial_state: Tensor | None = None
) -> tuple[Tensor, ...]:
    """x (T, C), weight (C, M), splits summing to C, initial_state (n, M-1, C): the M-1 rows before each document's
    first token -> one (T, size) tensor for every entry of `splits`.
    """
    taps = weight.shape[1]
    dtype = compute_dtype(x)
    xs, w, positions = x.to(dtype), weight.to(dtype), documents.positions
    if initial_state is not None:
        state, index = initial_state.to(dtype), documents.index
    acc = xs * w[:, -1]
    for lag in range(1, min(taps, max(documents.lengths) if initial_state is None else taps)):
        past = torch.zeros_like(xs)
        past[lag:] = xs[:-lag] if lag < len(xs) else xs[:0]
        past = past.masked_fill((positions < lag)[:, None], 0)
        if initial_state is not None:
            early = (positions < lag).nonzero().squeeze(1)
            past = past.index_put((early,), state[index[early], taps - 1 - lag + positions[early]])
        acc = acc + past * w[:, -1 - lag]
    return tuple(torch.nn.functional.silu(acc).to(x.dtype).split(splits, dim=1))
