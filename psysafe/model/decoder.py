"""The text decoder of every dense Qwen3.5: embedding, blocks of (mixer, MLP), final norm, head.

Everything is one flat row of tokens with document boundaries: no padding, no mask, positions restart per document.
A block maps (h, pending) to (h, pending): `pending` is what its last GEMM wrote, with the adapter term still to be
added; the next residual + RMSNorm adds both. Every fused operation comes from `kernels`; the GEMMs in between are plain
`F.linear` on frozen, fused weights. Equations: transformers' `modeling_qwen3_5.py`.

Shapes, with the letters of kernels/ops/__init__.py: T tokens, D hidden, H query heads, G key/value heads, K head size,
P pairs that RoPE rotates, I intermediate, r rank, J columns of u (r for each projection of x).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from kernels import Documents, LoRATerm, Pending
from psysafe.model.cache import CacheView, StepView
from psysafe.model.config import ModelConfig
from psysafe.model.gated_delta_net import GatedDeltaNet
from psysafe.model.layers import FusedLinear, frozen


class Batch(NamedTuple):
    """What all blocks of a forward pass share. cos and sin (T, P) in fp32 or wider; adapter_weights (T, r) or None."""

    documents: Documents
    cos: Tensor
    sin: Tensor
    cache: CacheView | StepView | None
    adapter_weights: Tensor | None


class Attention(nn.Module):
    """Gated softmax attention with grouped heads and partial rotary embedding."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        parts = {"q_proj": 2 * config.attention_out, "k_proj": config.attention_kv, "v_proj": config.attention_kv}
        self.in_proj = FusedLinear(config.hidden_size, parts)
        self.out_proj = FusedLinear(config.attention_out, {"o_proj": config.hidden_size})
        self.q_norm, self.k_norm = frozen(config.head_dim), frozen(config.head_dim)

    def forward(self, x: Tensor, u: Tensor | None, batch: Batch, layer: int) -> Pending:
        """x (T, D), u (T, 3r) of in_proj's adapter -> y (T, D) of o_proj, its adapter's term pending."""
        qgkv = self.in_proj(x)  # (T, 2*H*K + 2*G*K): q and gate head by head, then k, then v
        q, gate, k, v = self.rope(qgkv, self.in_proj.lora_term(u, batch.adapter_weights), batch.cos, batch.sin)
        if batch.cache is None:
            o = kernels.causal_attention(q, k, v, batch.documents)  # (T, H, K)
        else:
            o = batch.cache.attend(layer, q, k, v, batch.documents)
        x, u = kernels.sigmoid_gate(o.flatten(1), gate, self.out_proj.lora_A)  # (T, H*K), (T, r)
        return Pending(self.out_proj(x), self.out_proj.lora_term(u, batch.adapter_weights))

    def rope(self, qgkv: Tensor, lora_term: LoRATerm | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Norms of q and k, then rotary embedding -> q (T, H, K), gate (T, H*K), k (T, G, K), v (T, G, K)."""
        H, G, eps = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.rms_norm_eps
        return kernels.qk_norm_rope(qgkv, self.q_norm, self.k_norm, cos, sin, H, G, eps, lora_term)


class MLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, size = config.hidden_size, config.intermediate_size
        self.in_proj = FusedLinear(D, {"gate_proj": size, "up_proj": size})
        self.out_proj = FusedLinear(size, {"down_proj": D})

    def forward(self, x: Tensor, u: Tensor | None, adapter_weights: Tensor | None = None) -> Pending:
        """x (T, D), u (T, 2r) of in_proj's adapter -> y (T, D) of down_proj, its adapter's term pending."""
        gate_up = self.in_proj(x)  # (T, 2*I)
        lora_term = self.in_proj.lora_term(u, adapter_weights)
        x, u = kernels.swiglu(gate_up, lora_term, self.out_proj.lora_A)  # (T, I), (T, r)
        return Pending(self.out_proj(x), self.out_proj.lora_term(u, adapter_weights))


class Block(nn.Module):
    """h += mixer(norm(h)); h += mlp(norm(h)), with both additions left to the next norm."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.eps = layer, config.rms_norm_eps
        self.input_layernorm = frozen(config.hidden_size)
        self.is_attention = config.layer_types[layer] == "full_attention"
        if self.is_attention:
            self.self_attn = Attention(config)
        else:
            self.linear_attn = GatedDeltaNet(config)
        self.post_attention_layernorm = frozen(config.hidden_size)
        self.mlp = MLP(config)

    @property
    def mixer(self) -> Attention | GatedDeltaNet:
        return self.self_attn if self.is_attention else self.linear_attn

    def forward(
        self, h: Tensor, pending: Pending | None, batch: Batch, rows: Tensor | None = None
    ) -> tuple[Tensor, Pending]:
        """h (T, D), pending.y (T, D) -> the same; with `rows` (N,) the MLP runs on those rows only: (N, D)."""
        h, x, u = self.add_and_norm(h, pending, self.input_layernorm, self.mixer.in_proj.lora_A)
        pending, adapter_weights = self.mix(x, u, batch), batch.adapter_weights
        if rows is not None:
            h, pending = h.index_select(0, rows), _select(pending, rows)
            adapter_weights = None if adapter_weights is None else adapter_weights.index_select(0, rows)
        h, x, u = self.add_and_norm(h, pending, self.post_attention_layernorm, self.mlp.in_proj.lora_A)
        return h, self.mlp(x, u, adapter_weights)

    def add_and_norm(
        self, h: Tensor, pending: Pending | None, weight: Tensor, lora_A: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """h' = h + y + s u B^T (T, D), x = rms_norm(h') (T, D), and u = x A^T (T, J) of the projections of x."""
        return kernels.residual_rms_norm(h, pending, weight, self.eps, lora_A)

    def mix(self, x: Tensor, u: Tensor | None, batch: Batch) -> Pending:
        if self.is_attention:
            return self.self_attn(x, u, batch, self.layer)
        return self.linear_attn(x, u, batch.documents, batch.cache, self.layer, batch.adapter_weights)


class Qwen3_5(nn.Module):
    """The decoder. Parameters are frozen; adapters are attached by `psysafe.model.lora`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = frozen(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = frozen(config.hidden_size)
        self.lm_head = None if config.tie_word_embeddings else frozen(config.vocab_size, config.hidden_size)

    @property
    def head(self) -> Tensor:
        """(vocab, D): the output matrix, which tied models share with the embedding."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | Documents,
        cache: CacheView | StepView | None = None,
        rows: Tensor | None = None,
        adapter_weights: Tensor | None = None,
    ) -> Tensor:
        """tokens (T,) int64, cu_seqlens (n+1,) int32 -> hidden (T, D), final norm applied.

        cu_seqlens on the CPU (or Documents) costs no synchronisation. cache: the documents continue the sequences that
        it holds. rows (N,) int64: only these rows are wanted, (N, D); the last MLP runs on them alone.
        adapter_weights (T, r): which adapter each token has, where several are attached (mixed_adapters.py).
        """
        documents = cu_seqlens if isinstance(cu_seqlens, Documents) else Documents(cu_seqlens, tokens.device)
        if tokens.shape != (documents.total,):
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, cu_seqlens end at {documents.total}")
        positions = documents.positions if cache is None else cache.positions(documents)  # (T,)
        batch = Batch(documents, *self.rotary(positions), cache, adapter_weights)
        h, pending = self.embed(tokens), None  # (T, D)
        for layer in self.layers:
            h, pending = layer(h, pending, batch, rows if layer is self.layers[-1] else None)
        _, x, _ = kernels.residual_rms_norm(h, pending, self.norm, self.config.rms_norm_eps)  # (T or N, D)
        if cache is not None:
            cache.advance(documents)
        return x

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (T,) -> (T, D). An embedding in host memory wants its tokens there, too: that costs no wait."""
        h = self.embed_tokens.index_select(0, tokens.to(self.embed_tokens.device))
        if h.device != self.norm.device:
            # Only from pinned memory is a copy to a GPU asynchronous.
            h = (h.pin_memory() if self.norm.is_cuda else h).to(self.norm.device, non_blocking=True)
        return h

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (N, D) -> (N, vocab), in the activation dtype."""
        return F.linear(hidden, self.head)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (T,) -> cos, sin (T, P) in fp32, as the reference computes them (fp64 in an fp64 model)."""
        config = self.config
        dtype = torch.promote_types(self.norm.dtype, torch.float32)
        exponents = torch.arange(0, config.rotary_dim, 2, dtype=dtype, device=positions.device) / config.rotary_dim
        angles = positions[:, None].to(dtype) * config.rope_theta**-exponents
        return angles.cos(), angles.sin()


def _select(pending: Pending, rows: Tensor) -> Pending:
    """The rows (N,) of y and of u: B has none, it belongs to all tokens."""
    lora = pending.lora
    if lora is not None:
        lora = lora._replace(u=lora.u.index_select(0, rows))
    return Pending(pending.y.index_select(0, rows), lora)
