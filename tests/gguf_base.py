"""A Qwen3.5 checkpoint as a GGUF file in fp32, for tests against llama.cpp: named and changed as by its converter.

Source: ggml-org/llama.cpp, conversion/qwen.py (Qwen3_5 and its bases).
"""

import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file
from torch import Tensor

ARCHITECTURE = gguf.MODEL_ARCH.QWEN35


def write_base(folder: Path, out: Path) -> None:
    """folder: config.json, tokenizer.json and one model.safetensors with tied embeddings, without a vision tower."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(str(out), gguf.MODEL_ARCH_NAMES[ARCHITECTURE])
    _write_config(writer, config)
    _write_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), config)
    names = gguf.get_tensor_name_map(ARCHITECTURE, config["num_hidden_layers"])
    for name, x in load_file(folder / "model.safetensors").items():
        name = name.replace("model.language_model.", "model.")
        x = _as_llama_cpp_has_it(name, x.float(), config)
        name = name.replace(".dt_bias", ".dt_proj.bias")
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), x.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _as_llama_cpp_has_it(name: str, x: Tensor, config: dict) -> Tensor:
    groups, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    K, V = config["linear_key_head_dim"], config["linear_value_head_dim"]

    def value_heads(x: Tensor, width: int, dim: int = 0) -> Tensor:
        """The value heads of all key heads in turn, where the checkpoint has those of one key head side by side."""
        x = x.movedim(dim, 0)
        tiled = x.reshape(groups, heads // groups, width, *x.shape[1:]).transpose(0, 1)
        return tiled.reshape(x.shape).movedim(0, dim)

    if name.endswith(".A_log"):
        return value_heads(-x.exp(), 1)
    if name.endswith((".dt_bias", ".in_proj_a.weight", ".in_proj_b.weight")):
        return value_heads(x, 1)
    if name.endswith(".in_proj_z.weight"):
        return value_heads(x, V)
    if name.endswith(".linear_attn.out_proj.weight"):
        return value_heads(x, V, dim=1)
    if name.endswith((".in_proj_qkv.weight", ".conv1d.weight")):
        x = x.squeeze(1) if x.ndim == 3 else x
        first = 2 * groups * K
        return torch.cat([x[:first], value_heads(x[first:], V)])
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return x + 1
    return x


def _write_config(writer: gguf.GGUFWriter, config: dict) -> None:
    rope = config["rope_parameters"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(config["head_dim"] * rope["partial_rotary_factor"]))
    writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_num_value_heads"] * config["linear_value_head_dim"])
    writer.add_full_attention_interval(config["full_attention_interval"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict, config: dict) -> None:
    tokens = dict(tokenizer["model"]["vocab"]) | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    by_id = sorted(tokens, key=tokens.get)
    special = {t["content"]: t["special"] for t in tokenizer["added_tokens"]}
    kinds = {None: gguf.TokenType.NORMAL, True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED}
    by_id += [f"[unused {i}]" for i in range(len(by_id), config["vocab_size"])]
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_list(by_id)
    writer.add_token_types([kinds[special.get(token)] for token in by_id])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokens["<|im_end|>"])
    writer.add_add_bos_token(False)
