"""What the text decoder needs of a checkpoint's config.json."""

from dataclasses import dataclass
from pathlib import Path

from psysafe.program import UserError


@dataclass(frozen=True)
class ModelConfig:
    """What the text decoder needs of a checkpoint's config.json (nested `text_config` or flat)."""

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


# The largest size that is believed; beyond it a file could ask for more memory or time than any machine has.
_SIZES, _COUNTS = 2**20, 2**10
_REQUIRED = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), _SIZES),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), _SIZES),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), _COUNTS),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_conv_kernel_dim"), _COUNTS),
}
_KINDS = ("linear_attention", "full_attention")


def _from_dict(config: dict) -> ModelConfig:
    text = _object(config, "text_config") if "text_config" in config else config
    rope = _object(text, "rope_parameters") if text.get("rope_parameters") is not None else {}
    for key, expected, found in (
        ("hidden_act", "silu", text.get("hidden_act", "silu")),
        ("attention_bias", False, text.get("attention_bias", False)),
        ("attn_output_gate", True, text.get("attn_output_gate", True)),
        ("rope_type", "default", rope.get("rope_type", "default")),
        ("num_experts", 0, text.get("num_experts") or 0),
    ):
        if found != expected:
            raise UserError(f"{key} = {found!r:.60}, expected {expected!r} (a dense Qwen3.5)")
    sizes = {key: _number(text, key, most) for key, most in _REQUIRED.items()}
    layers, heads = sizes["num_hidden_layers"], sizes["num_attention_heads"]
    interval = _number({"full_attention_interval": 4, **text}, "full_attention_interval", _COUNTS)
    layer_types = text.get("layer_types") or [_KINDS[(i + 1) % interval == 0] for i in range(layers)]
    listed = isinstance(layer_types, list | tuple) and len(layer_types) == layers
    if not listed or any(kind not in _KINDS for kind in layer_types):
        raise UserError(f"layer_types must name {layers} layers, each one of {', '.join(_KINDS)}")
    head_dim = _number({"head_dim": text.get("head_dim") or sizes["hidden_size"] // heads}, "head_dim", _SIZES)
    share = {"partial_rotary_factor": 0.25, **text, **rope}
    rotary = int(head_dim * _number(share, "partial_rotary_factor", 1, float))
    if rotary < 2 or rotary % 2:
        raise UserError(f"head_dim {head_dim} x partial_rotary_factor is {rotary}, expected an even number above 0")
    made = ModelConfig(
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
    for many, groups in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        if sizes[many] % sizes[groups]:
            raise UserError(f"{many} must be a multiple of {groups}")
    return made


def _number(source: dict, key: str, most: float, kind: type = int) -> int | float:
    """source[key] as a number above 0 and at most `most`."""
    if source.get(key) is None:
        raise UserError(f"has no {key!r}: expected the config of a dense Qwen3.5")
    value = source[key]
    fits = type(value) is int or (kind is float and type(value) is float)
    if not (fits and 0 < value <= most):  # false for nan, too
        word = "a number" if kind is float else "a whole number"
        raise UserError(f"{key} is {value!r:.60}, expected {word} above 0 and at most {most:,}")
    return kind(value)


def _flag(source: dict, key: str) -> bool:
    if not isinstance(source[key], bool):
        raise UserError(f"{key} is {source[key]!r:.60}, expected true or false")
    return source[key]


def _object(source: dict, key: str) -> dict:
    if not isinstance(source[key], dict):
        raise UserError(f"{key} is {source[key]!r:.60}, expected an object")
    return source[key]
