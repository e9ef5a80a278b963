"""Other people's kernels for the same work, for `kernels.bench`: torch's own, Liger's and flash-linear-attention's.

None is a dependency. Each entry takes a case's inputs (those of the op's make_case) and its size and returns a function
from the inputs to the outputs that get a gradient. Peers know no adapter: they are timed without one, which flatters
them. Written against liger-kernel 0.8.5 and flash-linear-attention 0.6.0; whether they run is the bench's to say.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from kernels.documents import Documents

Inputs = dict[str, Tensor]


class Peer(NamedTuple):
    """package: what has to be importable. prepare(size, device) -> inputs -> outputs."""

    name: str
    package: str
    prepare: Callable[[dict, str], Callable[[Inputs], Tensor | tuple[Tensor, ...]]]

    @property
    def installed(self) -> bool:
        return find_spec(self.package.partition(".")[0]) is not None


def _documents(size: dict, device: str) -> Documents:
    return Documents(torch.tensor([0, *torch.tensor(size["lengths"]).cumsum(0).tolist()], dtype=torch.int32), device)


# Attention


def _sdpa(backend: SDPBackend):
    def prepare(size: dict, device: str):
        documents, reference = _documents(size, device), kernels.OPS["causal_attention"][0]

        def call(x: Inputs) -> Tensor:
            with sdpa_kernel(backend):
                return reference(x["q"], x["k"], x["v"], documents)

        return call

    return prepare


def _varlen(size: dict, device: str):
    attend = import_module("torch.nn.attention.varlen").varlen_attn
    cu, longest = _documents(size, device).cu_seqlens, max(size["lengths"])
    return lambda x: attend(
        x["q"], x["k"], x["v"], cu, cu, longest, longest, window_size=(-1, 0), enable_gqa=True
    )


def _flex(size: dict, device: str):
    flex = import_module("torch.nn.attention.flex_attention")
    documents, T = _documents(size, device), sum(size["lengths"])
    index = documents.index
    mask = flex.create_block_mask(lambda b, h, q, k: (q >= k) & (index[q] == index[k]), None, None, T, T, device)
    attend = torch.compile(flex.flex_attention, dynamic=False)

    def call(x: Inputs) -> Tensor:
        q, k, v = (x[name].transpose(0, 1)[None] for name in ("q", "k", "v"))
        return attend(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return call


# The delta rule and its neighbours


def _fla_delta_rule(size: dict, device: str):
    rule = import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    cu = _documents(size, device).cu_seqlens.long()

    def call(x: Inputs) -> Tensor:
        a, b = x["ab"].chunk(2, dim=1)
        o, _ = rule(
            *(x[name][None] for name in ("q", "k", "v")), g=a[None], beta=b[None], use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, A_log=x["A_log"], dt_bias=x["dt_bias"],
            cu_seqlens=cu,
        )  # fmt: skip
        return o[0]

    return call


def _fla_conv(size: dict, device: str):
    conv = import_module("fla.modules.convolution").causal_conv1d
    cu = _documents(size, device).cu_seqlens.long()
    return lambda x: conv(x["x"][None], x["weight"], activation="silu", cu_seqlens=cu)[0][0].split(size["splits"], -1)


def _fla_gated_norm(size: dict, device: str):
    norm = import_module("fla.modules.fused_norm_gate").rms_norm_gated
    return lambda x: norm(x["o"], x["z"].view_as(x["o"]), x["weight"], None, activation="swish", eps=1e-6).flatten(1)


# Liger


def _liger_norm(size: dict, device: str):
    function = import_module("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction
    return lambda x: function.apply(x["y"], x["h"], x["weight"], 1e-6, 1.0, "gemma", False)


def _liger_swiglu(size: dict, device: str):
    function = import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    return lambda x: function.apply(*x["gate_up"].chunk(2, dim=1))


def _liger_cross_entropy(size: dict, device: str):
    function = import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    options = (None, None, -100, 0.0, 0.0, "sum")  # bias, class weights, ignore_index, z loss, smoothing, reduction

    def call(x: Inputs) -> Tensor:
        return function.apply(x["x"], x["weight"], x["labels"], *options)[0]

    return call


PEERS: dict[str, tuple[Peer, ...]] = {
    "causal_attention": (
        Peer("SDPA flash", "torch", _sdpa(SDPBackend.FLASH_ATTENTION)),
        Peer("SDPA cuDNN", "torch", _sdpa(SDPBackend.CUDNN_ATTENTION)),
        Peer("torch varlen", "torch", _varlen),
        Peer("FlexAttention", "torch", _flex),
    ),
    "gated_delta_rule": (Peer("flash-linear-attention", "fla", _fla_delta_rule),),
    "causal_conv1d_silu": (Peer("flash-linear-attention", "fla", _fla_conv),),
    "gated_rms_norm": (Peer("flash-linear-attention", "fla", _fla_gated_norm),),
    "residual_rms_norm": (Peer("Liger", "liger_kernel", _liger_norm),),
    "swiglu": (Peer("Liger", "liger_kernel", _liger_swiglu),),
    "linear_cross_entropy": (Peer("Liger", "liger_kernel", _liger_cross_entropy),),
}
