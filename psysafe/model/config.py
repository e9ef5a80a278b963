"""The architecture: the fields of a checkpoint's config.json that the text decoder needs, and the arithmetic that
follows from them (widths, bytes of a cache, FLOP a token). Model, cache, memory plan and roofline all read it here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from psysafe.program import UserError

DELTA_CHUNK = 64  # tokens of a chunk of the gated delta rule (kernels/ops/gated_delta_rule_forward.py)


class ForwardBackward(NamedTuple):
    """A number for the forward and one for the backward pass: FLOP a token, bytes a token, or FLOP/s."""

    forward: float
    backward: float


@dataclass(frozen=True)
class ModelConfig:
    """Fields have transformers' names. `from_dict` reads a config.json, nested in `text_config` or flat."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rotary_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    initializer_range: float
    max_position_embeddings: int
    multimodal: bool  # whether published names carry `language_model.`: decides the adapter's key layout

    @staticmethod
    def from_dict(config: dict, file: str | Path = "config.json") -> "ModelConfig":
        """Raises UserError naming the field that is missing, no usable number, or of another architecture."""
        try:
            return _from_dict(config)
        except ValueError as error:
            raise UserError(f"{file}: {error}") from None

    @property
    def attention_layers(self) -> int:
        return self.layer_types.count("full_attention")

    @property
    def delta_layers(self) -> int:
        return self.num_hidden_layers - self.attention_layers

    @property
    def delta_backward_layers(self) -> int:
        """Delta-net layers with a backward pass: in the recipe their mixers have no adapter, so in layer 0 it stops."""
        return self.delta_layers - (self.layer_types[0] == "linear_attention")

    @property
    def attention_out(self) -> int:
        """Columns of q, of its gate, and of what o_proj reads: H * K."""
        return self.num_attention_heads * self.head_dim

    @property
    def attention_kv(self) -> int:
        """Columns of k, and of v: G * K."""
        return self.num_key_value_heads * self.head_dim

    @property
    def attention_in(self) -> int:
        """Columns of an attention layer's first GEMM: q and gate, k, v."""
        return 2 * self.attention_out + 2 * self.attention_kv

    @property
    def delta_key(self) -> int:
        """Columns of q, and of k, in a delta-net layer: Hk * dk."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def delta_out(self) -> int:
        """Columns of v, of z, and of what out_proj reads: H * dv."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_channels(self) -> int:
        """Columns that pass the convolution: q, k, v."""
        return 2 * self.delta_key + self.delta_out

    @property
    def delta_in(self) -> int:
        """Columns of a delta-net layer's first GEMM: q, k, v, z, and b and a with one column a head."""
        return self.conv_channels + self.delta_out + 2 * self.linear_num_value_heads

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """The delta rule's state of a sequence: (H, dk, dv)."""
        return self.linear_num_value_heads, self.linear_key_head_dim, self.linear_value_head_dim

    def cache_bytes(self, max_tokens: int, dtype: torch.dtype) -> int:
        """Bytes that decoding keeps of one sequence of up to max_tokens tokens.

        An attention layer keeps k and v of every token. A delta-net layer keeps the same at any length: the last
        inputs of its convolution, and its state in fp32 or wider.
        """
        keys_and_values = 2 * self.attention_kv * max_tokens * dtype.itemsize
        conv = (self.linear_conv_kernel_dim - 1) * self.conv_channels * dtype.itemsize
        H, dk, dv = self.state_shape
        state = H * dk * dv * torch.promote_types(dtype, torch.float32).itemsize
        return self.attention_layers * keys_and_values + self.delta_layers * (conv + state)

    def useful_flops(self, context: float, trained: float = 1.0) -> dict[str, ForwardBackward]:
        """FLOP a token of a training step, by part. A GEMM costs 2 * in * out a token; recomputation does not count.

        context: mean length of the document that a token lies in. trained: share of the tokens that are predicted;
        only they pass the last MLP and the head. The base is frozen, so backward has one GEMM for each of forward's.
        """
        mlp = 2 * self.hidden_size * self.intermediate_size * (self.num_hidden_layers - 1 + trained)
        head = 2 * self.hidden_size * self.vocab_size * trained
        return {
            **self._projection_flops(),
            "gate and up": ForwardBackward(2 * mlp, 2 * mlp),
            "down": ForwardBackward(mlp, mlp),
            "head": ForwardBackward(head, head),
            **self._core_flops(context),
        }

    def _projection_flops(self) -> dict[str, ForwardBackward]:
        D = self.hidden_size
        attention = 2 * D * (self.attention_in + self.attention_out)
        delta = 2 * D * (self.delta_in + self.delta_out)
        # Backward stops at the first adapter. In an attention layer 0 it is that of q, k and v: the GEMM for their dx
        # falls away.
        first_is_attention = self.layer_types[0] == "full_attention"
        attention_backward = self.attention_layers * attention - first_is_attention * 2 * D * self.attention_in
        return {
            "attention projections": ForwardBackward(self.attention_layers * attention, attention_backward),
            "delta-net projections": ForwardBackward(self.delta_layers * delta, self.delta_backward_layers * delta),
        }

    def _core_flops(self, context: float) -> dict[str, ForwardBackward]:
        """Causal attention: a token sees half of its document on average; backward has five products for forward's two.
        Delta rule: in its chunk form.
        """
        attention = self.attention_layers * 2 * context * self.attention_out
        H, dk, dv = self.state_shape
        # Products of a chunk's (64, 64) tiles with keys or values, products with the state, the triangular inverse.
        tiles, states = DELTA_CHUNK * (dk + dv), 2 * dk * dv
        rule = 5 * tiles + 3 * states + DELTA_CHUNK**2 / 3
        # Both gradients of every product, states and solves once more, the adjoint of the solve.
        rule_backward = 16 * tiles + 8 * states
        backward = self.delta_backward_layers * H * rule_backward
        return {
            "attention core": ForwardBackward(attention, 2.5 * attention),
            "delta rule": ForwardBackward(self.delta_layers * H * rule, backward),
        }


# Limits of what is believed: beyond them a wrong file could ask for more memory or time than any machine has.
_MAX_SIZE, _MAX_COUNT = 2**20, 2**10
_REQUIRED = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), _MAX_SIZE),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), _MAX_SIZE),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), _MAX_COUNT),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_conv_kernel_dim"), _MAX_COUNT),
}
_LAYER_TYPES = ("linear_attention", "full_attention")


def _from_dict(config: dict) -> ModelConfig:
    text = _object(config, "text_config") if "text_config" in config else config
    rope = _object(text, "rope_parameters") if text.get("rope_parameters") is not None else {}
    # What another architecture would need: refused by name, because ignored it would give other logits without a word.
    for key, expected, value in (
        ("hidden_act", "silu", text.get("hidden_act", "silu")),
        ("attention_bias", False, text.get("attention_bias", False)),
        ("attn_output_gate", True, text.get("attn_output_gate", True)),
        ("rope_type", "default", rope.get("rope_type", "default")),
        ("num_experts", 0, text.get("num_experts") or 0),
    ):
        if value != expected:
            raise UserError(f"{key} = {value!r:.60}, expected {expected!r} (a dense Qwen3.5)")
    sizes = {key: _number(text, key, maximum) for key, maximum in _REQUIRED.items()}
    layers, heads = sizes["num_hidden_layers"], sizes["num_attention_heads"]
    interval = _number({"full_attention_interval": 4, **text}, "full_attention_interval", _MAX_COUNT)
    # A file may name the interval alone: every 4th layer is attention.
    layer_types = text.get("layer_types") or [_LAYER_TYPES[(i + 1) % interval == 0] for i in range(layers)]
    one_per_layer = isinstance(layer_types, list | tuple) and len(layer_types) == layers
    if not one_per_layer or any(kind not in _LAYER_TYPES for kind in layer_types):
        raise UserError(f"layer_types must name {layers} layers, each one of {', '.join(_LAYER_TYPES)}")
    head_dim = _number({"head_dim": text.get("head_dim") or sizes["hidden_size"] // heads}, "head_dim", _MAX_SIZE)
    # The value may stand in rope_parameters or, in older files, beside them.
    factor = _number({"partial_rotary_factor": 0.25, **text, **rope}, "partial_rotary_factor", 1, float)
    rotary = int(head_dim * factor)
    if rotary < 2 or rotary % 2:
        raise UserError(f"head_dim {head_dim} x partial_rotary_factor is {rotary}, expected an even number above 0")
    for many, groups in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        if sizes[many] % sizes[groups]:
            raise UserError(f"{many} must be a multiple of {groups}")
    return ModelConfig(
        **sizes,
        layer_types=tuple(layer_types),
        head_dim=head_dim,
        rope_theta=_number({"rope_theta": 10_000_000, **text, **rope}, "rope_theta", 1e30, float),
        rotary_dim=rotary,
        rms_norm_eps=_number({"rms_norm_eps": 1e-6, **text}, "rms_norm_eps", 1, float),
        tie_word_embeddings=_flag({"tie_word_embeddings": False, **config, **text}, "tie_word_embeddings"),
        initializer_range=_number({"initializer_range": 0.02, **text}, "initializer_range", 1e3, float),
        max_position_embeddings=_number({"max_position_embeddings": 262_144, **text}, "max_position_embeddings", 2**40),
        multimodal="text_config" in config,
    )


def _number(source: dict, key: str, maximum: float, kind: type = int) -> int | float:
    """source[key] as a number above 0 and at most `maximum`."""
    if source.get(key) is None:
        raise UserError(f"has no {key!r}: expected the config of a dense Qwen3.5")
    value = source[key]
    fits = type(value) is int or (kind is float and type(value) is float)
    if not (fits and 0 < value <= maximum):  # false for nan, too
        word = "a number" if kind is float else "a whole number"
        raise UserError(f"{key} is {value!r:.60}, expected {word} above 0 and at most {maximum:,}")
    return kind(value)


def _flag(source: dict, key: str) -> bool:
    if not isinstance(source[key], bool):
        raise UserError(f"{key} is {source[key]!r:.60}, expected true or false")
    return source[key]


def _object(source: dict, key: str) -> dict:
    if not isinstance(source[key], dict):
        raise UserError(f"{key} is {source[key]!r:.60}, expected an object")
    return source[key]
