"""Checkpoints of the base model in: sharded or single safetensors, from a folder or the hub, streamed tensor by tensor
into the fused weights, so that loading peaks at the model plus one tensor.

    from psysafe import load_model
    model = load_model("Qwen/Qwen3.5-27B", device="cuda", dtype=torch.bfloat16)
"""

import argparse
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from psysafe.checkpoint.adapter import load_adapter
from psysafe.files import expand, read_json
from psysafe.hub import HubError, fetch_folder
from psysafe.model.config import ModelConfig
from psysafe.model.decoder import Qwen3_5
from psysafe.model.layers import FusedLinear, frozen
from psysafe.model.lora import Adapter
from psysafe.model.shard import local_rows, rank_count, shard_blocks
from psysafe.program import UserError
from psysafe.runtime import memory_total

# The vision tower and the multi-token-prediction head: published with the decoder, not part of it.
SKIPPED = ("model.visual.", "visual.", "mtp.", "model.mtp.")
PREFIXES = ("model.language_model.", "model.")
READABLE = ("BF16", "F16", "F32", "F64")


@torch.inference_mode(False)  # what is made in inference mode could not be trained
def load_model(
    source: str | Path,
    adapter: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    embedding: str = "gpu",
    shard: bool = False,
) -> Qwen3_5:
    """A folder, a hub id, or `random:CONFIG.json` (seeded random weights) -> the decoder, in evaluation mode.

    embedding "cpu" keeps the input embedding in host memory, whatever the device. shard: the blocks are spread over all
    ranks, and each rank reads its own rows only.
    Raises UserError with one line that says what is wrong with the checkpoint and where.
    """
    random = str(source).startswith("random:")
    folder, _ = resolve_model(source, revision)
    config_file = folder / (Path(expand(str(source).removeprefix("random:"))).name if random else "config.json")
    config = ModelConfig.from_dict(read_json(config_file), config_file)
    # What does not fit its checkpoint or the memory is found on tensors without memory.
    model = build(config, "meta", dtype)
    found = {} if random else matching_tensors(model, folder)
    check_memory(model, torch.device(device), config_file, shard)
    if shard:
        shard_blocks(model, torch.device(device))
    else:
        model = build(config, device, dtype)
    if embedding == "cpu":
        if model.lm_head is None:
            raise UserError(f"--embedding cpu: {source} uses its embedding as the output matrix, too; leave it out")
        model.embed_tokens = frozen(*model.embed_tokens.shape, dtype=dtype)
    if random:
        randomise(model)
    else:
        fill(model, found)
    if adapter is not None:
        load_adapter(model, adapter)
    return model.eval()


def build(config: ModelConfig, device: str | torch.device, dtype: torch.dtype) -> Qwen3_5:
    """An uninitialised decoder on the device (also "meta"), its weights in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Qwen3_5(config)
    finally:
        torch.set_default_dtype(before)


def resolve_model(source: str | Path, revision: str | None = None) -> tuple[Path, str]:
    """(local folder, commit): a hub id is downloaded first, or found in the hub's cache; a folder has no commit ("").

    `random:CONFIG.json` gives the folder of the config, where a tokenizer may lie.
    """
    source = str(source)
    path = Path(expand(source.removeprefix("random:"))).expanduser()
    if source.startswith("random:"):
        return path.parent, ""
    if path.is_dir():
        return path, ""
    if path.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"{source}: no such model folder (expected one with a config.json, or a hub id like org/name)")
    try:
        folder = fetch_folder(source, revision or "", ["*.json", "*.safetensors", "*.jinja", "*.txt"])
    except HubError as error:
        raise UserError(f"{source}: no such folder, and the hub did not give it: {error}") from None
    return folder, folder.name


class Published(NamedTuple):
    """A tensor of the decoder in its published shape, and the view of a parameter that holds it: a slice of rows where
    projections are fused, and of these what lies on this rank where they are sharded."""

    view: Tensor
    first: int  # row of the published tensor with which the view begins
    shape: tuple[int, ...]

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + len(self.view))


def published_tensors(model: Qwen3_5) -> dict[str, Tensor]:
    """Every tensor of the decoder under its published name without prefix ("layers.0.mlp.gate_proj.weight"): views of
    the parameters, row slices where projections are fused, in the published shape."""
    return {name: published.view for name, published in published_parts(model).items()}


def published_parts(model: Qwen3_5) -> dict[str, Published]:
    """The same with where each view lies in the published tensor."""
    parts = {}
    for path, module in model.named_modules():
        if isinstance(module, FusedLinear):
            local, start = local_rows(module.weight)
            row = 0
            for part, size in module.parts.items():
                a, b = (min(max(at - start, 0), len(local)) for at in (row, row + size))
                name = f"{path.rpartition('.')[0]}.{part}.weight"
                parts[name] = Published(local[a:b], max(0, start - row), (size, local.shape[1]))
                row += size
        elif not isinstance(module, Adapter):
            for name, parameter in module.named_parameters(recurse=False):
                parts |= _published(path, name, parameter)
    return parts


def _published(path: str, name: str, parameter: nn.Parameter) -> dict[str, Published]:
    full = f"{path}.{name}" if path else name
    (local, first), shape = local_rows(parameter), tuple(parameter.shape)
    if name == "conv1d":
        local, shape = local.unsqueeze(1), (shape[0], 1, shape[1])  # (C, 1, M): a depthwise convolution's layout
    return {full if name in ("A_log", "dt_bias") else f"{full}.weight": Published(local, first, shape)}


def check_memory(model: Qwen3_5, device: torch.device, config_file: Path, shard: bool) -> None:
    """Raises UserError for weights that the whole device could not hold; a few wrong digits may ask for terabytes."""
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    needed //= rank_count() if shard else 1
    if device.type != "meta" and needed > memory_total(device):
        found, there = f"{needed / 1e9:,.0f} GB of weights", f"{memory_total(device) / 1e9:,.0f} GB"
        raise UserError(f"{config_file}: describes {found}, {device} has {there}; take another model or dtype")


def matching_tensors(model: Qwen3_5, folder: Path) -> dict[str, tuple[Path, str]]:
    """Published name -> its file and key, when the folder holds just what the decoder (also on "meta") needs."""
    wanted = published_parts(model)
    found: dict[str, tuple[Path, str]] = {}
    seen, wrong = set(), []
    for path, key, shape, dtype in tensor_entries(folder):
        name = decoder_name(key)
        if name is None or (name == "lm_head.weight" and model.lm_head is None):
            continue
        seen.add(name)
        if name not in wanted:
            wrong.append(f"unknown tensor {key}")
        elif shape != wanted[name].shape:
            wrong.append(f"{key} is {list(shape)}, expected {list(wanted[name].shape)}")
        elif dtype not in READABLE:
            wrong.append(f"{key} is {dtype}, expected one of {', '.join(READABLE)} (quantised checkpoints do not load)")
        else:
            found[name] = (path, key)
    wrong += [f"missing tensor {name}" for name in wanted if name not in seen]
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise UserError(f"{folder}: not the checkpoint that its config.json describes: {'; '.join(wrong[:8])}{more}")
    return found


def fill(model: Qwen3_5, found: dict[str, tuple[Path, str]]) -> None:
    """Copies the `matching_tensors` of a folder into the decoder, one tensor, or this rank's rows of it, at a time."""
    wanted = published_parts(model)
    by_shard: dict[Path, list[tuple[str, str]]] = {}
    for name, (path, key) in found.items():
        by_shard.setdefault(path, []).append((name, key))
    for path, names in by_shard.items():
        for name, key in names:
            view, rows = wanted[name].view, wanted[name].rows
            if not len(view):  # all its rows are other ranks'
                continue
            # Opened anew for each tensor: the pages of a mapped shard stay resident while it is open.
            with safe_open(path, framework="pt") as file:
                view.copy_(file.get_slice(key)[rows])


class TensorEntry(NamedTuple):
    """One tensor of a checkpoint, as its file's header describes it."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' names: BF16, F32, ...

    @property
    def nbytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8


def tensor_entries(folder: Path) -> Iterator[TensorEntry]:
    """Every tensor that the index, or the single file, lists."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: expected an object 'weight_map' of tensor names and shard files")
        shards: dict[str, set[str]] = {}
        for key, shard in weight_map.items():
            if not is_plain_name(shard):
                raise UserError(f"{index}: shard {shard!r} of {key} is not a plain file name in this folder")
            shards.setdefault(shard, set()).add(key)
    else:
        shards = {"model.safetensors": set()}
    for shard, keys in sorted(shards.items()):
        path = folder / shard
        if not path.exists():
            raise UserError(f"{path}: missing" + (f" (named in {index.name})" if index.exists() else ""))
        try:
            with safe_open(path, framework="pt") as file:
                present = set(file.keys())
                if keys - present:
                    raise UserError(f"{path}: lacks {sorted(keys - present)[0]}, which {index.name} puts there")
                for key in sorted(keys or present):
                    part = file.get_slice(key)
                    yield TensorEntry(path, key, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or truncated safetensors ({error}); download it again") from None


def is_plain_name(name: object) -> bool:
    """False for a name with a folder in it, which could leave the model's directory, and for what no file can have."""
    if not isinstance(name, str) or re.search(r"[\\\0\ud800-\udfff]", name):
        return False
    return name != "" and Path(name).name == name


def decoder_name(key: str) -> str | None:
    """A published name without its prefix, or None for what is not part of the decoder."""
    if key.startswith(SKIPPED):
        return None
    for prefix in PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


@torch.no_grad()
def randomise(model: Qwen3_5) -> None:
    """Seeded random weights, tensor by tensor: the same numbers whatever the loading order."""
    for name, (view, first, shape) in published_parts(model).items():
        view.copy_(random_tensor(name, shape, model.config.initializer_range, view.device)[first : first + len(view)])


def random_tensor(name: str, shape: tuple[int, ...], scale: float, device: torch.device | str = "cpu") -> Tensor:
    """fp32 numbers that follow from the published name alone, so that other implementations can be given the same
    model. Magnitudes as at initialisation; `scale` is the matrices'."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    noise = torch.empty(shape, dtype=torch.float32, device=device).normal_(generator=generator)
    if name.endswith("A_log"):
        return 0.5 * noise
    if name.endswith("linear_attn.norm.weight"):
        return 1 + 0.1 * noise
    return noise * (0.1 if name.endswith(("dt_bias", "norm.weight")) else scale)


def main(argv: Sequence[str]) -> int:
    from psysafe.checkpoint.merge import merge

    parser = argparse.ArgumentParser(prog="python -m psysafe.checkpoint", description="Checkpoints out.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("merge", help="write the base with an adapter merged into its weights")
    command.add_argument("--model", required=True, metavar="DIR|HUB_ID", help="the base")
    command.add_argument("--adapter", required=True, metavar="DIR", help="an adapter of this project's or PEFT's")
    command.add_argument("--out", required=True, metavar="DIR", help="new folder for the merged checkpoint")
    command.add_argument("--revision", default="", help="commit or branch of a hub id")
    command.add_argument("--shard-size", default="", metavar="5GB", help="cut new shards (default: the base's own)")
    args = parser.parse_args(argv)
    out = merge(args.model, args.adapter, args.out, args.shard_size, args.revision)
    print(f"merged checkpoint in {out}, read back and checked")
    return 0
