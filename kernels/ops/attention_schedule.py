"""Which program of the attention kernels computes what: decided on the host, once for all layers of a packed batch.

Documents differ in length, and a late query of a document sees more keys than an early one. So the tiles are listed in
order, the most work first, and the GPU takes them in this order. Nothing here depends on the device: the same lengths
give the same order of summation on every GPU.
"""

import heapq
import math

import torch
from torch import Tensor

from kernels.documents import Documents

# Multiprocessors of H100 and H200. A constant, because how dk and dv are split over programs decides the order of their
# sums, and a resumed run on another GPU should repeat them.
SMS = 132
# With more tokens, the keys and values of all heads do not fit in L2 together: one key/value head runs after the other.
L2_TOKENS = 8192
# An estimate of what a part costs: in the time of the five dots of one 128 x 64 tile, so many rows (K wide, fp32) of dk
# and dv can be written and read again.
ROWS_PER_TILE = 4000


def tile_items(documents: Documents, keys: Documents, block: int, late_first: bool) -> Tensor:
    """(tiles, 5) int32 on the device: document start, end, tile start, start of its keys, keys minus queries.

    The tiles with the most work come first, so that the last programs are short. `late_first`: tiles of queries, of
    which the last of a document see the most keys; otherwise tiles of keys, of which the first are seen by the most
    queries.
    """

    def build(documents: Documents) -> Tensor:
        rows = []
        for start, end, key_start, key_count in zip(
            documents.bounds, documents.bounds[1:], keys.bounds, keys.lengths, strict=False
        ):
            # So many keys came before the first query: 0 in training.
            shift = key_count - (end - start)
            for first in range(start, end, block):
                weight = min(first + block, end) - start + shift if late_first else end - first
                rows.append((-weight, (start, end, first, key_start, shift)))
        rows.sort(key=lambda row: row[0])
        return documents.to_device(torch.tensor([item for _, item in rows], dtype=torch.int32))

    key_bounds = None if keys is documents else tuple(keys.bounds)
    return documents.table(("attention items", block, late_first, key_bounds), build)


def head_parts(documents: Documents, group: int, kv_heads: int, block: int) -> int:
    """Over how many programs the query heads of a group are spread in dv and dk: a divisor of `group`.

    More programs keep all SMs busy when documents are few, but each writes a part of its own that must be added. Chosen
    is the number with the shortest estimated time; it follows from the lengths alone, so that a resumed run adds in the
    same order.
    """

    def cost(parts: int) -> float:
        # Each program goes to the SM that is free first (the root of the heap).
        sms = [0.0] * SMS
        for weight in weights:
            for _ in range(kv_heads * parts):
                heapq.heapreplace(sms, sms[0] + weight * group // parts)
        # One tile's time stands for launching the adding pass.
        return max(sms) + (parts > 1) * (1 + parts * documents.total * kv_heads / ROWS_PER_TILE)

    # The work of a tile of keys: how many blocks of 64 queries see it.
    weights = [math.ceil((length - i) / 64) for length in documents.lengths for i in range(0, length, block)]
    weights.sort(reverse=True)
    choices = [parts for parts in range(1, group + 1) if group % parts == 0]
    return documents.table(("attention parts", group, kv_heads, block), lambda _: min(choices, key=cost))


def head_grid(tokens: int, items: int, outer: int, share: int) -> tuple[tuple[int, int], int]:
    """The grid of items x (outer * share) heads, and `inner`: how many of these heads are its fastest index.

    Neighbouring programs run at the same time. The `share` query heads of a group read the same keys and values, so
    they are neighbours.
    """
    inner = outer * share if tokens <= L2_TOKENS else share
    return (items * inner, outer * share // inner), inner
