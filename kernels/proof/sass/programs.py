"""What the kernels of the 27B's two cores do in a training step: programs, trips of their loops, launches.

A step is four micro-batches of one document of 4,096 tokens. Tables are those that the launchers build. Whoever changes
a kernel's loops changes its trips here: where code and trips do not fit, the model says so.
"""

from collections.abc import Iterator
from typing import NamedTuple

from kernels.ops import attention_schedule, causal_attention
from kernels.ops import gated_delta_rule_forward as delta_rule
from kernels.proof.cases._shared import packed

TOKENS = 4096
MICRO_BATCHES = 4
ATTENTION_LAYERS, DELTA_LAYERS = 16, 48
HEADS, KEY_HEADS, HEAD = 24, 4, 256  # of attention
VALUE_HEADS, DELTA_KEY_HEADS, WIDTH = 48, 16, 128  # of the delta rule
# Layer 0 is a delta-net layer. Backward stops at the first adapter, which lies behind its mixer.
DELTA_BACKWARD_LAYERS = DELTA_LAYERS - 1


class Launch(NamedTuple):
    """One launch of a kernel.

    kernel: the name in launches.json, of the operation `op`. programs: for each the trips of its loops, in the order
    in which the GPU takes them. launches: in a step. rare: whether an `if` inside a loop is almost never entered.
    bytes: read and written by a kernel whose least time memory may set.
    """

    kernel: str
    op: str
    backward: bool
    programs: list[tuple[int, ...]]
    launches: int
    rare: bool = False
    bytes: int = 0


def launches() -> list[Launch]:
    """All launches of both cores, forward first."""
    return [*_attention(), *_delta_rule()]


def _attention() -> Iterator[Launch]:
    documents = packed([TOKENS])
    tiles = causal_attention.TILES[2, HEAD]
    group, count = HEADS // KEY_HEADS, ATTENTION_LAYERS * MICRO_BATCHES

    def starts(late_first: bool) -> list[int]:
        """The first row of every tile, the tile with the most work first."""
        items = attention_schedule.tile_items(documents, documents, tiles.block, late_first)
        return [first for _, _, first, *_ in items.tolist()]

    def launch(kernel: str, programs: list[tuple[int, ...]], backward: bool = True, bytes: int = 0) -> Launch:
        return Launch(f"causal_attention {kernel}", "causal_attention", backward, programs, count, bytes=bytes)

    queries, keys = starts(late_first=True), starts(late_first=False)
    masked = tiles.block // tiles.forward
    forward = [(first // tiles.forward, masked) for first in queries for _ in range(HEADS)]
    yield launch("forward", forward, backward=False)
    yield launch("delta", [()] * (HEADS * TOKENS // 32), bytes=2 * 2 * TOKENS * HEADS * HEAD)
    yield launch("backward_dq", [((first + tiles.block) // tiles.dq,) for first in queries for _ in range(HEADS)])
    parts = attention_schedule.head_parts(documents, group, KEY_HEADS, tiles.block)
    heads = group // parts  # of a program
    # dv has a loop for the blocks of queries that see a part of the tile's keys, and one for those that see all.
    steps = {
        "dk": [(heads * (TOKENS - first) // tiles.dk,) for first in keys],
        "dv": [(heads * tiles.block // tiles.dv, heads * (TOKENS - first - tiles.block) // tiles.dv) for first in keys],
    }
    for kernel, trips in steps.items():
        dtype = "fp32" if parts > 1 else "bf16"
        programs = [trip for trip in trips for _ in range(KEY_HEADS * parts)]
        yield launch(f"backward_{kernel}, p_{kernel} *{dtype}", programs)
        if parts > 1:
            n = TOKENS * KEY_HEADS * HEAD
            yield launch("add_parts", [(parts,)] * (n // 2048), bytes=(4 * parts + 2) * n)


def _delta_rule() -> Iterator[Launch]:
    plan = delta_rule.schedule(packed([TOKENS]))
    chunks, segments = len(plan.chunks), plan.segments[:, 2].tolist()
    columns = WIDTH // 64  # blocks of 64 value columns, of which a walk has one
    group = VALUE_HEADS // DELTA_KEY_HEADS

    def launch(
        kernel: str, programs: list[tuple[int, ...]], backward: bool = True, rare: bool = False, bytes: int = 0
    ) -> Launch:
        count = MICRO_BATCHES * (DELTA_BACKWARD_LAYERS if backward else DELTA_LAYERS)
        file = "forward" if kernel.startswith(("prepare", "states", "factors")) else "backward"
        return Launch(f"gated_delta_rule_{file} {kernel}", "gated_delta_rule", backward, programs, count, rare, bytes)

    yield launch("prepare", [()] * (chunks * VALUE_HEADS), backward=False)
    # Rare: the checkpoint is stored before every 16th chunk.
    saving = "HAS_INITIAL False, STORE_CHECKPOINTS True, p_checkpoints *fp32"
    yield launch(f"states, {saving}", [(chunks,)] * (columns * VALUE_HEADS), backward=False, rare=True)
    # Per token and value head: c, its fine part and beta, two norms; and three factors.
    for backward in (False, True):
        yield launch("factors", [()] * (chunks * VALUE_HEADS), backward, bytes=4 * 8 * TOKENS * VALUE_HEADS)
    walk = [(-(-tokens // delta_rule.CHUNK),) for tokens in segments for _ in range(columns * VALUE_HEADS)]
    # Bytes of one tensor: q or k, v or R, S of every chunk, M or P, and dP or Y, which are sums over value heads.
    keys, values = (2 * TOKENS * heads * WIDTH for heads in (DELTA_KEY_HEADS, VALUE_HEADS))
    states = 2 * chunks * VALUE_HEADS * WIDTH**2
    tiles, sums = (2 * chunks * heads * delta_rule.CHUNK**2 for heads in (VALUE_HEADS, DELTA_KEY_HEADS))
    yield launch("recompute", walk, bytes=keys + 2 * values + tiles + states)
    yield launch("reverse", [(chunks,)] * (columns * VALUE_HEADS), bytes=2 * keys + 2 * values + 2 * tiles + states)
    programs = chunks * DELTA_KEY_HEADS  # each with a loop over the value heads; dk has two
    yield launch("within", [(group,)] * programs, bytes=keys + 3 * values + tiles + 2 * sums)
    yield launch("dq", [(group,)] * programs, bytes=3 * keys + values + states + sums)
    yield launch("dk", [(group, group)] * programs, bytes=3 * keys + 2 * values + 2 * states + 2 * sums)
