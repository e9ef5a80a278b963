"""How many sequences are decoded together: as many cache slots as are wanted and fit into free memory."""

import os
from pathlib import Path

import torch

from psysafe.model.cache import Cache
from psysafe.model.decoder import Qwen3_5
from psysafe.program import UserError

# Decoding reads all weights once a step, whatever the batch: more slots are almost free until arithmetic dominates.
MAX_SLOTS = {"cuda": 64, "cpu": 8}
CACHE_SHARE = 0.8  # of the free memory; the rest is for activations and logits


def choose_slots(
    model: Qwen3_5,
    max_tokens: int,
    wanted: int,
    exactly: bool,
    remedy: str = "lower --batch-size, --context or --max-new-tokens",
) -> int:
    """How many sequences of max_tokens fit in free memory, at most `wanted`. Raises UserError when none does, or fewer
    than wanted `exactly`; it ends in the remedy."""
    device = model.embed_tokens.device
    slot_bytes = Cache(model.config, 1, max_tokens, "meta", model.embed_tokens.dtype).bytes_per_slot
    free_bytes = memory_free(device)
    n_fitting = int(free_bytes * CACHE_SHARE / slot_bytes)
    min_slots = wanted if exactly else 1
    if n_fitting < min_slots:
        raise UserError(
            f"{min_slots} x {max_tokens:,} tokens need {min_slots * slot_bytes / 1e6:,.1f} MB of cache, but of "
            f"{free_bytes / 1e6:,.1f} MB free memory it may take {CACHE_SHARE:.0%}; {remedy}"
        )
    return min(wanted, n_fitting)


def memory_free(device: torch.device) -> int:
    """Bytes that can still be had on the device."""
    if device.type == "cuda":
        # torch keeps what it has freed: to the driver that memory is in use, to us it is free.
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # no Linux: count what is unused, or half of all
        pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages) // 2
