"""What a training step has to compute and to move, and how long that takes at best: the yardstick of MFU and benchmark.

Useful work is the forward pass, the gradient with respect to activations, and the attention and delta-rule cores. The
base is frozen, so there is no third GEMM, and the usual 6 N FLOP a token would flatter by 1.46. Work done again to
save memory does not count. Per token, from the architecture alone:

    sum(part.forward + part.backward for part in useful_flops(config, context=4096).values())      # 27B: 106.7e9
"""

from collections.abc import Sequence
from typing import NamedTuple

from psysafe.model.config import ModelConfig

CHUNK = 64  # tokens of a chunk of the gated delta rule


class Part(NamedTuple):
    """FLOP or bytes of a token, forward and backward."""

    forward: float
    backward: float


class Speed(NamedTuple):
    """What large GEMMs (FLOP/s) and streaming kernels (bytes/s) reach, which is less than the data sheet says; and the
    bytes of memory that the GPU reports.
    """

    gemm: float
    bandwidth: float
    memory: int


SPEEDS = {"H100": Speed(700e12, 3.0e12, 85_000_000_000), "H200": Speed(790e12, 4.3e12, 150_000_000_000)}
# FLOP/s of the two cores, forward and backward: estimates from compiled kernels, to be replaced by measurements.
ATTENTION = Part(410e12, 255e12)
DELTA_RULE = Part(205e12, 261e12)


class Widths(NamedTuple):
    """Columns of a config's GEMMs and activations, in elements."""

    attention_in: int  # q | gate | k | v
    attention_out: int
    delta_in: int  # q | k | v | z | b | a
    delta_out: int
    conv: int

    @staticmethod
    def of(config: ModelConfig) -> "Widths":
        heads = config.num_attention_heads * config.head_dim
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        attention_in = 2 * heads + 2 * config.num_key_value_heads * config.head_dim
        delta_in = 2 * keys + 2 * values + 2 * config.linear_num_value_heads
        return Widths(attention_in, heads, delta_in, values, 2 * keys + values)


def context(lengths: Sequence[int]) -> float:
    """Mean length of the document that a token lies in: what attention's cost a token depends on."""
    return sum(n * n for n in lengths) / sum(lengths)


def layer_counts(config: ModelConfig) -> tuple[int, int]:
    """(attention layers, delta-net layers)."""
    attention = config.layer_types.count("full_attention")
    return attention, config.num_hidden_layers - attention


def useful_flops(config: ModelConfig, context: float, trained: float = 1.0) -> dict[str, Part]:
    """FLOP a token by part. trained: share of the tokens that are predicted; only they pass the last MLP and the head.

    Backward stops below the first mixer. The delta rule is counted in its chunk form.
    """
    D, size, w = config.hidden_size, config.intermediate_size, Widths.of(config)
    attention, delta = layer_counts(config)
    attention_layer = 2 * D * (w.attention_in + w.attention_out)
    delta_layer = 2 * D * (w.delta_in + w.delta_out)
    first_is_attention = config.layer_types[0] == "full_attention"
    mlp = 2 * D * size * (config.num_hidden_layers - 1 + trained)
    head = 2 * D * config.vocab_size * trained
    core = attention * 2 * context * w.attention_out
    dk, dv = config.linear_key_head_dim, config.linear_value_head_dim
    # Products of a chunk's (64, 64) tiles with keys or values, products with the state, the triangular inverse.
    tiles, states = CHUNK * (dk + dv), 2 * dk * dv
    rule = 5 * tiles + 3 * states + CHUNK**2 / 3
    # Backward: both gradients of every product, states and solves once more, the solve's adjoint.
    rule_backward = 16 * tiles + 8 * states
    heads = delta * config.linear_num_value_heads
    return {
        "attention projections": Part(
            attention * attention_layer,
            attention * attention_layer - first_is_attention * 2 * D * w.attention_in,
        ),
        "delta-net projections": Part(delta * delta_layer, (delta - (not first_is_attention)) * delta_layer),
        "gate and up": Part(2 * mlp, 2 * mlp),
        "down": Part(mlp, mlp),
        "head": Part(head, head),
        "attention core": Part(core, 2.5 * core),
        "delta rule": Part(heads * rule, heads * rule_backward),
    }


def flops_per_token(config: ModelConfig, context: float, trained: float = 1.0) -> float:
    return sum(map(sum, useful_flops(config, context, trained).values()))


def elementwise_bytes(config: ModelConfig, trained: float = 1.0) -> dict[str, Part]:
    """Bytes a token between the GEMMs in bf16, each activation read and written once by fused kernels."""
    D, size, w = config.hidden_size, config.intermediate_size, Widths.of(config)
    attention, delta = layer_counts(config)
    layers = config.num_hidden_layers

    def part(layers: float, forward: int, backward: int) -> Part:
        return Part(2 * layers * forward, 2 * layers * backward)

    return {
        "residual and norm": part(2 * layers, 4 * D, 4 * D),
        "q/k norm and rotary": part(attention, 2 * w.attention_in, 3 * w.attention_in),
        "output gate": part(attention, 3 * w.attention_out, 5 * w.attention_out),
        "convolution": part(delta, 2 * w.conv, 3 * w.conv),
        "gated norm": part(delta, 3 * w.delta_out, 5 * w.delta_out),
        "SwiGLU": part(layers - 1 + trained, 3 * size, 5 * size),
        "loss": part(trained, 2 * config.vocab_size, 0),
    }


def step_seconds(
    config: ModelConfig, tokens: float, context: float, trained: float, speed: Speed, again: float = 0.0
) -> dict[str, float]:
    """The least time of a step by kind of kernel; again: seconds a token for what is made again. Computed, not
    measured: launches, optimiser, imbalance and idle time come on top.
    """
    flops = useful_flops(config, context, trained)
    attention, rule = flops.pop("attention core"), flops.pop("delta rule")
    seconds = {
        "GEMM": sum(map(sum, flops.values())) / speed.gemm,
        "attention": attention.forward / ATTENTION.forward + attention.backward / ATTENTION.backward,
        "delta rule": rule.forward / DELTA_RULE.forward + rule.backward / DELTA_RULE.backward,
        "elementwise": sum(map(sum, elementwise_bytes(config, trained).values())) / speed.bandwidth,
        "made again": again,
    }
    return {kind: tokens * value for kind, value in seconds.items()}
