"""The linear-attention mixer: Gated DeltaNet (arXiv 2412.06464) as Qwen3.5 uses it.

    q|k|v, z, b, a = in_proj(x)         one frozen GEMM
    q, k, v        = silu(causal conv(q|k|v))
    o              = gated delta rule(q, k, v, a, b)
    y              = out_proj(rms_norm(o) * w * silu(z))

Convolution and state start afresh at every document. Shapes: T tokens, Hk key heads of dk, H value heads of dv,
C = 2 Hk dk + H dv convolved channels, M taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from kernels import Pending
from kernels.lora_term import add_lora_by_projection
from psysafe.model.config import ModelConfig
from psysafe.model.layers import Batch, FusedLinear, frozen


class GatedDeltaNet(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.key_shape = (config.linear_num_key_heads, config.linear_key_head_dim)
        self.value_shape = (config.linear_num_value_heads, config.linear_value_head_dim)
        heads = config.linear_num_value_heads
        self.splits = (config.delta_key, config.delta_key, config.delta_out)
        parts = {"in_proj_qkv": config.conv_channels, "in_proj_z": config.delta_out}
        self.in_proj = FusedLinear(config.hidden_size, parts | {"in_proj_b": heads, "in_proj_a": heads})
        self.conv1d = frozen(config.conv_channels, config.linear_conv_kernel_dim)
        # The published checkpoints keep these two in fp32: the decay is exponentiated twice.
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.A_log = frozen(heads, dtype=wide)
        self.dt_bias = frozen(heads)
        self.norm = frozen(config.linear_value_head_dim, dtype=wide)
        self.out_proj = FusedLinear(config.delta_out, {"out_proj": config.hidden_size})

    def forward(self, x: Tensor, u: Tensor | None, batch: Batch, layer: int) -> Pending:
        documents, cache, remake = batch.documents, batch.cache, batch.remake
        qkv, z, b, a = remake("in_proj", self.project, x, u)
        if cache is None:
            q, k, v = remake("conv", lambda x: kernels.causal_conv1d_silu(x, self.conv1d, documents, self.splits), qkv)
        else:
            q, k, v = cache.convolve(layer, qkv, self.conv1d, documents, self.splits)
        q, k, v = (part.view(len(x), *shape) for part, shape in zip((q, k, v), self.shapes, strict=True))
        if cache is None:
            frozen = self.A_log, self.dt_bias, documents
            o, _ = remake("delta_rule", lambda *x: kernels.gated_delta_rule(*x, *frozen), q, k, v, a, b)
        else:
            o = cache.delta_rule(layer, q, k, v, a, b, self.A_log, self.dt_bias, documents)
        x, u = kernels.gated_rms_norm(o, z, self.norm, self.eps, self.out_proj.lora_A)
        return Pending(self.out_proj(x), self.out_proj.lora_term(u))

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        return self.key_shape, self.key_shape, self.value_shape

    def project(self, x: Tensor, u: Tensor | None) -> tuple[Tensor, ...]:
        """x (T, D) -> q|k|v (T, C), z (T, H*dv), b (T, H), a (T, H): column slices of one GEMM's output.

        These projections have no elementwise neighbour, so an adapter on them (not in the paper's recipe) is added
        plainly.
        """
        sizes = tuple(self.in_proj.parts.values())
        if self.in_proj.adapter is None and torch.is_grad_enabled():
            return _SplitLinear.apply(x, self.in_proj.weight, sizes)
        y = self.in_proj(x)
        if self.in_proj.adapter is None:
            return y.split(sizes, dim=1)
        return tuple(part.to(y.dtype) for part in add_lora_by_projection(y, self.in_proj.lora_term(u), sizes))


class _SplitLinear(torch.autograd.Function):
    """x W^T split by columns. Backward accumulates dx over the parts' own GEMMs: concatenating their gradients first,
    as autograd would for one GEMM, costs another pass over the widest tensor of the layer."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weight)
        ctx.sizes = sizes
        ctx.set_materialize_grads(False)
        return F.linear(x, weight).split(sizes, dim=1)

    @staticmethod
    def backward(ctx, *dys: Tensor | None):
        (weight,) = ctx.saved_tensors
        dx = None
        for dy, part in zip(dys, weight.split(ctx.sizes), strict=True):
            if dy is not None:
                dx = dy @ part if dx is None else dx.addmm_(dy, part)
        return dx, None, None
