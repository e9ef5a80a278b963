"""Low-rank adapters (LoRA, arXiv 2106.09685) by hand: the formula, attaching, switching off, merging.

    u = x A^T                     x (T, in), A (r, in) fp32  ->  (T, r)
    y = x W^T + s u B^T           W (out, in) frozen, B (out, r) fp32, s = alpha / r  ->  (T, out)

Backward, from dy (T, out); W is frozen, so there is no dW:

    du = s dy B                   (T, r)
    dA = du^T x                   (r, in)
    dB = s dy^T u                 (out, r)
    dx = dy W + du A              (T, in)

`lora_linear_reference` below is this formula. The model computes the same numbers in another place: the GEMM x W^T
stays plain, and the fused operations of `kernels` on both sides of it, which hold x and y in registers anyway, do the
rest. So no file has "the LoRA forward". Who does what:

    projection              u = x A^T, later dA and du A      s u B^T, later du and dB
    ----------------------  --------------------------------  ------------------------------------------
    q_proj k_proj v_proj    residual_rms_norm (input)         qk_norm_rope
    o_proj                  sigmoid_gate                      residual_rms_norm (post_attention)
    in_proj_qkv z b a       residual_rms_norm (input)         add_lora_by_projection (plain products)
    out_proj                gated_rms_norm                    residual_rms_norm (post_attention)
    gate_proj up_proj       residual_rms_norm (post_attn.)    swiglu
    down_proj               swiglu                            residual_rms_norm (next block, or final norm)

The operation before the GEMM takes A as its argument `lora_A` and returns u. `FusedLinear.lora_term` packs (u, B, s)
into a `LoRATerm`, which the operation after the GEMM takes. Derivation and cost: docs/rank1-lora-for-free.md.

The projections of one fused layer keep their A matrices one above the other, and their B matrices likewise, because the
kernels read them so. All adapters of a model lie in one flat buffer, their gradients in another: the optimiser, the
gradient norm and the all-reduce each handle one tensor. `psysafe.checkpoint.adapter` reads and writes PEFT's files.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from psysafe.model.decoder import Qwen3_5
from psysafe.model.layers import FusedLinear
from psysafe.program import UserError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DELTA_NET_TARGETS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
ALL_LINEAR = TARGETS + DELTA_NET_TARGETS


def lora_linear_reference(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """x W^T + s (x A^T) B^T of one projection: x (T, in), W (out, in), A (r, in), B (out, r) -> (T, out)."""
    u = x @ A.T  # (T, r)
    return x @ W.T + scale * u @ B.T


class Adapter(nn.Module):
    """The adapters of one fused layer: A (J, in), r rows for each projection, B (out, r), views of the flat buffers.

    Projections that are no targets have zero rows in both. These stay zero: A = 0 and B = 0 make each other's gradient
    vanish.
    """

    is_mixed = False

    def __init__(self, A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, scale: float):
        super().__init__()
        self.A, self.B, self.scale = nn.Parameter(A), nn.Parameter(B), scale
        self.A.grad, self.B.grad = dA, dB  # autograd and add_gradients (training/step.py) add to it in place


@dataclass(frozen=True)
class Segment:
    """One of PEFT's tensors in the flat buffer: elements [start, stop), `shape` as PEFT has it."""

    name: str  # "layers.3.self_attn.q_proj.lora_A"
    start: int
    stop: int
    shape: tuple[int, int]


@dataclass
class Adapters:
    """All adapters of a model. `param` and `grad` (elements,) are flat; the layers' A and B are views of them."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    param: Tensor
    grad: Tensor
    segments: list[Segment]
    use_rslora: bool = False

    @property
    def count(self) -> int:
        """Trained parameters."""
        return sum(segment.stop - segment.start for segment in self.segments)

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the adapted projections; which layers have them is left out."""
        return tuple(dict.fromkeys(target.rpartition(".")[2] for target in self.targets))

    def tensors(self, flat: Tensor | None = None) -> dict[str, Tensor]:
        """PEFT's tensors by name, views of the flat parameters (or of another buffer of that layout)."""
        flat = self.param if flat is None else flat
        return {s.name: flat[s.start : s.stop].view(s.shape) for s in self.segments}


def attach(
    model: Qwen3_5,
    rank: int,
    alpha: float,
    targets: str | Sequence[str] = TARGETS,  # names, or paths that end in one: "layers.3.self_attn.q_proj"
    seed: int = 0,
    use_rslora: bool = False,
) -> Adapters:
    """Gives every targeted projection an adapter: A Kaiming-uniform(a = sqrt 5), B zero, as PEFT does.

    Adapters from before are taken off. The initial values depend on the seed and the names alone, not on the device.
    Raises UserError for unknown targets and for a rank that the projections do not have.
    """
    targets = resolve_targets(targets)
    layers = targeted_layers(model, targets, rank)
    # One left on a projection that is no target now would still add its term, but lie outside the new buffer.
    detach(model)
    param = torch.zeros(
        sum(_a_size(layer, rank) + _b_size(layer, rank) for _, layer in layers),
        dtype=torch.promote_types(model.embed_tokens.dtype, torch.float32),
        device=model.norm.device,  # not the embedding's, which may lie in host memory
    )
    # Fixed memory instead of a new .grad each step: the optimiser and the all-reduce keep one address.
    grad = torch.zeros_like(param)
    scale = lora_scale(rank, alpha, use_rslora)
    segments, start = [], 0
    for path, layer in layers:
        layer.adapter = Adapter(*_matrices(param, start, layer, rank), *_matrices(grad, start, layer, rank), scale)
        segments += _segments(path, layer, start, rank, targets)
        start += _a_size(layer, rank) + _b_size(layer, rank)
    adapters = Adapters(rank, alpha, targets, param, grad, segments, use_rslora)
    _initialise(adapters, seed)
    return adapters


def detach(model: Qwen3_5) -> None:
    """Takes the adapters off again."""
    for _, layer in fused_layers(model):
        layer.adapter = None


@contextlib.contextmanager
def disabled(model: Qwen3_5) -> Iterator[None]:
    """Inside, the model is the base: the same forward without any adapter term, bit for bit, also in generation.

        with disabled(model), torch.no_grad():
            base_logits = model.logits(model(tokens, cu_seqlens))

    The adapters keep their parameters and gradients and are back afterwards, also after an error. A graph from before
    may run backward inside, and the reverse. A CUDA graph keeps the adapters that it was captured with.
    """
    layers = [layer for _, layer in fused_layers(model)]
    adapters = [layer.adapter for layer in layers]
    try:
        detach(model)
        yield
    finally:
        for layer, adapter in zip(layers, adapters, strict=True):
            layer.adapter = adapter


@torch.no_grad()
def merge_adapters(model: Qwen3_5) -> None:
    """W <- W + s B A in place, summed in fp32 and rounded once; the adapters are taken off."""
    for _, layer in fused_layers(model):
        adapter, sizes = layer.adapter, tuple(layer.parts.values())
        if adapter is None:
            continue
        # The parts' weights, A and B lie one above the other in the same order, so the three splits go in step.
        assert not adapter.is_mixed, "several adapters make no one merged model"
        rank = adapter.B.shape[1]
        for W, A, B in zip(layer.weight.split(sizes), adapter.A.split(rank), adapter.B.split(sizes), strict=True):
            W.copy_(W.to(B.dtype) + adapter.scale * (B @ A))
    detach(model)


def resolve_targets(targets: str | Sequence[str]) -> tuple[str, ...]:
    """A list of projection names, or of paths that end in one, or "all-linear" -> the names. Raises UserError for
    unknown names; whether the model has a path is seen by `attach`."""
    names = (targets,) if isinstance(targets, str) else targets
    names = tuple(name for entry in names for name in (ALL_LINEAR if entry == "all-linear" else (entry,)))
    unknown = sorted(name for name in set(names) if name.rpartition(".")[2] not in ALL_LINEAR)
    if unknown or not names:
        raise UserError(f"lora_targets: {unknown or 'empty'}; expected all-linear or names of {ALL_LINEAR}")
    return names


def is_target(module: str, targets: Sequence[str]) -> bool:
    """Whether a projection ("layers.3.self_attn.q_proj") is meant by a name or by the end of its path, as in PEFT."""
    return any(module == target or module.endswith(f".{target}") for target in targets)


def lora_scale(rank: int, alpha: float, use_rslora: bool) -> float:
    """s of the formula. Rank-stabilised LoRA (arXiv 2312.03732) divides by sqrt(r)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def fused_layers(model: nn.Module) -> Iterator[tuple[str, FusedLinear]]:
    """Every fused linear layer, with the published name of what it is part of ("layers.3.self_attn")."""
    for name, module in model.named_modules():
        if isinstance(module, FusedLinear):
            yield name.rpartition(".")[0], module


def targeted_layers(model: Qwen3_5, targets: tuple[str, ...], rank: int) -> list[tuple[str, FusedLinear]]:
    """The fused layers that hold a target, with their paths. UserError where the model has none, or not that rank."""
    modules = {f"{path}.{part}" for path, layer in fused_layers(model) for part in layer.parts}
    for target in targets:
        if "." in target and not any(is_target(module, [target]) for module in modules):
            raise UserError(f"lora_targets: the model has no projection {target:.100}")
    layers = [
        (path, layer)
        for path, layer in fused_layers(model)
        if any(is_target(f"{path}.{part}", targets) for part in layer.parts)
    ]
    if not layers:
        raise UserError(f"lora_targets {list(targets)}: the model has none of these projections")
    # A larger rank than the matrix has adds parameters and nothing that they could express.
    max_rank = max(min(layer.weight.shape) for _, layer in layers)
    if rank > max_rank:
        raise UserError(f"lora_rank {rank:,}: the model's projections have at most {max_rank:,}")
    return layers


def _a_size(layer: FusedLinear, rank: int) -> int:
    return len(layer.parts) * rank * layer.weight.shape[1]


def _b_size(layer: FusedLinear, rank: int) -> int:
    return layer.weight.shape[0] * rank


def _matrices(flat: Tensor, start: int, layer: FusedLinear, rank: int) -> tuple[Tensor, Tensor]:
    """The layer's A (J, in) and B (out, r) in a flat buffer, one after the other from element `start`."""
    out_features, in_features = layer.weight.shape
    middle = start + _a_size(layer, rank)
    A, B = flat[start:middle], flat[middle : middle + _b_size(layer, rank)]
    return A.view(-1, in_features), B.view(out_features, rank)


def _segments(path: str, layer: FusedLinear, start: int, rank: int, targets: tuple[str, ...]) -> list[Segment]:
    """PEFT's tensors of the layer's targets: the rows of A and of B that belong to each projection."""
    in_features = layer.weight.shape[1]
    segments, a, b = [], start, start + _a_size(layer, rank)
    for part, out_features in layer.parts.items():
        a_stop, b_stop = a + rank * in_features, b + out_features * rank
        if is_target(f"{path}.{part}", targets):
            segments.append(Segment(f"{path}.{part}.lora_A", a, a_stop, (rank, in_features)))
            segments.append(Segment(f"{path}.{part}.lora_B", b, b_stop, (out_features, rank)))
        a, b = a_stop, b_stop
    return segments


def _initialise(adapters: Adapters, seed: int) -> None:
    """Fills A; B stays zero, so that training starts at the base."""
    if adapters.param.is_meta:
        return
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in adapters.tensors().items():
        if name.endswith("lora_A"):
            bound = 1 / math.sqrt(tensor.shape[1])
            # Drawn on the host: a GPU's generator gives other numbers, and the start would depend on the device.
            # kaiming_uniform_(a=sqrt(5)) of a matrix (r, in) is uniform within 1 / sqrt(in).
            tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))
