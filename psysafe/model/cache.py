"""What decoding remembers, one slot a sequence: keys and values of attention layers, the convolution's last rows and
the state of delta-net layers.

The model's one forward uses the cache through a view: `Cache.at(slots)` for documents of any length that begin or
continue sequences (prefill, also in pieces), `Cache.step(live, max_keys)` for one more token of every slot (decoding).
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

import kernels
from kernels import Documents
from psysafe.model.config import ModelConfig
from psysafe.program import UserError


class Cache:
    """Memory for `slots` sequences of up to `max_tokens` tokens each.

    Attention layer: k, v (slots, G, max_tokens, K), a head's keys side by side. Delta-net layer: conv (slots, M-1, C),
    the last inputs of the convolution; state (slots, H, dk, dv) in fp32. `lengths` (slots,) int64 on the device,
    `host_lengths` beside it.
    """

    def __init__(self, config: ModelConfig, slots: int, max_tokens: int, device=None, dtype=torch.float32):
        self.config, self.slots, self.max_tokens = config, slots, max_tokens
        state_dtype = torch.promote_types(dtype, torch.float32)

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(slots, *shape, device=device, dtype=dtype)

        self.layers: list[tuple[Tensor, Tensor]] = []
        for layer_type in config.layer_types:
            if layer_type == "full_attention":
                shape = config.num_key_value_heads, max_tokens, config.head_dim
                self.layers.append((zeros(*shape), zeros(*shape)))
            else:
                tail = zeros(config.linear_conv_kernel_dim - 1, config.conv_channels)
                self.layers.append((tail, zeros(*config.state_shape, dtype=state_dtype)))
        self.lengths = zeros(dtype=torch.int64)
        self.host_lengths = [0] * slots
        self.bytes_per_slot = config.cache_bytes(max_tokens, dtype)

    def reset(self, slots: list[int]) -> None:
        """Empties slots. States have to be zeroed; so have values, since 0 times the NaN of a broken row is NaN."""
        # x[slots] = 0 would copy the list to the device once for every x, and wait for each copy.
        at = torch.tensor(slots, device=self.lengths.device)
        for x in (*(x for layer in self.layers for x in layer), self.lengths):
            x.index_fill_(0, at, 0)
        for slot in slots:
            self.host_lengths[slot] = 0

    def states(self, slot: int) -> list[Tensor]:
        """Copies of what decode steps overwrite of a slot that is not live: the delta-net layers' tails and states."""
        return [x[slot].clone() for x in self._recurrent()]

    def set_states(self, slot: int, states: list[Tensor]) -> None:
        for x, state in zip(self._recurrent(), states, strict=True):
            x[slot] = state

    def _recurrent(self) -> list[Tensor]:
        """conv and state of every delta-net layer."""
        return [
            x
            for layer, layer_type in zip(self.layers, self.config.layer_types, strict=True)
            if layer_type != "full_attention"
            for x in layer
        ]

    def at(self, slots: list[int] | None = None) -> "CacheView":
        """The given slots in this order (None: all), for documents of any length."""
        return CacheView(self, list(range(self.slots)) if slots is None else slots)

    def step(self, live: Tensor, max_keys: int) -> "StepView":
        """Every slot, for one token each; live (slots,) bool says whose sequences grow by it, to at most `max_keys`.

        Attention gets the first `max_keys` rows of every slot: its reference reads all that it gets, live or not.
        """
        return StepView(self, live, max_keys)


@contextlib.contextmanager
def each_written_once() -> Iterator[None]:
    """For writes by index in which no place is named twice: inside it, torch does not prepare for that.

    Asked for determinism (psysafe/runtime.py), it does so on a GPU: it sorts the indices of a write (a dozen kernels),
    and copies a view that is not contiguous, here a layer's cache, as a whole before the write and back after it.
    """
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


class CacheView:
    """The slots that a forward pass continues, document i in the i-th of them."""

    def __init__(self, cache: Cache, slots: list[int]):
        self.cache, self.host_slots = cache, slots
        self.slots = torch.tensor(slots, device=cache.lengths.device)
        self.past = cache.lengths[self.slots]  # a copy: `advance` changes the cache's own
        self.host_past = [cache.host_lengths[slot] for slot in slots]

    def positions(self, documents: Documents) -> Tensor:
        """(T,): positions in the whole sequences. Raises UserError where a sequence would outgrow its slot."""
        if len(documents) != len(self.host_slots):
            raise UserError(f"{len(documents)} documents for {len(self.host_slots)} cache slots")
        for slot, past, new in zip(self.host_slots, self.host_past, documents.lengths, strict=True):
            if past + new > self.cache.max_tokens:
                raise UserError(
                    f"cache slot {slot} holds {past} tokens and would get {new} more, "
                    f"but has space for {self.cache.max_tokens}; make the cache larger or the prompt shorter"
                )
        return documents.positions + self.past[documents.index]

    def advance(self, documents: Documents) -> None:
        new = documents.table("lengths", lambda d: d.to_device(torch.tensor(d.lengths)))
        self.cache.lengths.index_add_(0, self.slots, new)
        for slot, count in zip(self.host_slots, documents.lengths, strict=True):
            self.cache.host_lengths[slot] += count

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        """q (T, H, K), k and v (T, G, K) of the new tokens -> o (T, H, K)."""
        k_cache, v_cache = (x.transpose(1, 2) for x in self.cache.layers[layer])  # (slots, max_tokens, G, K)
        where = self.slots[documents.index], documents.positions + self.past[documents.index]
        with each_written_once():
            k_cache[where], v_cache[where] = k, v
        # Without a past the new keys are all keys: no gather from the cache.
        if not any(self.host_past):
            return kernels.causal_attention(q, k, v, documents)
        keys, where = self._all_keys(documents)
        return kernels.causal_attention(q, k_cache[where], v_cache[where], documents, keys)

    def convolve(self, layer: int, x: Tensor, weight: Tensor, documents: Documents, splits) -> tuple[Tensor, ...]:
        """x (T, C), as `causal_conv1d_silu`, with the tails of the slots before and, after it, in them."""
        store = self.cache.layers[layer][0]
        tail = store[self.slots]
        out = kernels.causal_conv1d_silu(x, weight, documents, splits, initial_state=tail)
        size = tail.shape[1]  # M - 1
        lengths = documents.table("lengths", lambda d: d.to_device(torch.tensor(d.lengths)))
        # Row j of the new tail is row (length + j) of [old tail | new rows].
        row = lengths[:, None] + torch.arange(size, device=x.device)
        starts = documents.cu_seqlens[:-1, None].long()
        old = tail.gather(1, row.clamp(max=size - 1)[..., None].expand(-1, -1, tail.shape[2]))
        new = x[(starts + row - size).clamp(min=0)]
        with each_written_once():
            store[self.slots] = torch.where((row < size)[..., None], old, new)
        return out

    def delta_rule(self, layer: int, q, k, v, a, b, A_log, dt_bias, documents: Documents) -> Tensor:
        """As `gated_delta_rule`, from and into the slots' states."""
        store = self.cache.layers[layer][1]
        o, state = kernels.gated_delta_rule(
            q, k, v, a, b, A_log, dt_bias, documents, initial_state=store[self.slots], output_final_state=True
        )
        with each_written_once():
            store[self.slots] = state
        return o

    def _all_keys(self, documents: Documents) -> tuple[Documents, tuple[Tensor, Tensor]]:
        """Old and new keys of every document: their boundaries, and their slots and positions."""

        def build(_: Documents) -> tuple[Documents, tuple[Tensor, Tensor]]:
            # Keyed by slots and lengths, because every attention layer of this pass asks for the same table.
            totals = [past + new for past, new in zip(self.host_past, documents.lengths, strict=True)]
            keys = Documents(torch.tensor([0, *totals]).cumsum(0).to(torch.int32), documents.device)
            return keys, (self.slots[keys.index], keys.positions)

        return documents.table(("all keys", *self.host_slots, *self.host_past), build)


class StepView:
    """All slots, each continued by one token.

    A decode step can be captured as one CUDA graph and replayed. So nothing here waits for the device, changes a shape,
    or allocates what outlives the step. Shapes are fixed, so slots that are not live are computed like the others. They
    do not grow: each step overwrites one unused row past their length. They have to be reset before they are used. The
    host does not follow the lengths: it learns from the sampled tokens, one step later, which sequences went on.
    """

    def __init__(self, cache: Cache, live: Tensor, max_keys: int):
        self.cache, self.live, self.max_keys = cache, live, max_keys

    def positions(self, documents: Documents) -> Tensor:
        """(slots,): where the new tokens stand. The caller keeps lengths below the cache's size."""
        return self.cache.lengths

    def advance(self, documents: Documents) -> None:
        self.cache.lengths += self.live

    @functools.cached_property
    def lengths(self) -> Tensor:
        """(slots,): lengths with the new token."""
        return self.cache.lengths + 1

    @functools.cached_property
    def rows(self) -> Tensor:
        """(slots * G,): the rows of the new keys in a cache (slots * G * max_tokens, K)."""
        heads, size = self.cache.config.num_key_value_heads, self.cache.max_tokens
        first = torch.arange(0, self.cache.slots * heads * size, size, device=self.live.device)
        return (first.view(-1, heads) + self.cache.lengths[:, None]).flatten()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        k_cache, v_cache = self.cache.layers[layer]
        # index_copy_ with fixed shapes: an assignment under a mask of live slots would make the host wait.
        with each_written_once():
            k_cache.flatten(0, 2).index_copy_(0, self.rows, k.flatten(0, 1))
            v_cache.flatten(0, 2).index_copy_(0, self.rows, v.flatten(0, 1))
        k, v = (x[:, :, : self.max_keys].transpose(1, 2) for x in (k_cache, v_cache))  # (slots, max_keys, G, K)
        return kernels.attention_decode(q, k, v, self.lengths)

    def convolve(self, layer: int, x: Tensor, weight: Tensor, documents: Documents, splits) -> tuple[Tensor, ...]:
        c = kernels.causal_conv1d_silu_step(x, weight, self.cache.layers[layer][0])
        return c.split_with_sizes(splits, 1)

    def delta_rule(self, layer: int, q, k, v, a, b, A_log, dt_bias, documents: Documents) -> Tensor:
        return kernels.gated_delta_rule_step(q, k, v, a, b, A_log, dt_bias, self.cache.layers[layer][1])
