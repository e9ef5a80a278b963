"""What the text decoder needs of a checkpoint's config.json."""

from dataclasses import dataclass


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
    def from_dict(config: dict) -> "ModelConfig":
        """Raises ValueError naming the field that is missing or describes another architecture."""
        text = config.get("text_config", config)
        rope = text.get("rope_parameters") or {}

        def need(key: str):
            if key not in text:
                raise ValueError(f"config.json has no {key!r}: expected the config of a dense Qwen3.5")
            return text[key]

        for key, expected, found in (
            ("hidden_act", "silu", text.get("hidden_act", "silu")),
            ("attention_bias", False, text.get("attention_bias", False)),
            ("attn_output_gate", True, text.get("attn_output_gate", True)),
            ("rope_type", "default", rope.get("rope_type", "default")),
            ("num_experts", 0, text.get("num_experts") or 0),
        ):
            if found != expected:
                raise ValueError(f"config.json: {key} = {found!r}, expected {expected!r} (a dense Qwen3.5)")
        layers, interval = need("num_hidden_layers"), text.get("full_attention_interval", 4)
        kinds = ("linear_attention", "full_attention")
        default_types = [kinds[(i + 1) % interval == 0] for i in range(layers)]
        layer_types = tuple(text.get("layer_types") or default_types)
        if len(layer_types) != layers or set(layer_types) - set(kinds):
            raise ValueError(f"config.json: layer_types must name {layers} layers, each one of {', '.join(kinds)}")
        head_dim = text.get("head_dim") or need("hidden_size") // need("num_attention_heads")
        rotary = int(head_dim * rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 0.25)))
        made = ModelConfig(
            layer_types=layer_types,
            head_dim=head_dim,
            rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 10_000_000))),
            rotary_dim=rotary,
            rms_norm_eps=text.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)),
            initializer_range=text.get("initializer_range", 0.02),
            max_position_embeddings=text.get("max_position_embeddings", 262_144),
            multimodal="text_config" in config,
            **{key: need(key) for key in _REQUIRED},
        )
        for heads, groups in (
            ("num_attention_heads", "num_key_value_heads"),
            ("linear_num_value_heads", "linear_num_key_heads"),
        ):
            if getattr(made, heads) % getattr(made, groups):
                raise ValueError(f"config.json: {heads} must be a multiple of {groups}")
        return made


_REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"),
    *("linear_value_head_dim", "linear_conv_kernel_dim"),
)
