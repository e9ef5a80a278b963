"""Tiny random Qwen3.5 models in two bodies: transformers' and ours, with the same weights."""

import json
from pathlib import Path

import torch
from transformers import Qwen3_5Config, Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration, Qwen3_5TextConfig

from psysafe import load_model

BASE = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_conv_kernel_dim=4,
    tie_word_embeddings=False,
    # At the published 1e-6 the gated norm amplifies rounding wherever a random q . k is near 0: transformers itself is
    # then up to 1e-4 off its fp64 twin. 1e-6 is tested in fp64, where that does not matter.
    rms_norm_eps=1e-3,
    rope_parameters={
        "rope_type": "default",
        "rope_theta": 10_000_000,
        "partial_rotary_factor": 0.25,
        "mrope_section": [1, 1, 0],
        "mrope_interleaved": True,
    },
)

# Differ in layer pattern, head ratios 1, 2, 3, tied head, head size, convolution taps.
CONFIGS = {
    "published pattern": {},
    "tied, ratio 1": dict(tie_word_embeddings=True, linear_num_value_heads=2, num_key_value_heads=4),
    "ratio 3, head_dim 32": dict(linear_num_value_heads=6, num_attention_heads=6, head_dim=32),
    "attention first": dict(layer_types=["full_attention", "linear_attention"] * 2, num_key_value_heads=1),
    "attention only, taps 2": dict(layer_types=["full_attention"] * 2, num_hidden_layers=2, linear_conv_kernel_dim=2),
    "delta net only, taps 3": dict(
        layer_types=["linear_attention"] * 3, num_hidden_layers=3, linear_conv_kernel_dim=3, linear_num_key_heads=4
    ),
    "wide heads": dict(head_dim=64, linear_value_head_dim=32, linear_key_head_dim=32, hidden_size=64),
}


def reference_model(name: str = "published pattern", seed: int = 0, **changes) -> Qwen3_5ForCausalLM:
    """transformers' model in fp32, eager attention, with every weight random (norms and decay too)."""
    config = Qwen3_5TextConfig(**{**BASE, **CONFIGS[name], **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = Qwen3_5ForCausalLM(config).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            # Large enough that a wrong formula moves the logits by their own size.
            p.copy_(torch.randn_like(p) * (0.5 if p.dim() == 1 or "conv1d" in key else 0.06))
            if "linear_attn.norm" in key:
                p += 1
    return model


def write_checkpoint(model: Qwen3_5ForCausalLM, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def both_models(folder: Path, name: str = "published pattern", dtype=torch.float32, **changes):
    """(transformers' model, ours) with the same weights."""
    reference = reference_model(name, **changes)
    write_checkpoint(reference, folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3_5_text"
    return reference.to(dtype), load_model(folder, dtype=dtype)


VISION = dict(
    depth=1,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    out_hidden_size=48,
    patch_size=4,
    num_position_embeddings=16,
)


def multimodal_model(seed: int = 0) -> Qwen3_5ForConditionalGeneration:
    """transformers' multimodal class, as the published checkpoints are: the decoder beside a small vision tower."""
    torch.manual_seed(seed)
    config = Qwen3_5Config(text_config=BASE, vision_config=VISION, tie_word_embeddings=False)
    config._attn_implementation = config.text_config._attn_implementation = "eager"
    model = Qwen3_5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.dim() == 1 else 0.06))
    return model


def randomise_lora_B(adapters, seed: int) -> None:
    """As after some training: while B is zero, A gets no gradient and the adapter adds nothing."""
    torch.manual_seed(seed)
    for name, x in adapters.tensors().items():
        if name.endswith("lora_B"):
            x.copy_(torch.randn_like(x) * 0.1)
