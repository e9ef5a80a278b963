"""causal_attention: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.documents import Documents
from kernels.ops import causal_attention as ops
from kernels.proof.cases._shared import packed, random_on
from kernels.proof.closeness import Case
from kernels.proof.contract import Baseline, Op, Peer, Work
from kernels.proof.launches import launched


def make_case(
    lengths: list[int], heads: int, kv_heads: int, head_dim: int,
    device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0, logits: float = 1.0,
) -> Case:  # fmt: skip
    """Documents of these lengths with normal q, k, v; `logits` multiplies q, so that the softmax gets sharp."""
    draw, _ = random_on(device, seed)
    documents = packed(lengths, device)
    T = sum(lengths)
    inputs = {"q": logits * draw(T, heads, head_dim)}
    inputs |= {name: draw(T, kv_heads, head_dim) for name in ("k", "v")}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    # A lone token's dq and dk are zero: what is computed of them is rounding, which has no relative error.
    grads = ("v",) if max(lengths) == 1 else ("q", "k", "v")
    return Case(inputs, lambda op, x: {"o": op(x["q"], x["k"], x["v"], documents)}, grads)


_27B = {"heads": 24, "kv_heads": 4, "head_dim": 256}
CASES = [
    {"lengths": [4096], **_27B},
    {"lengths": [650] * 6 + [196], **_27B},
    {"lengths": [1], "heads": 2, "kv_heads": 1, "head_dim": 64},
    {"lengths": [63, 64, 65], "heads": 4, "kv_heads": 2, "head_dim": 64},
    {"lengths": [1, 2, 3, 1, 1, 5, 8, 31, 1, 33], "heads": 3, "kv_heads": 1, "head_dim": 128},
    {"lengths": [40, 1, 37], "heads": 6, "kv_heads": 1, "head_dim": 256},
    {"lengths": [70, 30], "heads": 2, "kv_heads": 2, "head_dim": 64, "logits": 8.0},
]


def _mutant(change: str):
    """The op by its definition, with one mistake."""

    def op(q: Tensor, k: Tensor, v: Tensor, documents: Documents, key_documents: Documents | None = None) -> Tensor:
        (T, H, K), G = q.shape, k.shape[1]
        heads = torch.arange(H, device=q.device)
        heads = heads % G if change == "tiled heads" else heads // (H // G)
        k, v = k[:, heads], v[:, heads]
        if change == "missing group sum":
            first = (torch.arange(H, device=q.device) % (H // G) == 0)[:, None]
            k, v = torch.where(first, k, k.detach()), torch.where(first, v, v.detach())
        t = torch.arange(T, device=q.device)
        hidden = t[:, None] < t
        if change == "strictly causal":  # a document's first token must see something: itself
            hidden |= (t[:, None] == t) & (documents.positions > 0)
        if change != "no document boundaries":
            hidden |= documents.index[:, None] != documents.index
        s = torch.einsum("qhk,shk->hqs", q, k) * K**-0.5 * (1.01 if change == "wrong scale" else 1)
        return torch.einsum("hqs,shk->qhk", s.masked_fill(hidden, float("-inf")).softmax(-1), v)

    return op


_MISTAKES = "strictly causal", "missing group sum", "no document boundaries", "wrong scale", "tiled heads"
MUTANTS = {change: _mutant(change) for change in _MISTAKES}


def work(lengths: list[int], heads: int, kv_heads: int, head_dim: int, **_: object) -> Work:
    """bf16. Forward: two dots over the causal half, q, k, v, o, lse once. Backward: five, do, dq, dk, dv and these."""
    T, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    queries, keys, lse = 2 * T * heads * head_dim, 2 * T * kv_heads * head_dim, 4 * T * heads
    dot = 2 * pairs * heads * head_dim
    return Work(2 * queries + 2 * keys + lse, 4 * queries + 4 * keys + lse, 2 * dot, 5 * dot)


# Other versions in plain PyTorch, and other people's kernels


def _sdpa(backend: SDPBackend) -> Callable:
    """torch's attention through one of its backends, one call a document."""

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        with sdpa_kernel(backend):
            return ops.causal_attention_reference(q, k, v, documents)

    return attend


torch_flash_attention = _sdpa(SDPBackend.FLASH_ATTENTION)


def _sdpa_peer(backend: SDPBackend) -> Callable:
    def prepare(size: dict, device: str):
        documents = packed(size["lengths"], device)
        return lambda x: _sdpa(backend)(x["q"], x["k"], x["v"], documents)

    return prepare


def _varlen(size: dict, device: str):
    attend = import_module("torch.nn.attention.varlen").varlen_attn
    cu, longest = packed(size["lengths"], device).cu_seqlens, max(size["lengths"])
    return lambda x: attend(x["q"], x["k"], x["v"], cu, cu, longest, longest, window_size=(-1, 0), enable_gqa=True)


def _flex(size: dict, device: str):
    flex = import_module("torch.nn.attention.flex_attention")
    documents, T = packed(size["lengths"], device), sum(size["lengths"])
    index = documents.index
    mask = flex.create_block_mask(lambda b, h, q, k: (q >= k) & (index[q] == index[k]), None, None, T, T, device)
    attend = torch.compile(flex.flex_attention, dynamic=False)

    def call(x: dict[str, Tensor]) -> Tensor:
        q, k, v = (x[name].transpose(0, 1)[None] for name in ("q", "k", "v"))
        return attend(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return call


OP = Op(
    "causal_attention", ops.causal_attention_reference, ops.causal_attention_triton, CASES, make_case, MUTANTS, work,
    launched("causal_attention"),
    permuted=(
        {"lengths": [1, 63, 64, 65, 127, 128, 129, 650, 2048], **_27B},
        {"lengths": [1, 3, 66], "heads": 2, "kv_heads": 1, "head_dim": 64},
    ),
    baselines=tuple(
        Baseline("torch's flash", {"lengths": [length], **_27B, "logits": logits}, torch_flash_attention)
        for length in (1, 63, 64, 65, 127, 128, 129, 650, 4096)
        for logits in (1.0, 8.0)
    ),
    peers=(
        Peer("SDPA flash", "torch", _sdpa_peer(SDPBackend.FLASH_ATTENTION)),
        Peer("SDPA cuDNN", "torch", _sdpa_peer(SDPBackend.CUDNN_ATTENTION)),
        Peer("torch varlen", "torch", _varlen),
        Peer("FlexAttention", "torch", _flex),
    ),
)  # fmt: skip
