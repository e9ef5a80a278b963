"""The linear-attention mixer: Gated DeltaNet (arXiv 2412.06464) as Qwen3.5 uses it.

    q|k|v, z, b, a = in_proj(x)         one frozen GEMM
    q, k, v        = silu(causal conv(q|k|v))
    o              = gated delta rule(q, k, v, a, b)
    y              = out_proj(rms_norm(o) * w * silu(z))

Convolution and state start afresh at every document. Shapes: T tokens, D hidden, G key heads of size K, H value heads
of size V, C = 2*G*K + H*V convolved channels, M taps, r rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from kernels import Documents, LoRATerm, Pending
from kernels.lora_term import add_lora_by_projection
from psysafe.model.cache import CacheView, StepView
from psysafe.model.config import ModelConfig
from psysafe.model.layers import FusedLinear, frozen


class GatedDeltaNet(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.key_shape = config.linear_num_key_heads, config.linear_key_head_dim
        self.value_shape = config.linear_num_value_heads, config.linear_value_head_dim
        self.qkv_sizes = config.delta_key, config.delta_key, config.delta_out
        heads = config.linear_num_value_heads
        parts = {"in_proj_qkv": config.conv_channels, "in_proj_z": config.delta_out}
        self.in_proj = FusedLinear(config.hidden_size, parts | {"in_proj_b": heads, "in_proj_a": heads})
        self.conv1d = frozen(config.conv_channels, config.linear_conv_kernel_dim)
        # The published checkpoints keep A_log in fp32, because the decay is exponentiated twice, and this norm, too.
        fp32_or_wider = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.A_log = frozen(heads, dtype=fp32_or_wider)
        self.dt_bias = frozen(heads)
        self.norm = frozen(config.linear_value_head_dim, dtype=fp32_or_wider)
        self.out_proj = FusedLinear(config.delta_out, {"out_proj": config.hidden_size})

    def forward(
        self,
        x: Tensor,
        u: Tensor | None,
        documents: Documents,
        cache: CacheView | StepView | None,
        layer: int,
        adapter_weights: Tensor | None = None,
    ) -> Pending:
        """x (T, D), u (T, 4r) of in_proj's adapter -> y (T, D) of out_proj, its adapter's term pending."""
        qkv, z, b, a = self.project(x, self.in_proj.lora_term(u, adapter_weights))  # (T, C), (T, H*V), (T, H), (T, H)
        if cache is None:
            q, k, v = self.heads(*self.conv(qkv, documents))  # (T, G, K), (T, G, K), (T, H, V)
            o = self.delta_rule(q, k, v, a, b, documents)  # (T, H, V)
        else:
            q, k, v = self.heads(*cache.convolve(layer, qkv, self.conv1d, documents, self.qkv_sizes))
            o = cache.delta_rule(layer, q, k, v, a, b, self.A_log, self.dt_bias, documents)
        x, u = kernels.gated_rms_norm(o, z, self.norm, self.eps, self.out_proj.lora_A)  # (T, H*V), (T, r)
        return Pending(self.out_proj(x), self.out_proj.lora_term(u, adapter_weights))

    def project(self, x: Tensor, lora_term: LoRATerm | None) -> tuple[Tensor, ...]:
        """x (T, D) -> q|k|v (T, C), z (T, H*V), b (T, H), a (T, H): column slices of one GEMM's output."""
        sizes = tuple(self.in_proj.parts.values())
        if lora_term is not None:
            # No operation after this GEMM takes the term. An adapter here, which the paper's recipe does not have, is
            # added in a pass of its own.
            y = self.in_proj(x)
            return tuple(part.to(y.dtype) for part in add_lora_by_projection(y, lora_term, sizes))
        if torch.is_grad_enabled():
            return _SplitLinear.apply(x, self.in_proj.weight, sizes)
        return self.in_proj(x).split(sizes, dim=1)

    def conv(self, qkv: Tensor, documents: Documents) -> tuple[Tensor, Tensor, Tensor]:
        """q|k|v (T, C) -> silu(causal convolution): q (T, G*K), k (T, G*K), v (T, H*V)."""
        return kernels.causal_conv1d_silu(qkv, self.conv1d, documents, self.qkv_sizes)

    def heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views with an axis of heads."""
        T = len(q)
        return q.view(T, *self.key_shape), k.view(T, *self.key_shape), v.view(T, *self.value_shape)

    def delta_rule(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, documents: Documents) -> Tensor:
        """q, k (T, G, K), v (T, H, V), decay input a (T, H), write strength b (T, H) -> o (T, H, V)."""
        o, _ = kernels.gated_delta_rule(q, k, v, a, b, self.A_log, self.dt_bias, documents)
        return o


class _SplitLinear(torch.autograd.Function):
    """x W^T split by columns, as one GEMM whose backward takes the parts' gradients as they come.

    Autograd's own backward of F.linear and split would first concatenate the gradients of q|k|v, z, b and a: one more
    pass over the widest tensor of the layer. Here every part multiplies its own rows of W and accumulates into dx.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weight)
        ctx.sizes = sizes
        ctx.set_materialize_grads(False)  # a part without gradient arrives as None, not as a tensor of zeros
        return F.linear(x, weight).split(sizes, dim=1)

    @staticmethod
    def backward(ctx, *dys: Tensor | None):
        (weight,) = ctx.saved_tensors
        dx = None
        for dy, rows in zip(dys, weight.split(ctx.sizes), strict=True):
            if dy is not None:
                dx = dy @ rows if dx is None else dx.addmm_(dy, rows)
        return dx, None, None
