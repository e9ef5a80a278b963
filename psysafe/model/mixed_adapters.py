"""Several adapters in one batch: each token has one of them, or none and is the base's.

    mixed = attach_mixed(model, {"tuned": Shape(1, 32.0, TARGETS), "other": Shape(8, 2.0, ("q_proj",))})
    weights = mixed.weights(["tuned", None], [1.0, 1.0])          # (n, r), a row for each document
    model(tokens, documents, adapter_weights=weights[documents.index])

The adapters' ranks stand side by side, as one adapter of rank r = r_1 + r_2 + ...: of every projection, A has the rows
and B the columns of all adapters, with zeros where an adapter does not reach. What a token adds to x W^T is then

    s ((x A^T) w) B^T             w (r,): s_i / s times a factor in the columns of the token's adapter i, else 0

so the base's tokens add 0, and the factor makes an adapter stronger or weaker (1: as it is). `FusedLinear.lora_term` is
the one place that knows w. No operation changes: the base beside one adapter of rank 1 keeps the kernels that fuse it,
and more columns take the plain products of any higher rank (docs/rank1-lora-for-free.md).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from psysafe.model.decoder import Qwen3_5
from psysafe.model.layers import FusedLinear
from psysafe.model.lora import detach, is_target, targeted_layers


class Shape(NamedTuple):
    """What an adapter needs of a model: its rank, its scale s = alpha / r, its projections by name or path."""

    rank: int
    scale: float
    targets: tuple[str, ...]


class MixedAdapter(nn.Module):
    """The adapters of one fused layer: A (J, in), r rows for each projection, B (out, r). Frozen."""

    is_mixed = True

    def __init__(self, A: Tensor, B: Tensor, scale: float):
        super().__init__()
        self.A, self.B = nn.Parameter(A, requires_grad=False), nn.Parameter(B, requires_grad=False)
        self.scale = scale


@dataclass
class MixedAdapters:
    """All adapters of a model by name. tensors: views of what the layers hold, by adapter and PEFT's name."""

    columns: dict[str, slice]  # of each adapter among the r columns
    scales: dict[str, float]
    scale: float  # of the layers
    tensors: dict[str, dict[str, Tensor]]
    like: Tensor  # of the dtype and on the device of all weights

    @property
    def names(self) -> list[str]:
        return list(self.columns)

    @property
    def rank(self) -> int:
        return max(columns.stop for columns in self.columns.values())

    def weights(self, names: Sequence[str | None], factors: Sequence[float]) -> Tensor:
        """(n, r): a weight for each rank column, from an adapter's name (None: the base) and a factor (1: as it is)."""
        weights = self.like.new_zeros(len(names), self.rank, device="cpu")
        for row, name, factor in zip(weights, names, factors, strict=True):
            if name is not None:
                row[self.columns[name]] = factor * (self.scales[name] / self.scale)
        return weights.to(self.like.device)


def attach_mixed(model: Qwen3_5, shapes: Mapping[str, Shape]) -> MixedAdapters:
    """Gives the model places for adapters, filled with zeros; adapters from before are taken off.

    Raises UserError for a rank that the projections do not have, and for a path that the model does not have.
    """
    layers = {name: targeted_layers(model, shape.targets, shape.rank) for name, shape in shapes.items()}
    detach(model)
    dtype = torch.promote_types(model.embed_tokens.dtype, torch.float32)
    like = torch.empty(0, dtype=dtype, device=model.norm.device)  # the embedding may lie in host memory
    stops = list(itertools.accumulate(shape.rank for shape in shapes.values()))
    columns = {name: slice(stop - shapes[name].rank, stop) for name, stop in zip(shapes, stops, strict=True)}
    scales = {name: shape.scale for name, shape in shapes.items()}
    # That of the first: a lone adapter then has the weight 1, and the bits that it has without its base beside it.
    scale = next(iter(scales.values()))
    for _, layer in itertools.chain.from_iterable(layers.values()):
        if layer.adapter is None:  # several adapters reach most layers
            out_features, in_features = layer.weight.shape
            A = like.new_zeros(len(layer.parts) * stops[-1], in_features)
            layer.adapter = MixedAdapter(A, like.new_zeros(out_features, stops[-1]), scale)
    tensors = {
        name: {key: x for path, layer in layers[name] for key, x in _views(path, layer, shape.targets, columns[name])}
        for name, shape in shapes.items()
    }
    return MixedAdapters(columns, scales, scale, tensors, like)


def _views(path: str, layer: FusedLinear, targets: Sequence[str], columns: slice) -> list[tuple[str, Tensor]]:
    """PEFT's names and tensors of one adapter in a layer, as views: lora_A (r_i, in), lora_B (out, r_i)."""
    A = layer.adapter.A.detach().unflatten(0, (len(layer.parts), -1))  # (parts, r, in)
    Bs = layer.adapter.B.detach().split(tuple(layer.parts.values()))
    views = []
    for part, A_part, B_part in zip(layer.parts, A, Bs, strict=True):
        if is_target(f"{path}.{part}", targets):
            views.append((f"{path}.{part}.lora_A", A_part[columns]))
            views.append((f"{path}.{part}.lora_B", B_part[:, columns]))
    return views
