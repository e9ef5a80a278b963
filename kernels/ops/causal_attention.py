"""Causal grouped-query attention over packed documents.

    s = q k^T / sqrt(K)   for keys up to the query, in the same document      p = softmax(s)      o = p v
    dv = p^T do           ds = p * (do v^T - delta),  delta = rowsum(do * o)
    dq = ds k / sqrt(K)   dk = ds^T q / sqrt(K)       dk and dv are summed over the query heads of their group

q, o (T, H, K), k and v (S, G, K); s, p (T, S) for each head; query head j reads key/value head j // (H/G).

Rounding: softmax and all sums are fp32; o, dq, dk and dv are rounded once. In Triton p (not yet divided by its row sum)
and ds also enter their products in the dtype of the inputs. fp32 inputs are multiplied in full fp32.

There are four kernels with matrix products: forward, dv, dk and dq. A program owns a tile of 128 queries or keys of one
document and head. Each of the three backward kernels recomputes s. dk and dv are two kernels, because two fp32
accumulators of 128 x 256 do not fit in a program's registers; and with tiles of 64 keys both warpgroups would compute
the same s (9 dots instead of 8). Saving ds for the third kernel would save two dots, but ptxas serialises the wgmma of
every pipelined kernel that stores ds. No operand is a transposed accumulator: s^T is computed as k q^T.
A tile starts where its document starts or at a multiple of 128 from there, and its keys are read from the document's
first on. So the one test `key <= query` keeps later documents out, and no key lies before the document.

Saved for backward: q, k, v, o in their dtype and log2 of the softmax's denominator, fp32 (H,): 2 K (2H + 2G) + 4H bytes
a token in bf16, 28.8 KB at the 27B sizes. Forward moves these bytes once: k and v of a document stay in L2 (50 MB)
while its query heads read them. Every sum runs in an order that follows from the document lengths alone.
Source: FlashAttention-2 (arXiv 2307.08691), with tiles for 256-wide heads on Hopper.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.documents import Documents
from kernels.ops._launch import tma, tma_reads
from kernels.ops._triton import tl, triton
from kernels.ops.attention_schedule import head_grid, head_parts, tile_items


def causal_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, key_documents: Documents | None = None
) -> Tensor:
    """q (T, H, K), k and v (S, G, K) -> o (T, H, K).

    `key_documents` (default: `documents`, S = T) is for a prompt that is read in pieces over a cache: a document then
    has more keys than queries, and its queries are its last tokens. ValueError if a document has fewer keys.
    """
    keys = documents if key_documents is None else key_documents
    outs = []
    for i, (queries, key_count) in enumerate(zip(documents.lengths, keys.lengths, strict=True)):
        if key_count < queries:
            raise ValueError(f"document {i} has {queries} queries but only {key_count} keys")
        qs = q[documents.bounds[i] : documents.bounds[i + 1]].transpose(0, 1)[None]
        ks, vs = (x[keys.bounds[i] : keys.bounds[i + 1]].transpose(0, 1)[None] for x in (k, v))
        # Query i sees keys 0 .. i + shift. For shift > 0 is_causal would be wrong: it aligns the first query to key 0.
        shift = key_count - queries
        mask = None if shift == 0 else torch.ones(queries, key_count, dtype=torch.bool, device=q.device).tril(shift)
        o = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, is_causal=shift == 0, enable_gqa=True)
        outs.append(o[0].transpose(0, 1))
    return torch.cat(outs)


@triton.jit
def _program(p_items, inner):
    """The tile and the head of a program. Axis 0 of the grid: tile x inner heads, heads fastest; axis 1: outer heads.

    -> start and end of the document, first row of the tile, pointer to the item (see tile_items), head.
    """
    p_item = p_items + 5 * (tl.program_id(0) // inner)
    i_head = tl.program_id(1) * inner + tl.program_id(0) % inner
    start, end, first = tl.load(p_item), tl.load(p_item + 1), tl.load(p_item + 2)
    return start, end, first, p_item, i_head


@triton.jit
def _step(
    b_o, b_m, b_l, b_q, desc_k, desc_v, row, col, b_seen, scale,
    BS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over BS keys from `row` on; b_seen: how many of them each query sees.

    b_m (BT,) is the maximum so far, b_l (BT,) the sum of 2^(s - b_m), b_o (BT, K) the sum of 2^(s - b_m) v.
    """
    b_s = tl.dot(b_q, desc_k.load([row, col]).T, input_precision=PRECISION)
    if MASKED:
        b_s = tl.where(tl.arange(0, BS)[None, :] < b_seen[:, None], b_s, float("-inf"))
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * scale)
    b_p = tl.exp2(b_s * scale - b_m_new[:, None])
    # What was summed with the old maximum becomes smaller by this factor.
    b_alpha = tl.exp2(b_m - b_m_new)
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    b_v = desc_v.load([row, col])
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_alpha[:, None], input_precision=PRECISION)
    return b_o, b_m_new, b_l


@triton.jit(do_not_specialize=["T", "inner"])
def _forward_kernel(
    desc_q, desc_k, desc_v, p_o, p_lse, p_items, T, inner, scale,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program: one tile of BT queries of one head. p_lse (H, T): log2 of the sum of the exponentials."""
    start, end, first, p_item, i_h = _program(p_items, inner)
    # Query i of the document sees its keys 0 .. i + shift; its key 0 lies in `row`. In training shift is 0.
    row, shift = tl.load(p_item + 3), tl.load(p_item + 4)
    o_t = first + tl.arange(0, BT)
    m_t = o_t < end
    col = i_h // GROUP * K
    b_q = desc_q.load([first, i_h * K])
    b_m = tl.full([BT], float("-inf"), tl.float32)
    b_l = tl.zeros([BT], tl.float32)
    b_o = tl.zeros([BT, K], tl.float32)
    # Keys before `full` are seen by every query of the tile: their blocks need no mask.
    full = (first - start + shift + 1) // BS * BS
    last = tl.minimum(first + BT, end) - start + shift
    b_seen = o_t - start + shift + 1
    for j in tl.range(0, full, BS):
        b_o, b_m, b_l = _step(b_o, b_m, b_l, b_q, desc_k, desc_v, row + j, col, b_seen, scale, BS, False, PRECISION)
    for j in tl.range(full, last, BS):
        b_o, b_m, b_l = _step(b_o, b_m, b_l, b_q, desc_k, desc_v, row + j, col, b_seen - j, scale, BS, True, PRECISION)
    tl.store(p_lse + i_h * T + o_t, b_m + tl.log2(b_l), mask=m_t)
    # Stored through pointers: a descriptor stores a whole tile, and the last tile reaches into the next document.
    o_o = o_t.to(tl.int64)[:, None] * (H * K) + i_h * K + tl.arange(0, K)[None, :]
    tl.store(p_o + o_o, (b_o / b_l[:, None]).to(p_o.dtype.element_ty), mask=m_t[:, None])


@triton.jit(do_not_specialize=["T"])
def _delta_kernel(p_o, p_do, p_delta, T, stride_do, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr):
    """delta (H, T) = rowsum(do * o)."""
    o_t = tl.program_id(1) * BT + tl.arange(0, BT)
    m_t = o_t < T
    i_h = tl.program_id(0)
    o_k = i_h * K + tl.arange(0, K)[None, :]
    b_o = tl.load(p_o + o_t.to(tl.int64)[:, None] * (H * K) + o_k, mask=m_t[:, None], other=0.0)
    b_do = tl.load(p_do + o_t.to(tl.int64)[:, None] * stride_do + o_k, mask=m_t[:, None], other=0.0)
    tl.store(p_delta + i_h * T + o_t, tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1), mask=m_t)


@triton.jit
def _dv_step(
    b_dv, b_k, desc_q, desc_do, p_lse, i_h, j, o_s, end, T, scale,
    K: tl.constexpr, BT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv (keys, K) += p^T do over BT queries of head i_h from `j` on; p^T (keys, queries) comes from the saved lse."""
    o_t = j + tl.arange(0, BT)
    # Rows after the document's end hold the next document; lse = inf makes their p zero.
    b_lse = tl.load(p_lse + i_h * T + o_t, mask=o_t < end, other=float("inf"))
    b_s = tl.dot(b_k, desc_q.load([j, i_h * K]).T, input_precision=PRECISION)
    b_p = tl.exp2(b_s * scale - b_lse[None, :])
    if MASKED:
        b_p = tl.where(o_s[:, None] <= o_t[None, :], b_p, 0.0)
    b_do = desc_do.load([j, i_h * K])
    return tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T", "inner", "parts"])
def _backward_dv_kernel(
    desc_q, desc_k, desc_do, p_lse, p_dv, p_items, T, inner, parts, scale,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dv of BS keys, summed over the query heads of the group; p_dv (parts, T, G, K).

    With parts > 1 the group's query heads are split over so many programs, and each writes a sum of its own.
    """
    _, end, first, _, i_head = _program(p_items, inner)
    i_g, i_part, heads = i_head // parts, i_head % parts, GROUP // parts
    i_h = i_g * GROUP + i_part * heads
    o_s = first + tl.arange(0, BS)
    b_k = desc_k.load([first, i_g * K])
    b_dv = tl.zeros([BS, K], tl.float32)
    # The blocks of queries start at `first`: earlier queries do not see these keys. Those up to the tile's last key see
    # a part of them, later ones all. The mask takes two fifths of a step's instructions, so later blocks go without it.
    blocks = tl.cdiv(end - first, BT)
    masked = tl.minimum(blocks, BS // BT)
    # One loop over heads and blocks: nested, the pipeline of loads would run empty at the end of every head (and Triton
    # 3.6 would spill).
    for i in tl.range(0, heads * masked):
        j = first + i % masked * BT
        b_dv = _dv_step(
            b_dv, b_k, desc_q, desc_do, p_lse, i_h + i // masked, j, o_s, end, T, scale, K, BT, True, PRECISION
        )
    unmasked = blocks - masked
    for i in tl.range(0, heads * unmasked):
        j = first + (masked + i % unmasked) * BT
        b_dv = _dv_step(
            b_dv, b_k, desc_q, desc_do, p_lse, i_h + i // unmasked, j, o_s, end, T, scale, K, BT, False, PRECISION
        )
    G: tl.constexpr = H // GROUP
    o_out = (i_part.to(tl.int64) * T + o_s)[:, None] * (G * K) + i_g * K + tl.arange(0, K)[None, :]
    tl.store(p_dv + o_out, b_dv.to(p_dv.dtype.element_ty), mask=(o_s < end)[:, None])


@triton.jit(do_not_specialize=["T", "inner", "parts"])
def _backward_dk_kernel(
    desc_q, desc_k, desc_v, desc_do, p_lse, p_delta, p_dk, p_items, T, inner, parts, scale, factor,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk of BS keys; programs and parts as for dv. `factor` is 1 / sqrt(K), `scale` log2(e) / sqrt(K)."""
    _, end, first, _, i_head = _program(p_items, inner)
    i_g, i_part, heads = i_head // parts, i_head % parts, GROUP // parts
    o_s = first + tl.arange(0, BS)
    b_k = desc_k.load([first, i_g * K])
    b_v = desc_v.load([first, i_g * K])
    b_dk = tl.zeros([BS, K], tl.float32)
    blocks = tl.cdiv(end - first, BT)
    for i in tl.range(0, heads * blocks):
        i_h = i_g * GROUP + i_part * heads + i // blocks
        j = first + i % blocks * BT
        o_t = j + tl.arange(0, BT)
        m_t = o_t < end
        # Both loads and both products that need no arithmetic come first: with three stages they are in flight while
        # the step before this one still computes.
        b_q = desc_q.load([j, i_h * K])
        b_do = desc_do.load([j, i_h * K])
        b_lse = tl.load(p_lse + i_h * T + o_t, mask=m_t, other=float("inf"))
        b_delta = tl.load(p_delta + i_h * T + o_t, mask=m_t, other=0.0)
        b_s = tl.dot(b_k, b_q.T, input_precision=PRECISION)
        b_dp = tl.dot(b_v, b_do.T, input_precision=PRECISION)
        b_p = tl.exp2(b_s * scale - b_lse[None, :])
        b_p = tl.where(o_s[:, None] <= o_t[None, :], b_p, 0.0)
        # ds^T, (keys, queries). The factor of the scores' derivative waits until after the loop: one multiply a value.
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    G: tl.constexpr = H // GROUP
    o_out = (i_part.to(tl.int64) * T + o_s)[:, None] * (G * K) + i_g * K + tl.arange(0, K)[None, :]
    tl.store(p_dk + o_out, (b_dk * factor).to(p_dk.dtype.element_ty), mask=(o_s < end)[:, None])


@triton.jit(do_not_specialize=["T", "inner"])
def _backward_dq_kernel(
    desc_q, desc_k, desc_v, desc_do, p_lse, p_delta, p_dq, p_items, T, inner, scale, factor,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BT queries of one head: walks over the keys from the document's start to the tile's last query."""
    start, end, first, _, i_h = _program(p_items, inner)
    o_t = first + tl.arange(0, BT)
    m_t = o_t < end
    col = i_h // GROUP * K
    b_q = desc_q.load([first, i_h * K])
    b_do = desc_do.load([first, i_h * K])
    b_lse = tl.load(p_lse + i_h * T + o_t, mask=m_t, other=float("inf"))
    b_delta = tl.load(p_delta + i_h * T + o_t, mask=m_t, other=0.0)
    b_dq = tl.zeros([BT, K], tl.float32)
    for j in tl.range(start, tl.minimum(first + BT, end), BS):
        o_s = j + tl.arange(0, BS)
        # In the order of dk's loop, for the same reason.
        b_k = desc_k.load([j, col])
        b_v = desc_v.load([j, col])
        b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)
        b_dp = tl.dot(b_do, b_v.T, input_precision=PRECISION)
        b_p = tl.exp2(b_s * scale - b_lse[:, None])
        b_p = tl.where(o_s[None, :] <= o_t[:, None], b_p, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    o_out = o_t.to(tl.int64)[:, None] * (H * K) + i_h * K + tl.arange(0, K)[None, :]
    tl.store(p_dq + o_out, (b_dq * factor).to(p_dq.dtype.element_ty), mask=m_t[:, None])


@triton.jit(do_not_specialize=["n", "parts"])
def _add_parts_kernel(p_parts, p_sum, n, parts, BLOCK: tl.constexpr):
    """p_sum (n,) = the sum of p_parts (parts, n), in fp32 and in order, rounded once."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    b_sum = tl.zeros([BLOCK], tl.float32)
    for _ in range(parts):
        b_sum += tl.load(p_parts + o_n, mask=m_n, other=0.0)
        p_parts += n
    tl.store(p_sum + o_n, b_sum.to(p_sum.dtype.element_ty), mask=m_n)


class Tiles(NamedTuple):
    """Block shapes of one dtype and head size. A program owns `block` rows (of queries or keys); `forward`, `dv`, `dk`
    and `dq` are how many rows of the other kind each kernel reads at a time.

    `backward_stages` are those of dv, dk and dq. With two, a load is issued at the end of a step and awaited at the
    start of the next, so that nothing hides it; with three it has a whole step.
    """

    block: int
    forward: int
    dv: int
    dk: int
    dq: int
    warps: int
    forward_stages: int
    backward_stages: int


# (bytes per element, head size) -> tiles. Chosen by compiling for sm_90: the widest that neither spill nor serialise.
# fp32 runs without tensor cores, and spills; it exists to check the other code and is not meant to be fast.
TILES = {
    (2, 64): Tiles(128, 64, 64, 64, 64, 8, 3, 3),
    (2, 128): Tiles(128, 64, 64, 64, 64, 8, 2, 3),
    (2, 256): Tiles(128, 64, 32, 32, 32, 8, 2, 3),
    (4, 64): Tiles(32, 16, 16, 16, 16, 8, 1, 1),
    (4, 128): Tiles(32, 16, 16, 16, 16, 8, 1, 1),
    (4, 256): Tiles(32, 16, 16, 16, 16, 16, 1, 1),
}


def triton_supports(head_dim: int) -> bool:
    """Whether the Triton kernels exist for this head size; for another one the op runs its reference."""
    return (2, head_dim) in TILES


class _Sizes(NamedTuple):
    """The sizes of one call that all its launches share."""

    H: int
    group: int
    K: int
    tiles: Tiles
    precision: str

    @classmethod
    def of(cls, q: Tensor, k: Tensor) -> "_Sizes":
        tiles = TILES[q.element_size(), q.shape[2]]
        return cls(q.shape[1], q.shape[1] // k.shape[1], q.shape[2], tiles, "ieee" if q.element_size() == 4 else "tf32")

    @property
    def scale(self) -> float:
        """log2(e) / sqrt(K): the kernels use exp2, which the hardware has, instead of exp."""
        return math.log2(math.e) * self.K**-0.5

    def forward_options(self) -> dict:
        return self._options(self.tiles.block, self.tiles.forward, self.tiles.forward_stages)

    def backward_options(self, queries: int, keys: int) -> dict:
        return self._options(queries, keys, self.tiles.backward_stages)

    def _options(self, queries: int, keys: int, stages: int) -> dict:
        sizes = {"H": self.H, "GROUP": self.group, "K": self.K, "BT": queries, "BS": keys, "PRECISION": self.precision}
        return sizes | {"num_warps": self.tiles.warps, "num_stages": stages}


def _forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents, keys: Documents) -> tuple[Tensor, Tensor]:
    """-> o (T, H, K), and lse (H, T) fp32: log2 of the sum of the exponentials of each query."""
    sizes, T = _Sizes.of(q, k), documents.total
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(sizes.H, T, dtype=torch.float32, device=q.device)
    block, items = sizes.tiles.forward, tile_items(documents, keys, sizes.tiles.block, late_first=True)
    grid, inner = head_grid(keys.total, len(items), k.shape[1], sizes.group)
    _forward_kernel[grid](
        tma("q", q, sizes.tiles.block), tma("k", k, block, keys.total), tma("v", v, block, keys.total),
        o, lse, items, T, inner, sizes.scale, **sizes.forward_options(),
    )  # fmt: skip
    return o, lse


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, documents: Documents, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """-> dq, dk, dv; None for those that `needs` does not name."""
    sizes, T, G = _Sizes.of(q, k), documents.total, k.shape[1]
    dq, dk, dv = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if needed else None
        for x, needed in zip((q, k, v), needs, strict=True)
    )
    block = sizes.tiles.block
    if dq is not None or dk is not None:
        delta = torch.empty_like(lse)
        _delta_kernel[sizes.H, triton.cdiv(T, 32)](
            o, do, delta, T, do.stride(0), H=sizes.H, K=sizes.K, BT=32, num_warps=4
        )
    if dq is not None:
        items = tile_items(documents, documents, block, late_first=True)
        (grid, inner), rows = head_grid(T, len(items), G, sizes.group), sizes.tiles.dq
        _backward_dq_kernel[grid](
            tma("q", q, block), tma("k", k, rows), tma("v", v, rows), tma("do", do, block), lse, delta, dq,
            items, T, inner, sizes.scale, sizes.K**-0.5, **sizes.backward_options(block, rows),
        )  # fmt: skip
    # dk and dv have the same programs, and one after the other they use the same buffer for their parts.
    parts = head_parts(documents, sizes.group, G, block)
    items = tile_items(documents, documents, block, late_first=False)
    grid, inner = head_grid(T, len(items), G, parts)
    partial = None if parts == 1 else torch.empty(parts, *k.shape, dtype=torch.float32, device=k.device)
    if dk is not None:
        rows = sizes.tiles.dk
        _backward_dk_kernel[grid](
            tma("q", q, rows), tma("k", k, block), tma("v", v, block), tma("do", do, rows), lse, delta,
            dk if partial is None else partial, items, T, inner, parts, sizes.scale, sizes.K**-0.5,
            **sizes.backward_options(rows, block),
        )  # fmt: skip
        _add_parts(partial, dk)
    if dv is not None:
        rows = sizes.tiles.dv
        _backward_dv_kernel[grid](
            tma("q", q, rows), tma("k", k, block), tma("do", do, rows), lse,
            dv if partial is None else partial, items, T, inner, parts, sizes.scale,
            **sizes.backward_options(rows, block),
        )  # fmt: skip
        _add_parts(partial, dv)
    return dq, dk, dv


def _add_parts(partial: Tensor | None, out: Tensor) -> None:
    """out = partial.sum(0), in fp32 and in order; nothing to do without parts."""
    if partial is not None:
        n = out.numel()
        _add_parts_kernel[(triton.cdiv(n, 2048),)](partial, out, n, len(partial), BLOCK=2048, num_warps=4)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        o, lse = _forward(q, k, v, documents, documents)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.documents = documents
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do: Tensor):
        # Autograd may pass a gradient that is expanded (from a sum) or permuted: TMA can read neither.
        do = do if tma_reads(do) else do.contiguous()
        return *_backward(do, *ctx.saved_tensors, ctx.documents, ctx.needs_input_grad[:3]), None


def causal_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, key_documents: Documents | None = None
) -> Tensor:
    """causal_attention_reference in Triton for bf16, fp16 and fp32; q, k and v may have any row stride that is a
    multiple of 16 bytes. Head sizes without kernels (see `triton_supports`) run the reference.

    ValueError for other dtypes, for shapes that do not fit, for a layout that TMA cannot read, and where a gradient
    would be needed with `key_documents`, which only generation uses.
    """
    keys = documents if key_documents is None else key_documents
    if not triton_supports(q.shape[2]):
        return causal_attention_reference(q, k, v, documents, key_documents)
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"attention kernels take q, k, v of one 16-bit dtype or fp32; got {q.dtype, k.dtype, v.dtype}")
    if q.shape[1] % k.shape[1] or k.shape != v.shape or k.shape[2] != q.shape[2]:
        raise ValueError(f"q {tuple(q.shape)} cannot read k {tuple(k.shape)}, v {tuple(v.shape)}: expected (T, n G, K)")
    if len(q) != documents.total or len(k) < keys.total:
        raise ValueError(f"{len(q)} queries, {len(k)} keys, but documents of {documents.total} and {keys.total} tokens")
    if key_documents is None:
        return _CausalAttention.apply(q, k, v, documents)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("attention with key_documents has no gradient: call it under torch.no_grad()")
    for i, (queries, key_count) in enumerate(zip(documents.lengths, keys.lengths, strict=True)):
        if key_count < queries:
            raise ValueError(f"document {i} has {queries} queries but only {key_count} keys")
    return _forward(q, k, v, documents, keys)[0]
