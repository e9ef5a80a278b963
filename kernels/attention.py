"""Causal grouped-query attention over packed documents, and its one-token form over a cache.

    S = q k^T / sqrt(K)   (key position <= query position, same document)     o = softmax(S) v

Query head j reads key/value head j // (H/G). Softmax in fp32, o rounded once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.seams import Documents, compute_dtype


def causal_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, key_documents: Documents | None = None
) -> Tensor:
    """q (T, H, K), k and v (S, G, K) -> o (T, H, K).

    `key_documents` (default: `documents`, S = T) says where each document's keys lie when it has more keys than
    queries: its queries are then its last tokens (prefill in pieces over a cache).
    """
    keys = documents if key_documents is None else key_documents
    outs = []
    for i, (m, n) in enumerate(zip(documents.lengths, keys.lengths, strict=True)):
        if n < m:
            raise ValueError(f"document {i} has {m} queries but only {n} keys")
        qs = q[documents.bounds[i] : documents.bounds[i + 1]].transpose(0, 1)[None]
        ks, vs = (x[keys.bounds[i] : keys.bounds[i + 1]].transpose(0, 1)[None] for x in (k, v))
        mask = None if m == n else torch.ones(m, n, dtype=torch.bool, device=q.device).tril(n - m)
        o = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, is_causal=m == n, enable_gqa=True)
        outs.append(o[0].transpose(0, 1))
    return torch.cat(outs)


def attention_decode_reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """One query a sequence over its cache: q (B, H, K), caches (B, S, G, K), lengths (B,) int -> o (B, H, K).

    The query sees the first lengths[b] rows of its cache; its own key is already among them.
    """
    B, H, K = q.shape
    G, longest = k_cache.shape[2], int(lengths.max())
    k_cache, v_cache = k_cache[:, :longest], v_cache[:, :longest]
    dtype = compute_dtype(q)
    q, k, v = q.to(dtype).view(B, G, H // G, K), k_cache.to(dtype), v_cache.to(dtype)
    scores = torch.einsum("bghk,bsgk->bghs", q, k) * K**-0.5
    seen = torch.arange(k.shape[1], device=q.device) < lengths[:, None]
    # Rows behind the length may hold anything, also NaN from an empty cache: 0 * NaN must not reach the sum.
    v = v.masked_fill(~seen[:, :, None, None], 0)
    p = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    return torch.einsum("bghs,bsgk->bghk", p, v).reshape(B, H, K).to(k_cache.dtype)
