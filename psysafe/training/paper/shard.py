"""What sharding adds to a step on paper: the gathers, by arithmetic. FSDP2 itself does not run on the meta device.

A rank holds ceil(rows / ranks) rows of every frozen parameter of a block. Each pass through a block, forward and
backward, gathers all of them first (psysafe/model/shard.py); recomputation happens inside the backward pass and needs
no gather of its own. tests/test_paper.py compares both numbers with those of two ranks that really run.
"""

from typing import NamedTuple

from psysafe.data.documents import pack_share
from psysafe.model.decoder import Qwen3_5
from psysafe.training.setup import Run


class Gathers(NamedTuple):
    """Of one rank in one step. bytes: of the gathered parameters; a rank receives (ranks - 1) / ranks of them."""

    count: int
    bytes: int


def gathers(model: Qwen3_5, ranks: int, micro_batches: int) -> Gathers:
    """All gathers of a step of so many micro-batches on every rank."""
    per_pass = 0
    for block in model.layers:
        for p in block.parameters():
            if not p.requires_grad:  # adapters are whole on every rank
                padded_rows = -(-p.shape[0] // ranks) * ranks
                per_pass += padded_rows * p[:1].numel() * p.element_size()
    return Gathers(2 * micro_batches * len(model.layers), 2 * micro_batches * per_pass)


def describe_gathers(model: Qwen3_5, ranks: int, run: Run) -> str:
    micro_batches = len(pack_share(run.train_set.documents, run.config.micro_batch_tokens))
    count, size = gathers(model, ranks, micro_batches)
    return (
        f"sharded over {ranks} ranks: {count:,} gathers of {size / count / 1e6:,.0f} MB on average, "
        f"{size * (ranks - 1) / ranks / 1e9:,.1f} GB received by each rank a step (arithmetic, not traced)"
    )
