"""Which program of the attention kernels computes what: decided on the host, once per packed row, for all layers.

Documents are ragged and causal work is a triangle, so the tiles are listed heaviest first and the GPU's own scheduler
does the rest. Nothing here looks at the device: the same lengths give the same order of summation everywhere.
"""

import heapq
import math

import torch
from torch import Tensor

from kernels.documents import Documents

SMS = 132  # of H100 and H200; a constant, because the split of dK and dV over programs fixes their order of summation
# Above so many tokens the keys and values of all heads no longer share the L2: one key/value head after the other.
L2_TOKENS = 8192
# An estimate: so many fp32 rows of dK and dV (K wide) are written and read in the time of a 128 x 64 tile's five dots.
ROWS_PER_TILE = 4000


def tile_items(documents: Documents, keys: Documents, block: int, late_first: bool) -> Tensor:
    """(tiles, 5) int32 on the device: document start, end, tile start, start of its keys, keys minus queries.

    Heaviest first, so that the last programs are short: late tiles see the most keys, early ones the most queries.
    """

    def build(documents: Documents) -> Tensor:
        rows = []
        for start, end, key_start, n in zip(
            documents.bounds, documents.bounds[1:], keys.bounds, keys.lengths, strict=False
        ):
            shift = n - (end - start)
            for first in range(start, end, block):
                weight = min(first + block, end) - start + shift if late_first else end - first
                rows.append((-weight, (start, end, first, key_start, shift)))
        rows.sort(key=lambda row: row[0])
        return documents.to_device(torch.tensor([item for _, item in rows], dtype=torch.int32))

    which = None if keys is documents else tuple(keys.bounds)
    return documents.table(("attention items", block, late_first, which), build)


def head_parts(documents: Documents, group: int, kv_heads: int, block: int) -> int:
    """Over how many programs the query heads of a group are spread in dV and dK: a divisor of `group`.

    The fewest bytes against the best balance over the SMs, by the makespan of the programs in their order; decided by
    the lengths alone, so that a resumed run adds in the same order.
    """

    def cost(parts: int) -> float:
        sms = [0.0] * SMS
        for weight in weights:
            for _ in range(kv_heads * parts):
                heapq.heapreplace(sms, sms[0] + weight * group // parts)
        # One tile's time stands for launching the adding pass.
        return max(sms) + (parts > 1) * (1 + parts * documents.total * kv_heads / ROWS_PER_TILE)

    weights = sorted((math.ceil((n - i) / 64) for n in documents.lengths for i in range(0, n, block)), reverse=True)
    choices = [parts for parts in range(1, group + 1) if group % parts == 0]
    return documents.table(("attention parts", group, kv_heads, block), lambda _: min(choices, key=cost))


def head_grid(tokens: int, items: int, outer: int, share: int) -> tuple[tuple[int, int], int]:
    """The grid for items x (outer * share) heads, and how many of these heads are its fastest index.

    Neighbouring programs run together: query heads of one group (share of them) read the same keys and values.
    """
    inner = outer * share if tokens <= L2_TOKENS else share
    return (items * inner, outer * share // inner), inner
