"""What the model remembers of sequences: keys and values of attention layers, convolution tail and state of delta-net
layers, one slot a sequence.

The model's one forward uses it through a `CacheView` (some slots); prefill, prefill in pieces and decoding differ only
in how many tokens a document brings.
"""

import torch
from torch import Tensor

import kernels
from kernels import Documents
from psysafe.model_config import ModelConfig


class Cache:
    """Memory for `slots` sequences of up to `max_tokens` tokens each.

    Attention layer: k, v (slots, max_tokens, G, K). Delta-net layer: conv (slots, M-1, C), the last inputs of the
    convolution; state (slots, H, dk, dv) in fp32. `lengths` (slots,) int64 on the device, `host_lengths` beside it.
    """

    def __init__(self, config: ModelConfig, slots: int, max_tokens: int, device=None, dtype=torch.float32):
        self.config, self.slots, self.max_tokens = config, slots, max_tokens
        G, K = config.num_key_value_heads, config.head_dim
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        taps, heads = config.linear_conv_kernel_dim, config.linear_num_value_heads
        wide = torch.promote_types(dtype, torch.float32)

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(slots, *shape, device=device, dtype=dtype)

        self.layers: list[tuple[Tensor, Tensor]] = [
            (zeros(max_tokens, G, K), zeros(max_tokens, G, K))
            if kind == "full_attention"
            else (
                zeros(taps - 1, 2 * keys + values),
                zeros(heads, config.linear_key_head_dim, config.linear_value_head_dim, dtype=wide),
            )
            for kind in config.layer_types
        ]
        self.lengths = zeros(dtype=torch.int64)
        self.host_lengths = [0] * slots

    @property
    def bytes_per_slot(self) -> int:
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer) // self.slots

    def reset(self, slots: list[int]) -> None:
        """Empties slots. Keys behind a slot's length are never read; states have to be zeroed."""
        for kind, (conv, state) in zip(self.config.layer_types, self.layers, strict=True):
            if kind != "full_attention":
                conv[slots], state[slots] = 0, 0
        self.lengths[slots] = 0
        for slot in slots:
            self.host_lengths[slot] = 0

    def at(self, slots: list[int] | None = None) -> "CacheView":
        """The given slots in this order (None: all). Decoding all slots works in place; others are gathered."""
        return CacheView(self, slots)


class CacheView:
    """The slots that a forward pass continues, document i in the i-th of them."""

    def __init__(self, cache: Cache, slots: list[int] | None):
        self.cache = cache
        self.everything = slots is None or slots == list(range(cache.slots))
        self.host_slots = list(range(cache.slots)) if slots is None else slots
        self.slots = torch.tensor(self.host_slots, device=cache.lengths.device)
        self.past = cache.lengths[self.slots]
        self.host_past = [cache.host_lengths[slot] for slot in self.host_slots]

    def positions(self, documents: Documents) -> Tensor:
        """(T,): positions in the whole sequences. Raises ValueError where a sequence would outgrow its slot."""
        if len(documents) != len(self.host_slots):
            raise ValueError(f"{len(documents)} documents for {len(self.host_slots)} cache slots")
        for slot, past, new in zip(self.host_slots, self.host_past, documents.lengths, strict=True):
            if past + new > self.cache.max_tokens:
                raise ValueError(
                    f"cache slot {slot} holds {past} tokens and would get {new} more, "
                    f"but was made for {self.cache.max_tokens}; make the cache larger or the prompt shorter"
                )
        return documents.positions + self.past[documents.index]

    def advance(self, documents: Documents) -> None:
        new = documents.table("lengths", lambda d: d.to_device(torch.tensor(d.lengths)))
        self.cache.lengths.index_add_(0, self.slots, new)
        for slot, count in zip(self.host_slots, documents.lengths, strict=True):
            self.cache.host_lengths[slot] += count

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        """q (T, H, K), k and v (T, G, K) of the new tokens -> o (T, H, K)."""
        k_cache, v_cache = self.cache.layers[layer]
        where = self.slots[documents.index], self.positions(documents)
        k_cache[where], v_cache[where] = k, v
        if documents.total == len(documents):
            caches = (k_cache, v_cache) if self.everything else (k_cache[self.slots], v_cache[self.slots])
            return kernels.attention_decode(q, *caches, self.past + 1)
        if not any(self.host_past):
            return kernels.causal_attention(q, k, v, documents)
        keys, rows = self._all_keys(documents)
        return kernels.causal_attention(q, k_cache.flatten(0, 1)[rows], v_cache.flatten(0, 1)[rows], documents, keys)

    def convolve(self, layer: int, x: Tensor, weight: Tensor, documents: Documents, splits) -> tuple[Tensor, ...]:
        """x (T, C), as `causal_conv1d_silu`, with the tails of the slots before and, after it, in them."""
        conv = self.cache.layers[layer][0]
        tail = conv if self.everything else conv[self.slots]
        out = kernels.causal_conv1d_silu(x, weight, documents, splits, initial_state=tail)
        kept = tail.shape[1]
        lengths = documents.table("lengths", lambda d: d.to_device(torch.tensor(d.lengths)))
        # Row j of the new tail is row (length + j) of [old tail | new rows].
        row = lengths[:, None] + torch.arange(kept, device=x.device)
        starts = documents.cu_seqlens[:-1, None].long()
        old = tail.gather(1, row.clamp(max=kept - 1)[..., None].expand(-1, -1, tail.shape[2]))
        new = x[(starts + row - kept).clamp(min=0)]
        self._store(conv, torch.where((row < kept)[..., None], old, new))
        return out

    def delta_rule(self, layer: int, q, k, v, a, b, A_log, dt_bias, documents: Documents) -> Tensor:
        """As `gated_delta_rule`, from and into the slots' states."""
        store = self.cache.layers[layer][1]
        state = store if self.everything else store[self.slots]
        if documents.total == len(documents):
            o = kernels.gated_delta_rule_step(q, k, v, a, b, A_log, dt_bias, state)
        else:
            o, state = kernels.gated_delta_rule(
                q, k, v, a, b, A_log, dt_bias, documents, initial_state=state, output_final_state=True
            )
        if state is not store:
            self._store(store, state)
        return o

    def _store(self, store: Tensor, value: Tensor) -> None:
        if self.everything:
            store.copy_(value)
        else:
            store[self.slots] = value

    def _all_keys(self, documents: Documents) -> tuple[Documents, Tensor]:
        """Old and new keys of every document: their boundaries, and their rows in the flattened cache."""

        def build(_: Documents) -> tuple[Documents, Tensor]:
            totals = [past + new for past, new in zip(self.host_past, documents.lengths, strict=True)]
            bounds = torch.tensor([0, *totals]).cumsum(0).to(torch.int32)
            starts = [slot * self.cache.max_tokens for slot in self.host_slots]
            rows = [start + torch.arange(total) for start, total in zip(starts, totals, strict=True)]
            return Documents(bounds, documents.device), documents.to_device(torch.cat(rows))

        return documents.table(("all keys", *self.host_slots, *self.host_past), build)
