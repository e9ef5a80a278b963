"""What a training step has to compute and to move, and how long that takes at best: the yardstick of MFU and benchmark.

Useful work is the forward pass, the gradient with respect to activations, and the attention and delta-rule cores. The
base is frozen, so there is no third GEMM, and the usual 6 N FLOP a token would flatter by 1.46. Recomputation does not
count. Per token, from the architecture alone:

    sum(part.forward + part.backward for part in config.useful_flops(context=4096).values())      # 27B: 106.7e9
"""

from collections.abc import Sequence
from typing import NamedTuple

from psysafe.model.config import ForwardBackward, ModelConfig


class Speed(NamedTuple):
    """What large GEMMs (FLOP/s) and streaming kernels (bytes/s) reach, which is less than the data sheet says, and the
    bytes of memory that the GPU reports.
    """

    gemm: float
    bandwidth: float
    memory: int


SPEEDS = {"H100": Speed(700e12, 3.0e12, 85_000_000_000), "H200": Speed(790e12, 4.3e12, 150_000_000_000)}
# FLOP/s of the two cores, forward and backward: predicted from machine code (the table of predicted times in
# docs/kernels.md) and written here by tools/kernel_tables.py, to be replaced by measurements.
ATTENTION = ForwardBackward(392e12, 332e12)
DELTA_RULE = ForwardBackward(190e12, 136e12)


def context(lengths: Sequence[int]) -> float:
    """Mean length of the document that a token lies in: what attention's cost a token depends on."""
    return sum(n * n for n in lengths) / sum(lengths)


def flops_per_token(config: ModelConfig, context: float, trained: float = 1.0, base: float = 0.0) -> float:
    """Useful FLOP of a training token, forward and backward. base: share of the tokens that the base reads as well."""
    return sum(sum(part) + base * part.forward for part in config.useful_flops(context, trained).values())


def elementwise_bytes(config: ModelConfig, trained: float = 1.0) -> dict[str, ForwardBackward]:
    """Bytes a token between the GEMMs in bf16, each activation read and written once by fused kernels."""
    D, size, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    attention, delta = config.attention_layers, config.delta_layers

    def part(layers: float, forward: int, backward: int) -> ForwardBackward:
        return ForwardBackward(2 * layers * forward, 2 * layers * backward)

    return {
        "residual and norm": part(2 * layers, 4 * D, 4 * D),
        "q/k norm and rotary": part(attention, 2 * config.attention_in, 3 * config.attention_in),
        "output gate": part(attention, 3 * config.attention_out, 5 * config.attention_out),
        "convolution": part(delta, 2 * config.conv_channels, 3 * config.conv_channels),
        "gated norm": part(delta, 3 * config.delta_out, 5 * config.delta_out),
        "SwiGLU": part(layers - 1 + trained, 3 * size, 5 * size),
        "loss": part(trained, 2 * config.vocab_size, 0),
    }


def step_seconds(
    config: ModelConfig,
    tokens: float,
    context: float,
    trained: float,
    speed: Speed,
    recompute: float = 0.0,
    base: float = 0.0,
) -> dict[str, float]:
    """The shortest time of a step by kind of kernel. recompute: seconds a token for what is recomputed. base: share of
    the tokens that the base reads as well, forward alone.

    Computed, not measured: launches, optimiser, imbalance and idle time come on top.
    """
    flops = config.useful_flops(context, trained)
    attention, rule = flops.pop("attention core"), flops.pop("delta rule")
    parts = {
        "GEMM": _all(flops, speed.gemm),
        "attention": ForwardBackward(attention.forward / ATTENTION.forward, attention.backward / ATTENTION.backward),
        "delta rule": ForwardBackward(rule.forward / DELTA_RULE.forward, rule.backward / DELTA_RULE.backward),
        "elementwise": _all(elementwise_bytes(config, trained), speed.bandwidth),
    }
    seconds = {kind: sum(part) + base * part.forward for kind, part in parts.items()} | {"recompute": recompute}
    return {kind: tokens * value for kind, value in seconds.items()}


def _all(parts: dict[str, ForwardBackward], rate: float) -> ForwardBackward:
    """Seconds of all parts together, at one rate."""
    return ForwardBackward(*(sum(column) / rate for column in zip(*parts.values(), strict=True)))
