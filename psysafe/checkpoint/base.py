"""Checkpoints of the base model in: sharded or single safetensors, from a folder or the hub.

    from psysafe import load_model
    model = load_model("Qwen/Qwen3.5-27B", device="cuda", dtype=torch.bfloat16)

Loading goes in four steps: find the folder, check what its files hold, build the decoder, fill it. Tensors are streamed
one by one into the fused weights, so the peak is the model plus one tensor. A published tensor has its name without
prefix here ("layers.0.mlp.gate_proj.weight").
"""

import zlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from psysafe.checkpoint.adapter import load_adapter
from psysafe.checkpoint.tensor_files import NOT_FINITE, READABLE, TensorEntry, all_finite, decoder_name, tensor_entries
from psysafe.cli import say
from psysafe.files import expand, read_json
from psysafe.hub import HubError, did_you_mean, fetch_folder, is_repository
from psysafe.model.config import ModelConfig
from psysafe.model.decoder import Qwen3_5
from psysafe.model.layers import FusedLinear, frozen
from psysafe.model.lora import Adapter
from psysafe.model.shard import local_part, rank_count, shard_blocks
from psysafe.program import UserError
from psysafe.runtime import memory_total

MAX_FAULTS = 8  # of a checkpoint, named in one error
HEAD_ROWS = 4096  # of head and embedding that are compared at a time: 40 MB of each for the 27B's width


@torch.inference_mode(False)  # a tensor that is created in inference mode can never be trained
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
    source, device = str(source), torch.device(device)
    folder, _ = resolve_model(source, revision)
    random = source.startswith("random:")
    config_file = folder / (Path(expand(source.removeprefix("random:"))).name if random else "config.json")
    config = ModelConfig.from_dict(read_json(config_file), config_file)
    if config.tie_word_embeddings and not random and has_own_head(folder, dtype):
        say(f"{folder}: tied by its config.json, but lm_head.weight has other values: it is used, as in transformers")
        config = replace(config, tie_word_embeddings=False)
    check_embedding(config, source, embedding)

    # Checked on tensors without memory: a checkpoint that does not fit costs neither memory nor time.
    model = build(config, "meta", dtype)
    locations = {} if random else matching_tensors(model, folder)
    check_memory(model, device, config_file, shard)

    if shard:
        shard_blocks(model, device)
    else:
        model = build(config, device, dtype)
    if embedding == "cpu":
        model.embed_tokens = frozen(*model.embed_tokens.shape, dtype=dtype)

    if random:
        randomise(model)
    else:
        fill(model, locations)
    if adapter is not None:
        load_adapter(model, adapter)
    return model.eval()


def resolve_model(source: str | Path, revision: str | None = None) -> tuple[Path, str]:
    """(local folder, commit): a hub id is downloaded first, or found in the hub's cache; a folder has no commit ("").

    `random:CONFIG.json` gives the folder of the config, where a tokenizer may lie.
    """
    source = str(source)
    path = Path(expand(source.removeprefix("random:"))).expanduser()
    if source.startswith("random:"):
        if not path.is_file():
            raise UserError(f"{source}: no such file; expected the config.json of an architecture")
        return path.parent, ""
    if path.is_dir():
        return path, ""
    if not is_repository(source):
        expected = "expected one with a config.json, or a hub id like org/name"
        raise UserError(f"{source}: no such model folder ({expected}){did_you_mean(path)}")
    try:
        folder = fetch_folder(source, revision or "", ["*.json", "*.safetensors", "*.jinja", "*.txt"])
    except HubError as error:
        raise UserError(f"{source}: no such folder, and the hub did not give it{did_you_mean(source, error)}") from None
    return folder, folder.name


def has_own_head(folder: Path, dtype: torch.dtype) -> bool:
    """Whether a checkpoint holds an output matrix that is not, in this dtype, its embedding: then transformers does not
    tie the two, whatever the config says. Where both are there, both are read."""
    entries = {decoder_name(entry.key): entry for entry in tensor_entries(folder)}
    head, embedding = entries.get("lm_head.weight"), entries.get("embed_tokens.weight")
    if head is None or embedding is None:
        return False
    if head.shape != embedding.shape:
        return True
    with safe_open(head.path, framework="pt") as a, safe_open(embedding.path, framework="pt") as b:
        slices = a.get_slice(head.key), b.get_slice(embedding.key)
        for first in range(0, head.shape[0], HEAD_ROWS):  # in parts, so that a difference is mostly found in the first
            rows, others = (part[first : first + HEAD_ROWS].to(dtype) for part in slices)
            if not torch.equal(rows, others):
                return True
    return False


def check_embedding(config: ModelConfig, source: str, embedding: str) -> None:
    """Raises UserError for an embedding in host memory that the model also multiplies by, as its output matrix."""
    if embedding == "cpu" and config.tie_word_embeddings:
        raise UserError(f"--embedding cpu: {source} uses its embedding as the output matrix, too; leave it out")


def check_memory(model: Qwen3_5, device: torch.device, config_file: Path, shard: bool) -> None:
    """Raises UserError for weights that the whole device could not hold; a few wrong digits may ask for terabytes."""
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    needed //= rank_count() if shard else 1
    # Tensors on "meta" take no memory.
    if device.type != "meta" and needed > memory_total(device):
        weights, memory = f"{needed / 1e9:,.0f} GB of weights", f"{memory_total(device) / 1e9:,.0f} GB"
        raise UserError(f"{config_file}: describes {weights}, {device} has {memory}; take another model or dtype")


def matching_tensors(model: Qwen3_5, folder: Path) -> dict[str, tuple[Path, str]]:
    """Published name -> (file, key in it) of every tensor of the decoder, which may be on "meta".

    Raises UserError naming what is missing, unknown, of another shape, or quantised.
    """
    shapes = {name: destination.shape for name, destination in destinations(model).items()}
    locations, faults = {}, []
    for entry in tensor_entries(folder):
        name = decoder_name(entry.key)
        # A tied model's head may be published although it is the embedding (`has_own_head` has compared them).
        if name is None or (name == "lm_head.weight" and model.lm_head is None):
            continue
        if name in locations:
            faults.append(f"{entry.key} and {locations[name][1]} are two tensors for one place")
        locations[name] = entry.path, entry.key
        faults += _faults(entry, shapes.get(name))
    faults += [f"missing tensor {name}" for name in shapes if name not in locations]
    if faults:
        more = f"; and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
        listed = "; ".join(faults[:MAX_FAULTS])
        raise UserError(f"{folder}: not the checkpoint that its config.json describes: {listed}{more}")
    return locations


def _faults(entry: TensorEntry, shape: tuple[int, ...] | None) -> list[str]:
    """What is wrong with a tensor of the checkpoint. shape: the decoder's; None where it has no such tensor."""
    if shape is None:
        return [f"unknown tensor {entry.key}"]
    if entry.shape != shape:
        return [f"{entry.key} is {list(entry.shape)}, expected {list(shape)}"]
    if entry.dtype not in READABLE:
        readable = ", ".join(READABLE)
        return [f"{entry.key} is {entry.dtype}, expected one of {readable} (quantised checkpoints do not load)"]
    return []


def build(config: ModelConfig, device: str | torch.device, dtype: torch.dtype) -> Qwen3_5:
    """An uninitialised decoder on the device (also "meta"), its weights in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Qwen3_5(config)
    finally:
        torch.set_default_dtype(before)


def fill(model: Qwen3_5, locations: dict[str, tuple[Path, str]]) -> None:
    """Copies the `matching_tensors` of a folder into the decoder, one tensor at a time.

    Raises UserError naming the first tensor that holds NaN or infinity.
    """
    places = destinations(model)
    # File by file, as the disk reads best.
    for name, (path, key) in sorted(locations.items(), key=lambda item: item[1][0]):
        view, first, _ = places[name]
        if not len(view):  # all its rows are other ranks'
            continue
        # Opened anew for each tensor: the pages of a mapped file stay resident while it is open.
        with safe_open(path, framework="pt") as file:
            view.copy_(file.get_slice(key)[first : first + len(view)])
        # Checked where it lies now: on a GPU that costs nothing beside the reading of the file.
        if not all_finite(view):
            raise UserError(f"{path}: {key} {NOT_FINITE}")


@torch.no_grad()
def randomise(model: Qwen3_5) -> None:
    """Seeded random weights, tensor by tensor: the same numbers whatever the loading order."""
    for name, (view, first, shape) in destinations(model).items():
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


def published_tensors(model: Qwen3_5) -> dict[str, Tensor]:
    """Every tensor of the decoder by its published name, in its published shape: a view of the parameter it lies in."""
    return {name: destination.view for name, destination in destinations(model).items()}


class Destination(NamedTuple):
    """Where a published tensor belongs in the model.

    Fused projections share a parameter: then the view is a slice of the parameter's rows. With the blocks sharded, the
    view has those rows of it that lie on this rank; without, all of them.
    """

    view: Tensor
    first: int  # row of the published tensor with which the view begins; 0 unless sharded
    shape: tuple[int, ...]  # of the published tensor


def destinations(model: Qwen3_5) -> dict[str, Destination]:
    """Published name -> its place in the model."""
    places = {}
    for path, module in model.named_modules():
        if isinstance(module, FusedLinear):
            places |= _fused_destinations(path.rpartition(".")[0], module)
        elif not isinstance(module, Adapter):
            for name, parameter in module.named_parameters(recurse=False):
                places |= _destination(f"{path}.{name}" if path else name, parameter)
    return places


def _fused_destinations(path: str, layer: FusedLinear) -> dict[str, Destination]:
    places, row = {}, 0
    for part, size in layer.parts.items():
        view, first = local_part(layer.weight, row, row + size)
        places[f"{path}.{part}.weight"] = Destination(view, first, (size, layer.weight.shape[1]))
        row += size
    return places


def _destination(path: str, parameter: nn.Parameter) -> dict[str, Destination]:
    view, first = local_part(parameter, 0, len(parameter))
    shape = tuple(parameter.shape)
    if path.endswith("conv1d"):
        view, shape = view.unsqueeze(1), (shape[0], 1, shape[1])  # (C, 1, M): a depthwise convolution's layout
    bare = path.endswith(("A_log", "dt_bias"))  # parameters of the mixer itself, not a module's `weight`
    return {path if bare else f"{path}.weight": Destination(view, first, shape)}
